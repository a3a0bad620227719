"""`MNISTDataModule`: splits, normalisation figures, and loaders that cut whole batches."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from mnist_cnn.config.data_settings import DATA_NAMES
from mnist_cnn.config.schema import UserError
from mnist_cnn.data.datasets import ACCELERATOR_BATCH, CPU_BATCH, Digits, load


class DigitLoader:
    """A part's batches, a tensor index each, on a GPU one for all: no Python runs per digit.

    It knows where it is (`state_dict`, `load_state_dict`), so that Lightning resumes within an epoch.

    Args:
        digits: uint8 images (N, 1, 28, 28) and labels (N,), on the device that works on them.
        batch_size: digits a batch; the last may be shorter.
        order: gives the indices (N,) of an epoch when its first batch is asked for; None takes the digits as they lie.
        rank, ranks: give this rank's part of each batch. All ranks have as many batches, and together each digit once.

    Yields:
        images uint8 (B, 1, 28, 28) and labels int64 (B,). With several ranks also a weight: times the mean loss of
        this rank's digits it makes the mean over ranks the loss of the whole batch. A rank whose part of a short batch
        would be empty takes one digit, with weight 0.
    """

    def __init__(
        self,
        digits: Digits,
        batch_size: int,
        order: Callable[[], Tensor] | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.digits, self.batch_size, self.order = digits, batch_size, order
        self.rank, self.ranks = rank, ranks
        self.position = 0  # batches given out in this epoch
        self._first = 0  # with which the next epoch begins

    def __len__(self) -> int:
        return math.ceil(len(self.digits.labels) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        images, labels = self.digits
        first, self._first = self._first % max(len(self), 1), 0
        indices = self.order().to(labels.device) if self.order else torch.arange(len(labels), device=labels.device)
        at_once = self.ranks == 1 and labels.device.type != "cpu"  # else each batch waits for two more launches
        if at_once:
            images, labels = images.index_select(0, indices), labels.index_select(0, indices)
        for position in range(first, len(self)):
            self.position = position + 1
            cut = slice(position * self.batch_size, (position + 1) * self.batch_size)
            if at_once:
                yield images[cut], labels[cut]
                continue
            chosen, weight = indices[cut], list[float]()
            if self.ranks > 1:
                chosen, *weight = self._part(chosen)
            yield images.index_select(0, chosen), labels.index_select(0, chosen), *weight

    def _part(self, batch: Tensor) -> tuple[Tensor, float]:
        total = len(batch)
        part = batch[total * self.rank // self.ranks : total * (self.rank + 1) // self.ranks]
        return (part, len(part) * self.ranks / total) if len(part) else (batch[:1], 0.0)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._first = state_dict["position"]


class MNISTDataModule(pl.LightningDataModule):
    """MNIST and its like as batches of uint8 (B, 1, 28, 28) and int64 labels (B,).

    Args:
        name: mnist, fashion_mnist, kmnist, qmnist, emnist_digits, emnist_letters, emnist_balanced, usps, digits,
            folder, or `module.function` of your own (see `load` in data/datasets.py).
        root: folder of the files, in torchvision's layout, $MNIST_CNN_DATA or else data/ where it is None; they are
            downloaded there where they are missing. Of `folder`: where the folders of the classes are.
        batch_size: of training; the last short batch is kept.
        validation: fraction or count of the training digits; 0 for none. The test set is never used for it.
        validation_from: the `last` training digits, as Keras takes them, or a `random` stratified part.
        normalization: `unit` divides by 255; `standard` has mean 0 and std 1 over the training part.
        test: the fraction of a `folder` that is its test part, where it has none of its own.
        seed: of the order of the training digits and of a random validation part.

    Attributes:
        train, validation, test: `Digits`, after `setup`; validation may be empty.
        classes: names of the labels, after `setup`.
        mean, std: the figures for `ConvNet`, in units of 0–255, after `setup`.
    """

    train: Digits
    validation: Digits
    test: Digits
    classes: list[str]

    def __init__(
        self,
        name: str = "mnist",
        root: str | None = None,
        batch_size: int = 64,
        validation: int | float = 0.1,
        validation_from: Literal["last", "random"] = "last",
        normalization: Literal["unit", "standard"] = "unit",
        test: float | None = None,
        seed: int = 1,
    ) -> None:
        super().__init__()
        if name not in DATA_NAMES and "." not in name:
            raise UserError(f"data.name={name}: expected one of {', '.join(DATA_NAMES)}")
        self.data_name, self.batch_size, self.seed = name, batch_size, seed
        self.root = Path(root or os.environ.get("MNIST_CNN_DATA") or "data").expanduser()
        self.validation_size, self.validation_from = validation, validation_from
        self.normalization, self.test_fraction = normalization, test
        self._ready = False

    def prepare_data(self) -> None:
        """Download where needed; Lightning calls it in one process."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Read, verify and split.

        Raises:
            UserError: the files are missing or wrong, or `validation` leaves no digit to train on.
        """
        if self._ready:
            return
        digits, self.test, self.classes = load(self.data_name, self.root, self.test_fraction)
        held_out = self._held_out(digits.labels)
        parts: tuple[Any, Any]
        if isinstance(held_out, slice):
            parts = slice(0, held_out.start), held_out  # no copy
        else:
            chosen = torch.zeros(len(digits.labels), dtype=torch.bool).index_fill_(0, held_out, True)
            parts = ~chosen, chosen
        self.train, self.validation = (Digits(digits.images[part], digits.labels[part]) for part in parts)
        self.mean, self.std = 0.0, 255.0
        if self.normalization == "standard":
            counts = [torch.bincount(part.flatten(), minlength=256) for part in self.train.images.split(5_000)]
            fractions = torch.stack(counts).sum(0).double() / self.train.images.numel()
            levels = torch.arange(256).double()  # of grey; `fractions` is how often each comes
            self.mean = (levels * fractions).sum().item()
            self.std = ((levels - self.mean).square() * fractions).sum().sqrt().item()
        self._ready = True

    def _held_out(self, labels: Tensor) -> Tensor | slice:
        total, size = len(labels), self.validation_size
        # Keras rounds the training part down: keras/src/trainers/data_adapters/array_slicing.py.
        count = size if isinstance(size, int) else total - math.floor(total * (1 - size))
        if count >= total:
            raise UserError(f"data.validation={size} leaves no training digit; {self.data_name} has {total:,}")
        if count == 0 or self.validation_from == "last":
            return slice(total - count, total)
        if not len(self.classes) <= count <= total - len(self.classes):
            raise UserError(
                f"data.validation={size} is {count} of {total:,} digits; a random stratified part takes one of each "
                f"class at least, and leaves one: {len(self.classes)} to {total - len(self.classes):,}, or 0 for none"
            )
        from sklearn.model_selection import train_test_split

        _, held_out = train_test_split(range(total), test_size=count, stratify=labels, random_state=self.seed)
        return torch.tensor(held_out)

    def shapes(self) -> str:
        """What there is, as text: the shape of each part, and the counts of each class."""
        counts = torch.bincount(self.train.labels, minlength=len(self.classes)).tolist()
        parts = {"training": self.train, "validation": self.validation, "test": self.test}
        lines = [f"data {self.data_name}"]
        lines += [f"  {name:<11}{tuple(part.images.shape)!s:<21} uint8" for name, part in parts.items()]
        named = ", ".join(f"{name}: {count:,}" for name, count in zip(self.classes, counts, strict=True))
        first = f"  first training digit: {self.classes[int(self.train.labels[0])]}"
        return "\n".join([*lines, first, f"  training digits of each class  {named}"])

    def train_dataloader(self) -> DigitLoader:
        """Shuffled by (seed, epoch) alone, so that a resumed run has the same order."""

        def order() -> Tensor:
            trainer: Any = self.trainer
            fixed = trainer is None or trainer.overfit_batches > 0  # the same few batches each epoch
            epoch = 0 if fixed else trainer.current_epoch
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            return torch.randperm(len(self.train.labels), generator=generator)

        return DigitLoader(self._on_device(self.train), self.batch_size, order, *self._rank())

    def val_dataloader(self) -> DigitLoader | list[Any]:
        return self._evaluation_loader(self.validation) if len(self.validation.labels) else []

    def test_dataloader(self) -> DigitLoader:
        return self._evaluation_loader(self.test)

    def predict_dataloader(self) -> DigitLoader:
        """The test digits."""
        return self._evaluation_loader(self.test)

    def _evaluation_loader(self, digits: Digits) -> DigitLoader:
        digits = self._on_device(digits)
        rank, ranks = self._rank()
        size = CPU_BATCH if digits.labels.device.type == "cpu" else ACCELERATOR_BATCH
        return DigitLoader(digits, size * ranks, None, rank, ranks)

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _on_device(self, digits: Digits) -> Digits:
        # All of MNIST is 55 MB: it lives on the accelerator, and batches are cut there.
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        return Digits(digits.images.to(device), digits.labels.to(device))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # it is there

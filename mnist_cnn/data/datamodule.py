"""`MNISTDataModule`: splits, normalisation figures, and loaders that cut whole batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from mnist_cnn.config.schema import UserError
from mnist_cnn.data.datasets import CLASSES, Digits, load
from mnist_cnn.models.convnet import CPU_BATCH

STRETCH = 2_000  # digits that a Lightning step takes: its own cost is then spread over many optimizer steps


class Batches:
    """A part's batches, in the order of `order()` at the start, or as they lie; no Python runs per digit.

    Args:
        digits: uint8 images (N, 1, 28, 28) and labels (N,), on the device that works on them.
        size: digits a batch; the last may be shorter.
        order: gives the indices of an epoch.
        stretch: 0 for plain batches; else this many batches at a time, as a tuple, for a step that takes several.
        rank, ranks: give the share of this one of so many of each batch: of n digits those from n·rank/ranks on,
            which may be none of a short last batch. All ranks have as many batches, and together each digit once.
    """

    def __init__(
        self,
        digits: Digits,
        size: int,
        order: Callable[[], Tensor] | None = None,
        stretch: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.digits, self.size, self.order, self.stretch = digits, size, order, stretch
        self.rank, self.ranks = rank, ranks

    def __iter__(self) -> Iterator[Any]:
        images, labels = self.digits
        indices = self.order().to(labels.device) if self.order else None
        if indices is None and self.ranks > 1:
            indices = torch.arange(len(labels), device=labels.device)
        if indices is not None and not len(indices):
            yield ()  # a run was stopped after an epoch's last step: Lightning validates after a batch only
            return
        count = max(self.stretch, 1) * self.size
        sizes: int | list[int] = self.size
        total = len(labels) if indices is None else len(indices)
        done = (len(labels) - total) % count  # of the stretch in which an epoch goes on: it ends where it would have
        for start in range(-done, total, count):
            within = slice(max(start, 0), start + count)
            if indices is None:
                part = Digits(images[within], labels[within])
            else:
                chosen, sizes = self._share(indices[within])
                part = Digits(images.index_select(0, chosen), labels.index_select(0, chosen))
            batches = tuple(zip(*(tensor.split(sizes) for tensor in part), strict=True))
            yield batches if self.stretch else batches[0]

    def _share(self, chosen: Tensor) -> tuple[Tensor, int | list[int]]:
        """This rank's of the indices of several batches, and how many it has of each."""
        if self.ranks == 1:
            return chosen, self.size
        bounds = [
            (len(batch) * self.rank // self.ranks, len(batch) * (self.rank + 1) // self.ranks, batch)
            for batch in chosen.split(self.size)
        ]
        shares = [batch[start:end] for start, end, batch in bounds]
        return torch.cat(shares), [len(share) for share in shares]


class MNISTDataModule(pl.LightningDataModule):
    """MNIST's family and scikit-learn's digits as batches of uint8 (B, 1, 28, 28) and int64 labels (B,).

    Args:
        name: mnist, fashion_mnist, kmnist or digits.
        root: folder of the files, in torchvision's layout; downloaded there where they are missing.
        batch_size: of training; the last short batch is kept.
        validation: fraction or count of the training digits; 0 for none. The test set is never used for it.
        validation_from: the `last` training digits, as Keras takes them, or a `random` stratified part.
        normalization: `unit` divides by 255; `standard` has mean 0 and sd 1 over the training part.
        seed: of the order of the training digits and of a random validation part.
        stretches: give loaders that hand over some 2,000 digits at a time as a tuple of batches, for `DigitClassifier`.

    Attributes:
        train, validation, test: `Digits`, after `setup`; validation may be empty.
        resumed: the epoch, counted from 0, in which training goes on, and how many of its steps are done already.
        mean, standard_deviation: the figures for `ConvNet`, in units of 0–255, after `setup`.
    """

    train: Digits
    validation: Digits
    test: Digits

    def __init__(
        self,
        name: str = "mnist",
        root: str = "data",
        batch_size: int = 64,
        validation: int | float = 0.1,
        validation_from: Literal["last", "random"] = "last",
        normalization: Literal["unit", "standard"] = "unit",
        seed: int = 1,
        stretches: bool = False,
    ) -> None:
        super().__init__()
        self.data_name, self.root, self.batch_size, self.seed = name, root, batch_size, seed
        self.validation_share, self.validation_from = validation, validation_from
        self.normalization, self.stretches = normalization, stretches
        self.classes = CLASSES[name]
        self.resumed = (0, 0)
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
        digits, self.test = load(self.data_name, self.root)
        held_out = self._held_out(digits.labels)
        parts: tuple[Any, Any]
        if isinstance(held_out, slice):
            parts = slice(0, held_out.start), held_out  # no copy
        else:
            chosen = torch.zeros(len(digits.labels), dtype=torch.bool).index_fill_(0, held_out, True)
            parts = ~chosen, chosen
        self.train, self.validation = (Digits(digits.images[part], digits.labels[part]) for part in parts)
        self.mean, self.standard_deviation = 0.0, 255.0
        if self.normalization == "standard":
            counts = [torch.bincount(part.flatten(), minlength=256) for part in self.train.images.split(5_000)]
            shares = torch.stack(counts).sum(0).double() / self.train.images.numel()
            levels = torch.arange(256).double()  # of grey; `shares` is how often each comes
            self.mean = (levels * shares).sum().item()
            self.standard_deviation = ((levels - self.mean).square() * shares).sum().sqrt().item()
        self._ready = True

    def _held_out(self, labels: Tensor) -> Tensor | slice:
        total, share = len(labels), self.validation_share
        # Keras rounds the training part down: keras/src/trainers/data_adapters/array_slicing.py.
        count = share if isinstance(share, int) else total - math.floor(total * (1 - share))
        if count >= total:
            raise UserError(f"data.validation={share} leaves no training digit; {self.data_name} has {total:,}")
        if count == 0 or self.validation_from == "last":
            return slice(total - count, total)
        if not len(self.classes) <= count <= total - len(self.classes):
            raise UserError(
                f"data.validation={share} is {count} of {total:,} digits; a random stratified part takes one of each "
                f"class at least, and leaves one: {len(self.classes)} to {total - len(self.classes):,}"
            )
        from sklearn.model_selection import train_test_split

        _, held_out = train_test_split(range(total), test_size=count, stratify=labels, random_state=self.seed)
        return torch.tensor(held_out)

    def shapes(self) -> str:
        """What there is, as text: the shape and share of each part, and the counts of each class."""
        counts = torch.bincount(self.train.labels, minlength=len(self.classes)).tolist()
        parts = {"training": self.train, "validation": self.validation, "test": self.test}
        lines = [f"data {self.data_name}"]
        lines += [f"  {name:<11}{tuple(part.images.shape)!s:<21} uint8" for name, part in parts.items()]
        named = ", ".join(f"{name}: {count:,}" for name, count in zip(self.classes, counts, strict=True))
        first = f"  first training digit: {self.classes[int(self.train.labels[0])]}"
        return "\n".join([*lines, first, f"  training digits of each class  {named}"])

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train.labels) / self.batch_size)

    @property
    def steps_per_stretch(self) -> int:
        return math.ceil(STRETCH / self.batch_size) if self.stretches else 0

    def train_dataloader(self) -> Batches:
        """Shuffled by (seed, epoch) alone, so that a resumed run sees the same order."""

        def order() -> Tensor:
            first, position = self.resumed
            epoch = max(self.trainer.current_epoch if self.trainer else 0, first)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            indices = torch.randperm(len(self.train.labels), generator=generator)
            return indices[position * self.batch_size :] if epoch == first else indices

        return Batches(self._on_device(self.train), self.batch_size, order, self.steps_per_stretch, *self._place())

    def val_dataloader(self) -> Batches | list[Any]:
        return self._evaluation(self.validation) if len(self.validation.labels) else []

    def test_dataloader(self) -> Batches:
        return self._evaluation(self.test)

    def _evaluation(self, digits: Digits) -> Batches:
        stretch = math.ceil(STRETCH / CPU_BATCH) if self.stretches else 0
        rank, ranks = self._place()
        return Batches(self._on_device(digits), CPU_BATCH * ranks, None, stretch, rank, ranks)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _on_device(self, digits: Digits) -> Digits:
        # All of MNIST is 55 MB: it lives on the accelerator, and batches are cut there.
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        return Digits(digits.images.to(device), digits.labels.to(device))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # it is there

"""`MNISTDataModule`: splits, normalisation figures, and loaders whose batches are one tensor index."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from mnist_cnn.datasets import CLASSES, Digits, load
from mnist_cnn.schema import UserError

EVALUATION_BATCH = 100  # larger ones leave the caches of a CPU


class WholeBatches(Dataset[tuple[Tensor, Tensor]]):
    """Digits that a DataLoader takes a batch at a time: no Python runs per sample."""

    def __init__(self, digits: Digits) -> None:
        self.images, self.labels = digits

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(indices)
        return self.images[chosen], self.labels[chosen]


def _as_it_is(batch: Any) -> Any:
    return batch


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

    Attributes:
        train, validation, test: `Digits`, after `setup`; validation may be empty.
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
    ) -> None:
        super().__init__()
        self.data_name, self.root, self.batch_size, self.seed = name, root, batch_size, seed
        self.validation_share, self.validation_from = validation, validation_from
        self.normalization = normalization
        self.classes = CLASSES[name]
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
        part = torch.zeros(len(digits.labels), dtype=torch.bool)
        part[held_out] = True
        self.train, self.validation = (Digits(digits.images[m], digits.labels[m]) for m in (~part, part))
        self.mean, self.standard_deviation = 0.0, 255.0
        if self.normalization == "standard":
            pixels = self.train.images.double()
            self.mean, self.standard_deviation = pixels.mean().item(), pixels.std(correction=0).item()
        self._ready = True

    def _held_out(self, labels: Tensor) -> Tensor:
        total, share = len(labels), self.validation_share
        # Keras rounds the training part down: keras/src/trainers/data_adapters/array_slicing.py.
        count = share if isinstance(share, int) else total - math.floor(total * (1 - share))
        if count >= total:
            raise UserError(f"data.validation={share} leaves no training digit; {self.data_name} has {total:,}")
        if count == 0 or self.validation_from == "last":
            return torch.arange(total - count, total)
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

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Shuffled by (seed, epoch) alone, so that a resumed run sees the same order."""
        world = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        digits = self._batches(self.train)
        sampler: DistributedSampler[tuple[Tensor, Tensor]] = DistributedSampler(
            digits, world, rank, shuffle=True, seed=self.seed
        )
        # A generator of its own: a loader's start would else draw from the random numbers of dropout.
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(digits, self.batch_size, sampler=sampler, collate_fn=_as_it_is, generator=generator)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]] | list[Any]:
        if len(self.validation.labels) == 0:
            return []
        return DataLoader(self._batches(self.validation), EVALUATION_BATCH, collate_fn=_as_it_is)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self._batches(self.test), EVALUATION_BATCH, collate_fn=_as_it_is)

    def _batches(self, digits: Digits) -> WholeBatches:
        # All of MNIST is 55 MB: it lives on the accelerator, and batches are cut there.
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        return WholeBatches(Digits(digits.images.to(device), digits.labels.to(device)))

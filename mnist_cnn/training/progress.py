"""What a user sees while a network trains: a bar on a terminal, a line an epoch, and nothing else."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from typing import Any

import pytorch_lightning as pl
from tqdm import tqdm

from mnist_cnn.training.module import DigitClassifier, Row

SECONDS_BETWEEN_UPDATES = 0.2


class ProgressBar(pl.Callback):
    """A bar with the running loss and accuracy of the epoch; reads the device a few times a second only."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.bar = tqdm(disable=True)

    def on_train_epoch_start(self, trainer: pl.Trainer, classifier: pl.LightningModule) -> None:
        title = f"epoch {trainer.current_epoch + 1}/{self.epochs}"
        steps = trainer.datamodule.steps_per_epoch  # type: ignore[attr-defined]
        self.bar = tqdm(total=steps, desc=title, unit="batch", leave=False)
        self.drawn = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, classifier: pl.LightningModule, *_: Any) -> None:
        now = time.monotonic()
        if now - self.drawn > SECONDS_BETWEEN_UPDATES:
            self.drawn = now
            assert isinstance(classifier, DigitClassifier)
            loss, accuracy = classifier.running()
            self.bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2%}", refresh=False)
            self.bar.update(classifier.position - self.bar.n)

    def on_train_epoch_end(self, trainer: pl.Trainer, classifier: pl.LightningModule) -> None:
        self.bar.close()

    def on_exception(self, *_: Any) -> None:
        self.bar.close()


def bars(epochs: int) -> list[pl.Callback]:
    return [ProgressBar(epochs)] if sys.stderr.isatty() else []


def epoch_line(row: Row, epochs: int) -> str:
    line = f"epoch {row['epoch']:.0f}/{epochs}  loss {row['train/loss']:.4f}  accuracy {row['train/accuracy']:.2%}"
    if "val/loss" in row:
        line += f"  validation loss {row['val/loss']:.4f}  accuracy {row['val/accuracy']:.2%}"
    return f"{line}  {row['seconds']:.1f} s"


def quiet() -> None:
    """Silence the tips and warnings of libraries that a user can do nothing about."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric", "mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|torchmetrics|torch)(\.|$)")

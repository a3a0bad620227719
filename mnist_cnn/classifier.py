"""`DigitClassifier`: one shared step; loss and correct count are kept on the device and read once an epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from mnist_cnn.architectures import ConvNet
from mnist_cnn.schema import RunError

Row = dict[str, float]
Batch = tuple[Tensor, Tensor]


def _batches(stretch: Batch | tuple[Batch, ...]) -> tuple[Batch, ...]:
    return (stretch,) if isinstance(stretch[0], Tensor) else stretch  # type: ignore[return-value]


class DigitClassifier(pl.LightningModule):
    """Trains a `ConvNet` by cross entropy on batches of uint8 (B, 1, 28, 28) and class indices (B,).

    A loader may hand over one batch or a tuple of them at a time (`MNISTDataModule(stretches=True)`).

    Args:
        network: what is trained.
        optimizer: from parameters to an optimizer.
        scheduler: from the optimizer to a scheduler, where there is one.
        interval: step or epoch, when the scheduler moves.
        length: name of the scheduler's argument that takes the run's number of intervals.
        seed: with the epoch it fixes dropout, so that a resumed epoch repeats itself.
        description: plain values that a checkpoint carries beside the weights.
        report: is given the rows of all epochs so far at each epoch's end.
    """

    def __init__(
        self,
        network: ConvNet,
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = torch.optim.Adam,
        scheduler: Callable[..., Any] | None = None,
        interval: str = "epoch",
        length: str | None = None,
        seed: int = 1,
        description: dict[str, Any] | None = None,
        report: Callable[[list[Row]], None] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.interval, self.length = interval, length
        self.seed, self.description, self.report = seed, description or {}, report
        self.history: list[Row] = []
        self.automatic_optimization = False
        self.position = 0  # optimizer steps done in this epoch
        self.stopping = False
        self._reset()

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 (N, 1, 28, 28) to logits (N, classes)."""
        return self.network(images)

    # --- the step ------------------------------------------------------------------------------------------

    def training_step(self, stretch: Batch | tuple[Batch, ...], index: int) -> None:
        """Several optimizer steps: Lightning's own work each step would else cost more than a small network's.

        `stretch` is a batch or a tuple of them. `stopping` ends it after the step it is in.
        """
        optimizer, schedule = self.optimizers(), self.lr_schedulers() if self.interval == "step" else None
        assert isinstance(optimizer, LightningOptimizer)
        results: list[tuple[Tensor, Tensor, Tensor]] = []
        for images, labels in _batches(stretch):
            logits = self.network(images)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            torch.clear_autocast_cache()  # of the weights before the step
            if schedule is not None:
                schedule.step()  # type: ignore[union-attr, call-arg]
            self.position += 1
            results.append((loss.detach(), logits.detach(), labels))
            if self.stopping:
                break
        self._count(results)

    def validation_step(self, stretch: Batch | tuple[Batch, ...], index: int) -> None:
        results = []
        for images, labels in _batches(stretch):
            logits = self.network(images)
            results.append((F.cross_entropy(logits, labels), logits, labels))
        self._count(results)

    test_step = validation_step

    def _count(self, results: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Add losses, logits (B, classes) and labels (B,) to the sums, on the device."""
        losses, logits, labels = zip(*results, strict=True)
        sizes = torch.tensor([len(part) for part in labels], device=self.device)
        self.loss_sum += (torch.stack(losses).double() * sizes).sum()
        self.correct += (torch.cat(logits).argmax(1) == torch.cat(labels)).sum()
        self.seen += sum(len(part) for part in labels)

    def _reset(self) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.seen = 0

    def running(self) -> tuple[float, float]:
        """Mean loss and accuracy over the digits seen since the part began."""
        return self.loss_sum.item() / max(self.seen, 1), self.correct.item() / max(self.seen, 1)

    def _figures(self, part: str) -> Row:
        loss, accuracy = self.running()
        return {f"{part}/loss": loss, f"{part}/accuracy": accuracy}

    # --- epochs --------------------------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        self.started = time.perf_counter()
        self.rate = self.trainer.optimizers[0].param_groups[0]["lr"]  # at the epoch's first step
        torch.manual_seed(self.seed * 1_000_003 + self.current_epoch)
        if not any(parameter.requires_grad for parameter in self.network.blocks.parameters()):
            self.network.blocks.eval()  # frozen: neither dropout nor batch norm's statistics move
        self._validated: Row = {}
        self.position = 0
        self._reset()

    def on_validation_epoch_start(self) -> None:
        self._trained = (self.loss_sum, self.correct, self.seen)
        self._reset()

    def on_validation_epoch_end(self) -> None:
        self._validated = self._figures("val")
        self.log_dict(self._validated)
        self.loss_sum, self.correct, self.seen = self._trained

    def on_train_epoch_end(self) -> None:
        trained = self._figures("train")
        if not all(map(math.isfinite, (trained | self._validated).values())):
            raise RunError(
                f"the loss of epoch {self.current_epoch + 1} is not finite, at learning rate {self.rate:g}: "
                "try a smaller optimizer.lr; no checkpoint of this epoch was written"
            )
        self.log_dict(trained)
        row: Row = {"epoch": self.current_epoch + 1, "step": self.global_step, **trained, **self._validated}
        row["learning_rate"] = self.rate
        row["seconds"] = time.perf_counter() - self.started
        self.history.append(row)
        if self.make_scheduler is not None and self.interval == "epoch":
            self.lr_schedulers().step()  # type: ignore[union-attr, call-arg]
        if self.report:
            self.report(self.history)

    def on_test_epoch_start(self) -> None:
        self._reset()

    def on_test_epoch_end(self) -> None:
        self.log_dict(self._figures("test"))

    # --- optimizer and checkpoint --------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.make_optimizer([p for p in self.network.parameters() if p.requires_grad])
        if self.make_scheduler is None:
            return optimizer
        epochs = self.trainer.max_epochs or 1
        steps = epochs * self.trainer.datamodule.steps_per_epoch if self.interval == "step" else epochs  # type: ignore[attr-defined]
        scheduler = self.make_scheduler(optimizer, **({self.length: steps} if self.length else {}))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the network, as numbers, strings, lists and dicts only."""
        checkpoint["mnist_cnn"] = {**self.description, "history": [dict(row) for row in self.history]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = [dict(row) for row in checkpoint["mnist_cnn"]["history"]]
        self.trainer.datamodule.resumed = (len(self.history), 0)  # type: ignore[attr-defined]

"""`DigitClassifier`: one shared step; loss and correct count are kept on the device and read once an epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from mnist_cnn.config.schema import NotFiniteError
from mnist_cnn.models.convnet import ConvNet

REMEDY = "try a smaller optimizer.lr, or a schedule that begins lower; the checkpoint before it is kept"

Row = dict[str, float]
Batch = tuple[Tensor, Tensor]


def _batches(stretch: Batch | tuple[Batch, ...]) -> tuple[Batch, ...]:
    return (stretch,) if stretch and isinstance(stretch[0], Tensor) else stretch


class DigitClassifier(pl.LightningModule):
    """Trains a `ConvNet` by cross entropy on batches of uint8 (B, 1, 28, 28) and class indices (B,).

    A loader may hand over one batch or a tuple of them at a time (`MNISTDataModule(stretches=True)`).

    Args:
        network: what is trained.
        optimizer: from parameters to an optimizer.
        scheduler: from the optimizer to a scheduler, where there is one.
        interval: step or epoch, when the scheduler moves.
        length: name of the scheduler's argument that takes the run's number of intervals.
        seed: with the epoch it fixes dropout.
        description: plain values that a checkpoint carries beside the weights.
        report: is given the rows of all epochs so far at each epoch's end.
        augment: warps the digits of each training batch.
        label_smoothing: the share of each label that training's loss spreads over all classes.
    """

    loss_sum: Tensor
    correct: Tensor
    seen: int

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
        augment: Callable[[Tensor], Tensor] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.network = network
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.interval, self.length = interval, length
        self.seed, self.description, self.report = seed, description or {}, report
        self.augment, self.label_smoothing = augment, label_smoothing
        self.history: list[Row] = []
        self.automatic_optimization = False
        self.begun = self.ended = 0.0  # when this process took its first batch, and had done its last step so far
        self.position = 0  # optimizer steps done in this epoch
        self.stopping = 0  # the signal after which a stretch ends with the step that it is in
        self.continued: dict[str, Any] | None = None  # what `so_far` gave in the middle of the epoch that comes first
        self._reset()

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 (N, 1, 28, 28) to logits (N, classes)."""
        return self.network(images)

    # --- the step ------------------------------------------------------------------------------------------

    def training_step(self, stretch: Batch | tuple[Batch, ...], index: int) -> None:
        """Several optimizer steps: Lightning's own work each step would else cost more than a small network's.

        `stretch` is a batch or a tuple of them. `stopping` ends it after the step it is in.
        """
        schedule = self.lr_schedulers() if self.interval == "step" else None
        # Lightning's hooks around a backward pass and a step are for gradient scalers and other processes only, and
        # cost some 5 % of a small network's time.
        hooks = self.trainer.world_size > 1 or getattr(self.trainer.precision_plugin, "scaler", None) is not None
        optimizer: Any = self.optimizers(use_pl_optimizer=hooks)
        counted = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress  # global_step reads it
        backward = self.manual_backward if hooks else Tensor.backward
        results: list[tuple[Tensor, Tensor, Tensor]] = []
        rates: list[float] = []
        for images, labels in _batches(stretch):
            rates.append(optimizer.param_groups[0]["lr"])
            loss, logits = self.loss_of(images, labels)
            optimizer.zero_grad()
            backward(loss)
            optimizer.step()
            if not hooks:
                counted.increment_ready()
                counted.increment_completed()
            torch.clear_autocast_cache()  # of the weights before the step
            if schedule is not None:
                schedule.step()  # type: ignore[union-attr]
            results.append((loss.detach(), logits.detach(), labels))
            if self.stopping:
                break
        self.position += len(results)
        self._count(results)
        if self.device.type == "cpu" and not math.isfinite(self.loss_sum.item()):  # elsewhere this would wait
            self._refuse([loss for loss, _, _ in results], rates)

    def loss_of(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Training's loss, of the digits as they are warped and the labels as they are smoothed, and the logits."""
        if self.augment is not None:
            images = self.augment(images)
        logits = self.network(images)
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing), logits

    def _refuse(self, losses: list[Tensor], rates: list[float]) -> None:
        """End the run at the first of a stretch's losses that is not finite."""
        first = next(index for index, loss in enumerate(losses) if not loss.isfinite())
        step = self.global_step - len(losses) + first + 1
        raise NotFiniteError(f"the loss of step {step:,} is not finite, at learning rate {rates[first]:g}: {REMEDY}")

    def require_finite(self) -> None:
        """Before a checkpoint is written: it must be one to continue from.

        Raises:
            NotFiniteError: a weight or a loss is not.
        """
        figures = [self.loss_sum.item(), *self._validated.values()]
        if not all(map(math.isfinite, figures)) or not all(p.isfinite().all() for p in self.network.parameters()):
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            step = f"after step {self.global_step:,}, at learning rate {rate:g}"
            raise NotFiniteError(f"the loss or a weight is not finite {step}: {REMEDY}")

    def due(self, overdue: bool) -> bool:
        """Whether a checkpoint is to be written now, within an epoch."""
        return overdue

    def validation_step(self, stretch: Batch | tuple[Batch, ...], index: int) -> None:
        results = []
        for images, labels in _batches(stretch):
            logits = self.network(images)
            results.append((F.cross_entropy(logits, labels), logits, labels))
        self._count(results)

    test_step = validation_step

    def _count(self, results: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Add losses, logits (B, classes) and labels (B,) to the sums, on the device."""
        if not results:
            return  # an epoch that was stopped after its last step
        losses, logits, labels = zip(*results, strict=True)
        sizes = torch.tensor([len(part) for part in labels], device=self.device)
        # One after the other, so that the sum is the same wherever a run was stopped.
        self.loss_sum = torch.cat([self.loss_sum[None], torch.stack(losses).double() * sizes]).cumsum(0)[-1]
        self.correct += (torch.cat(logits).argmax(1) == torch.cat(labels)).sum()
        self.seen += sum(len(part) for part in labels)

    def _reset(self) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.seen = 0

    def _sums(self) -> tuple[Tensor, Tensor, int]:
        return self.loss_sum, self.correct, self.seen

    def running(self) -> tuple[float, float]:
        """Mean loss and accuracy over the digits seen since the part began."""
        return self.loss_sum.item() / max(self.seen, 1), self.correct.item() / max(self.seen, 1)

    def _end_of_steps(self) -> None:
        """Note when an epoch's last step was done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ended = time.perf_counter()

    def _figures(self, part: str) -> Row:
        loss, accuracy = self.running()
        return {f"{part}/loss": loss, f"{part}/accuracy": accuracy}

    # --- epochs --------------------------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        if not any(parameter.requires_grad for parameter in self.network.blocks.parameters()):
            self.network.blocks.eval()  # frozen: neither dropout nor batch norm's statistics move
        self._validated: Row = {}
        self._reset()
        self.begun = self.begun or time.perf_counter()
        so_far, self.continued = self.continued, None
        if so_far is None:
            self.position, self.started = 0, time.perf_counter()
            self.rate = self.trainer.optimizers[0].param_groups[0]["lr"]  # at the epoch's first step
            torch.manual_seed(self.seed * 1_000_003 + self.current_epoch)
            return
        self.started = time.perf_counter() - so_far["seconds"]
        self.rate, self.seen = float(so_far["rate"]), int(so_far["seen"])
        self.loss_sum, self.correct = so_far["loss_sum"].to(self.device), so_far["correct"].to(self.device)
        torch.set_rng_state(so_far["random"])
        if "cuda_random" in so_far and self.device.type == "cuda":
            torch.cuda.set_rng_state(so_far["cuda_random"], self.device)

    def so_far(self) -> dict[str, Any]:
        """What an epoch needs to go on from `position` as if nothing had been: sums, dropout's random states."""
        loss_sum, correct, seen = self._trained if self.trainer.validating else self._sums()
        state: dict[str, Any] = {"loss_sum": loss_sum, "correct": correct, "seen": seen}
        state |= {"position": self.position, "rate": self.rate, "seconds": time.perf_counter() - self.started}
        state["random"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["cuda_random"] = torch.cuda.get_rng_state(self.device)
        return state

    def on_validation_epoch_start(self) -> None:
        self._end_of_steps()
        self._trained = self._sums()
        self._reset()

    def on_validation_epoch_end(self) -> None:
        self._validated = self._figures("val")
        self.log_dict({**self._validated, "step": float(self.global_step)})
        self.loss_sum, self.correct, self.seen = self._trained

    def on_train_epoch_end(self) -> None:
        if not self._validated:
            self._end_of_steps()
        self.require_finite()
        trained = self._figures("train")
        self.log_dict({**trained, "step": float(self.global_step)})
        row: Row = {"epoch": self.current_epoch + 1, "step": self.global_step, **trained, **self._validated}
        row["learning_rate"] = self.rate
        row["seconds"] = time.perf_counter() - self.started
        self.history.append(row)
        if self.make_scheduler is not None and self.interval == "epoch":
            self.lr_schedulers().step()  # type: ignore[union-attr]
        self.position = 0  # of the next epoch
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
        self.continued = checkpoint.get("epoch_so_far")
        self.position = self.continued["position"] if self.continued else 0
        self.trainer.datamodule.resumed = (len(self.history), self.position)  # type: ignore[attr-defined]

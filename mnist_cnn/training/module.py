"""`DigitClassifier`: the LightningModule. One batch a step; loss and accuracy stay on the device until asked for."""

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
from mnist_cnn.data.augmentation import Augment
from mnist_cnn.data.datamodule import MNISTDataModule
from mnist_cnn.models.checkpoint import FORMAT, rebuild, trust
from mnist_cnn.models.convnet import ConvNet
from mnist_cnn.runs.folder import versions
from mnist_cnn.training.cuda_graph import StepGraph, form_of, may_be_graphed

REMEDY = "try a smaller optimizer.lr, or a schedule that begins lower; the checkpoint before it is kept"
PENDING = 32  # batches whose results are added to the sums at once: a small network's step takes no longer than that

EpochRow = dict[str, float]  # a line of metrics.csv


class EpochSums:
    """Loss and count of correct digits of an epoch so far, on the device."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self.correct = torch.zeros((), dtype=torch.int64)
        self.seen = 0
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """The mean loss (), logits (B, classes) and labels (B,) of a batch."""
        self._pending.append((loss, logits, labels))
        self.seen += len(labels)
        if len(self._pending) == PENDING:
            self._add_pending()

    def _add_pending(self) -> None:
        if not self._pending:
            return
        losses, logits, labels = zip(*self._pending, strict=True)
        self._pending = []
        device = losses[0].device
        sizes = torch.tensor([len(part) for part in labels], device=device)
        each = torch.stack(losses).double() * sizes
        # One after the other, so that the sum is the same wherever a run was stopped.
        self.loss_sum = torch.cat([self.loss_sum.to(device)[None], each]).cumsum(0)[-1]
        self.correct = self.correct.to(device) + (torch.cat(logits).argmax(1) == torch.cat(labels)).sum()

    def figures(self, part: str) -> EpochRow:
        """Mean loss and accuracy, as `part/loss` and `part/accuracy`."""
        self._add_pending()
        count = max(self.seen, 1)
        return {f"{part}/loss": self.loss_sum.item() / count, f"{part}/accuracy": self.correct.item() / count}

    def state_dict(self) -> dict[str, Any]:
        self._add_pending()
        return {"loss_sum": self.loss_sum, "correct": self.correct, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss_sum, self.correct, self.seen = state["loss_sum"], state["correct"], state["seen"]

    def summed(self, strategy: Any, device: torch.device) -> EpochSums:
        """Those of all ranks of a Lightning `strategy`; float64 counts digits exactly."""
        self._add_pending()
        sums = torch.stack([self.loss_sum, self.correct.double(), torch.tensor(float(self.seen)).double()]).to(device)
        sums = strategy.reduce(sums, reduce_op="sum")
        total = EpochSums()
        total.loss_sum, total.correct, total.seen = sums[0], sums[1].long(), int(sums[2])
        return total


class DigitClassifier(pl.LightningModule):
    """Trains a `ConvNet` by cross entropy on batches of uint8 (B, 1, 28, 28) and class indices (B,).

    Logs `train/loss`, `train/accuracy`, `val/loss`, `val/accuracy` and `learning_rate` at each epoch's end. Its
    checkpoints carry a description from which `load_classifier` rebuilds the network. The random numbers of a step are
    a function of (seed, epoch, batch), so that a resumed run draws the same.

    Args:
        network: what is trained.
        optimizer: from parameters to an optimizer.
        scheduler: from the optimizer to a scheduler, where there is one.
        interval: step or epoch, when the scheduler moves.
        length: name of the scheduler's argument that takes the run's number of intervals.
        seed: of dropout and augmentation.
        augment: from images (B, 1, 28, 28) of training and their labels (B,) to what the network sees.
        label_smoothing: the fraction of each label that training's loss spreads over all classes.

    Attributes:
        history: a row of figures for each epoch that has ended.
        first_step, last_step: when the first batch was begun here and the last step had ended, time.perf_counter().
    """

    def __init__(
        self,
        network: ConvNet,
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = torch.optim.Adam,
        scheduler: Callable[..., Any] | None = None,
        interval: str = "epoch",
        length: str | None = None,
        seed: int = 1,
        augment: Callable[[Tensor, Tensor], Tensor] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.network = network
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.interval, self.length = interval, length
        self.seed, self.augment, self.label_smoothing = seed, augment, label_smoothing
        self.history: list[EpochRow] = []
        self.first_step = self.last_step = 0.0
        self._training_sums, self._validation_sums = EpochSums(), EpochSums()
        self._validated: EpochRow = {}  # the last validation's figures in this epoch
        self._unfinished: dict[str, Any] | None = None  # from a checkpoint within an epoch
        self._graph: StepGraph | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 (N, 1, 28, 28) to logits (N, classes)."""
        return self.network(images)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes forty times a step which hook runs. A module's own way to set an attribute looks each time
        # whether it is a parameter or a buffer, which text in the place of text is not.
        if isinstance(value, str | None) and name in self.__dict__:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    # --- steps ---------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if not self.first_step:  # an attribute of a module takes as long to set as all else in here
            self.first_step = time.perf_counter()
        # A rank other than 0 draws its own numbers; rank 0 draws those of a single process.
        number = (self.seed * 1_000_003 + self.current_epoch) * 1_000_003 + batch_idx + self.global_rank * 2**40
        torch.default_generator.manual_seed(number % 2**63)
        if self.device.type != "cpu":
            getattr(torch, self.device.type).manual_seed(number % 2**63)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels, *weight = batch  # the weight: see DigitLoader
        graph = None if torch.compiler.is_compiling() else self._graph
        loss, logits = (graph or self.loss_of)(images, labels)
        self._count(loss.detach(), logits.detach(), labels, *weight)
        return loss * weight[0] if weight else loss

    def loss_of(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss () of images (B, 1, 28, 28) and labels (B,) in training, and the logits (B, classes)."""
        if self.augment is not None:
            images = self.augment(images, labels)
        logits = self.network(images)
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing), logits

    def backward(self, loss: Tensor, *arguments: Any, **options: Any) -> None:
        if self._graph is None or loss.requires_grad:
            super().backward(loss, *arguments, **options)
        else:  # a graph found this loss, and the gradients with it
            self._graph.backward()

    @torch.compiler.disable  # counting is no part of a compiled step
    def _count(self, loss: Tensor, logits: Tensor, labels: Tensor, weight: float = 1.0) -> None:
        if self.device.type == "cpu" and not math.isfinite(loss.item()):  # on another device this would wait
            raise NotFiniteError(f"the loss of step {self.global_step + 1:,} is not finite, {self._rate()}: {REMEDY}")
        if weight:
            self._training_sums.add(loss, logits, labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels, *weight = batch
        if not weight or weight[0]:
            logits = self.network(images)
            self._validation_sums.add(F.cross_entropy(logits, labels), logits, labels)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Images uint8 (B, 1, 28, 28), alone or with labels, to probabilities (B, classes)."""
        return torch.softmax(self.network(batch if isinstance(batch, Tensor) else batch[0]), dim=1)

    # --- epochs --------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        if self._unfinished is not None:  # Lightning goes on within the epoch: on_train_epoch_start is not called
            self._begin_epoch()

    def _step_graph(self) -> StepGraph | None:
        """That of the next epoch's steps, where they may have one: a new one where a callback has changed them."""
        ours = type(self) is DigitClassifier and isinstance(self.augment, Augment | None)
        if self.device.type != "cuda" or not ours or not may_be_graphed(self.network, self.trainer):
            return None
        form = (self.label_smoothing, self.augment, *form_of(self.network))
        if self._graph is not None and self._graph.form == form:
            return self._graph
        return StepGraph(self.network, self.loss_of, form)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_graph": None}  # a copy makes its own

    def on_fit_start(self) -> None:
        self._graph = None  # of a fit that an error ended

    def on_train_end(self) -> None:
        self._graph = None  # and its memory

    def on_train_epoch_start(self) -> None:
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        if not any(parameter.requires_grad for parameter in self.network.blocks.parameters()):
            self.network.blocks.eval()  # frozen: neither dropout nor batch norm's statistics move
        self._graph = self._step_graph()
        self._validated = {}
        self._training_sums.reset()
        self.started, self.rate = time.perf_counter(), self.trainer.optimizers[0].param_groups[0]["lr"]
        if self._unfinished is not None:
            self._training_sums.load_state_dict(self._unfinished)
            self.started -= self._unfinished["seconds"]
            self.rate, self._validated = self._unfinished["rate"], dict(self._unfinished["validated"])
            self._unfinished = None

    def running(self) -> tuple[float, float]:
        """Mean loss and accuracy of the epoch's training digits so far."""
        figures = self._training_sums.figures("train")
        return figures["train/loss"], figures["train/accuracy"]

    def on_validation_epoch_start(self) -> None:
        self._end_of_steps()
        self._validation_sums.reset()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        self._validated = self._summed(self._validation_sums).figures("val")
        self.log_dict(self._validated)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self._summed(self._validation_sums).figures("test"))

    def on_train_epoch_end(self) -> None:
        if not self._training_sums.seen:  # with max_steps Lightning ends an epoch again when it resumes after it
            return
        if not self._validated:
            self._end_of_steps()
        self.require_finite()
        trained = self._summed(self._training_sums).figures("train")
        self.log_dict({**trained, "learning_rate": self.rate})
        self.history.append(
            {
                "epoch": self.current_epoch + 1,
                "step": self.global_step,
                **trained,
                **self._validated,
                "learning_rate": self.rate,
                "seconds": time.perf_counter() - self.started,
            }
        )
        self._training_sums.reset()

    def _summed(self, sums: EpochSums) -> EpochSums:
        return sums if self.trainer.world_size == 1 else sums.summed(self.trainer.strategy, self.device)

    def _end_of_steps(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.last_step = time.perf_counter()

    def require_finite(self) -> None:
        """Before a checkpoint is written: it must be one to continue from.

        Raises:
            NotFiniteError: a weight or a loss is not finite.
        """
        figures = [*self._training_sums.figures("train").values(), *self._validated.values()]
        if not all(map(math.isfinite, figures)) or not all(p.isfinite().all() for p in self.network.parameters()):
            raise NotFiniteError(
                f"the loss or a weight is not finite after step {self.global_step:,}, {self._rate()}: {REMEDY}"
            )

    def _rate(self) -> str:
        return f"at learning rate {self.trainer.optimizers[0].param_groups[0]['lr']:g}"

    # --- optimizer and checkpoint --------------------------------------------------------------------------------

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: Any, *_: Any, modules: Iterable[str] = (), **settings: Any
    ) -> DigitClassifier:
        """The module of a checkpoint that a run or any Trainer wrote; `settings` are arguments beside the network.

        `modules` are Python modules of your own that layers of the network come from.

        Raises:
            UserError: the file is no whole checkpoint of this package.
        """
        trust(modules)
        return cls(rebuild(checkpoint_path)[0], **settings)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.make_optimizer([p for p in self.network.parameters() if p.requires_grad])
        if self.make_scheduler is None:
            return optimizer
        intervals = self._steps() if self.interval == "step" else self.trainer.max_epochs or 1
        scheduler = self.make_scheduler(optimizer, **({self.length: intervals} if self.length else {}))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}

    def _steps(self) -> int:
        """The run's optimizer steps."""
        trainer: Any = self.trainer
        if not isinstance(trainer.datamodule, MNISTDataModule):
            return int(trainer.estimated_stepping_batches)
        # That property would set up the loader before Lightning has read the loader's state from a checkpoint.
        batches = len(trainer.datamodule.train_dataloader())
        limit = trainer.overfit_batches or trainer.limit_train_batches
        batches = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
        steps = math.ceil(batches / trainer.accumulate_grad_batches) * (trainer.max_epochs or 1)
        return max(1, steps if trainer.max_steps < 0 else min(steps, trainer.max_steps))

    def description(self) -> dict[str, Any]:
        """What rebuilds the network, and which digits it saw, as numbers, strings, lists and dicts only."""
        classes = [str(number) for number in range(self.network.logits.out_features)]
        seen: dict[str, Any] = {"name": "mnist", "validation": 0, "validation_from": "last"}
        seen |= {"normalization": "unit", "seed": self.seed}
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, MNISTDataModule):
            classes = list(data.classes)
            seen |= {"name": data.data_name, "validation": data.validation_size, "seed": data.seed}
            seen |= {"validation_from": data.validation_from, "normalization": data.normalization}
            seen |= {"test": data.test_fraction}
        return {
            "format": FORMAT,
            "architecture": self.network.specification.model_dump(),
            "classes": classes,
            "data": seen,
            "versions": versions(),
            "history": [dict(row) for row in self.history],
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mnist_cnn"] = self.description()
        if self._training_sums.seen:
            checkpoint["unfinished_epoch"] = {
                **self._summed(self._training_sums).state_dict(),
                "rate": self.rate,
                "seconds": time.perf_counter() - self.started,
                "validated": dict(self._validated),
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = [dict(row) for row in checkpoint["mnist_cnn"]["history"]]
        # Of several ranks, the first takes the sums of all.
        self._unfinished = checkpoint.get("unfinished_epoch")
        if self._unfinished is not None and self.global_rank > 0:
            self._unfinished = {**self._unfinished, **EpochSums().state_dict()}

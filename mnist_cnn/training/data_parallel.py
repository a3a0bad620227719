"""Data parallel training on Lightning's engine: a batch is cut among the ranks, and all make the whole batch's step.

Lightning's DDP wraps the module, and reduces one backward pass a training step. Here a training step is a stretch of
several optimizer steps, so `SharedClassifier` reduces the gradients itself: flat, in one all-reduce a step, which the
batch's loss and count of correct digits go with, and what a rank wants of the others.
"""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch import distributed as dist

from mnist_cnn.inference.classifier import Classifier, load_classifier
from mnist_cnn.training.module import Batch, DigitClassifier, _batches
from mnist_cnn.training.ranks import Group, outside

SEEDS_BETWEEN_RANKS = 0x9E3779B1  # odd: torch's generator on a CPU takes the lower 32 bits of a seed


class Ranks(DDPStrategy):
    """Lightning's DDP over ranks that are there already, and without its wrapper around the module."""

    def __init__(self, group: Group) -> None:
        environment: ClusterEnvironment = LightningEnvironment()
        if outside():
            elastic = TorchElasticEnvironment.detect()
            environment = TorchElasticEnvironment() if elastic else SLURMEnvironment(auto_requeue=False)
        super().__init__(cluster_environment=environment)
        self.group = group

    def _configure_launcher(self) -> None:
        self._launcher = None

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        dist.init_process_group(
            self._get_process_group_backend(),
            store=dist.PrefixStore(f"collectives {self.group.job}", self.group.store),
            rank=self.group.rank,
            world_size=self.group.size,
            timeout=self._timeout,
            device_id=self.root_device if self.root_device.type == "cuda" else None,
        )

    def configure_ddp(self) -> None:
        """Every rank begins with rank 0's weights, which may come from a checkpoint that it alone can read."""
        assert self.model is not None
        state = {name: value.cpu() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.broadcast(state))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """As rank 0 reads it: the other ranks may be on machines that do not have the run's folder."""
        first = self.is_global_zero
        content = super().load_checkpoint(checkpoint_path, weights_only=weights_only) if first else {}
        return self.broadcast(content)


def quiet_signals(trainer: pl.Trainer) -> None:
    """Lightning's handler of SIGTERM would broadcast amid other collectives; here the next all-reduce carries it."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


class SharedClassifier(DigitClassifier):
    """`DigitClassifier` on one of several ranks: each has a share of every batch, all make the same step.

    The sums of training are of all ranks at every step. Batch norm normalises by its rank's share. `stopping` is what
    the ranks have agreed on; setting it is a wish, of which the others learn with the next step.
    """

    _wish, _agreed = 0, 0
    _overdue, _due = False, False

    @property
    def stopping(self) -> int:
        return self._agreed

    @stopping.setter
    def stopping(self, signum: int) -> None:
        self._wish = signum

    def due(self, overdue: bool) -> bool:
        """Whether the ranks have agreed to write a checkpoint; where one is overdue, they do so at the next step."""
        due, self._due = self._due, False
        self._overdue = overdue and not due
        return due

    def _wishes(self) -> list[float]:
        return [float(self._wish == signal.SIGINT), float(self._wish == signal.SIGTERM), float(self._overdue)]

    def _agree(self, wishes: Tensor) -> None:
        interrupts, terminations, overdue = wishes.tolist()
        self._agreed = signal.SIGINT if interrupts else signal.SIGTERM if terminations else 0
        self._due = overdue > 0

    def agree(self) -> None:
        """Ask all ranks what they wish, without a step."""
        wishes = torch.tensor(self._wishes(), device=self.trainer.strategy.root_device)
        dist.all_reduce(wishes)
        self._agree(wishes)

    # --- the step ------------------------------------------------------------------------------------------

    def training_step(self, stretch: Batch | tuple[Batch, ...], index: int) -> None:
        """Several optimizer steps, as in one process; a rank may have no digit of a short last batch."""
        schedule = self.lr_schedulers() if self.interval == "step" else None
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        optimizer: Any = self.optimizers(use_pl_optimizer=scaled)
        counted = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        backward = self.manual_backward if scaled else Tensor.backward
        totals: list[Tensor] = []
        rates: list[float] = []
        for images, labels in _batches(stretch):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            loss, correct = torch.zeros((2, 1), device=self.device)
            if len(labels):
                loss, logits = self.loss_of(images, labels)
                backward(loss)
                correct = (logits.detach().argmax(1) == labels).sum()
            totals.append(self._together(loss.detach(), correct, len(labels)))
            optimizer.step()
            if not scaled:
                counted.increment_ready()
                counted.increment_completed()
            torch.clear_autocast_cache()
            if schedule is not None:
                schedule.step()  # type: ignore[union-attr]
            if self.device.type == "cpu" and totals[-1][3:5].any():
                break
        self.position += len(totals)
        self._take(totals, rates)

    def _together(self, loss: Tensor, correct: Tensor, count: int) -> Tensor:
        """Make the gradients of this rank's mean loss those of the whole batch's, whatever each rank's share.

        Batch norm's statistics become the mean of the ranks'.

        Returns float32 (6,), the same on all ranks: the batch's sum of losses, its correct digits, its digits, and how
        many ranks wish to stop for SIGINT, to stop for SIGTERM, and to write a checkpoint.
        """
        weights = [weight for weight in self.network.parameters() if weight.requires_grad]
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        gradients: list[Any] = [weight.grad for weight in weights]
        norms = [module for module in self.network.modules() if isinstance(module, nn.BatchNorm2d)]
        running: list[Any] = [part for norm in norms if norm.training for part in (norm.running_mean, norm.running_var)]
        sizes = [part.numel() for part in (*gradients, *running)]
        figures = torch.stack([loss.view(()) * count, correct.view(()).to(loss.dtype)])
        others = torch.tensor([count, *self._wishes()], device=self.device)
        flat = torch.cat([*(part.flatten() for part in (*gradients, *running)), figures, others])
        slopes = flat[: sum(sizes[: len(gradients)])]
        slopes.mul_(count)
        dist.all_reduce(flat)
        *means, totals = flat.split([*sizes, 6])
        slopes.div_(totals[2])
        means = [mean.view(like.shape) for mean, like in zip(means, (*gradients, *running), strict=True)]
        torch._foreach_copy_(gradients, means[: len(gradients)])
        for part, total in zip(running, means[len(gradients) :], strict=True):
            part.copy_(total / self.trainer.world_size)
        return totals.clone()

    def _take(self, totals: list[Tensor], rates: list[float]) -> None:
        """Add a stretch's figures to the sums; the ranks learn each other's wishes."""
        if not totals:
            return
        sums = torch.stack(totals).double()  # (steps, 6)
        self.loss_sum = torch.cat([self.loss_sum[None], sums[:, 0]]).cumsum(0)[-1]
        self.correct += sums[:, 1].sum().long()
        self.seen += int(sums[:, 2].sum())
        self._agree(sums[:, 3:].sum(0))
        if self.device.type == "cpu" and not self.loss_sum.isfinite():
            self._refuse(list(sums[:, 0]), rates)

    def validation_step(self, stretch: Batch | tuple[Batch, ...], index: int) -> None:
        super().validation_step(tuple(batch for batch in _batches(stretch) if len(batch[1])), index)
        self.agree()

    test_step = validation_step

    def _gather(self) -> None:
        """The sums of all ranks, in float64, which counts digits exactly."""
        sums = torch.stack([self.loss_sum, self.correct.double(), torch.full_like(self.loss_sum, self.seen)])
        dist.all_reduce(sums)
        self.loss_sum, self.correct, self.seen = sums[0], sums[1].long(), int(sums[2])

    # --- epochs --------------------------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        so_far = self.continued
        super().on_train_epoch_start()
        states = so_far["ranks"] if so_far and len(so_far.get("ranks", ())) == self.trainer.world_size else []
        if states:
            state = states[self.global_rank]
            torch.set_rng_state(state["random"])
            if "cuda_random" in state and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_random"], self.device)
        elif self.global_rank > 0:  # rank 0 goes on as one process would
            seed = self.seed * 1_000_003 + self.current_epoch + self.position * 7_368_787
            torch.manual_seed(seed + self.global_rank * SEEDS_BETWEEN_RANKS)

    def so_far(self) -> dict[str, Any]:
        """As in one process, and each rank's random states."""
        state = super().so_far()
        own = {key: value for key, value in state.items() if key in ("random", "cuda_random")}
        states: list[Any] = [None] * self.trainer.world_size
        dist.all_gather_object(states, own)
        return {**state, "ranks": states}

    def on_validation_epoch_end(self) -> None:
        self._gather()
        super().on_validation_epoch_end()

    def on_test_epoch_end(self) -> None:
        self._gather()
        super().on_test_epoch_end()


def shared_logits(
    checkpoint: Path, images: Tensor, device: str, views: Literal[1, 5, 9], group: Group
) -> tuple[Classifier, Tensor]:
    """A checkpoint that rank 0 can read as a `Classifier`, and its logits of images uint8 (N, 1, 28, 28).

    Each rank does its share of the images, and each has the logits float32 (N, classes) of all.
    """
    content = [checkpoint.read_bytes() if group.rank == 0 else b""]
    dist.broadcast_object_list(content)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, checkpoint.name)
        copy.write_bytes(content[0])
        classifier = load_classifier(copy, device, views)
    first, last = (len(images) * rank // group.size for rank in (group.rank, group.rank + 1))
    logits = torch.zeros(len(images), len(classifier.classes), device=device)
    logits[first:last] = classifier.logits(images[first:last]).to(device)
    dist.all_reduce(logits)  # a sum with zeros: exact
    return classifier, logits.cpu()

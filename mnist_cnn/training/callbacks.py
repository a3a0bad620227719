"""Lightning's callbacks and plugins of a run: checkpoints that are whole, the user's callbacks, progress."""

from __future__ import annotations

import logging
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.profilers import PassThroughProfiler
from torch import Tensor
from tqdm import tqdm

from mnist_cnn.config.schema import UserError, nearest
from mnist_cnn.config.settings import Train
from mnist_cnn.models.checkpoint import network_of, read_checkpoint, save
from mnist_cnn.runs.files import write_csv, write_whole
from mnist_cnn.training.module import DigitClassifier, EpochRow
from mnist_cnn.training.optimizers import instantiate
from mnist_cnn.training.signals import Stopped, StopRequest

log = logging.getLogger(__name__)

BEST, LAST = "best.ckpt", "last.ckpt"
NEEDED = {"optimizer_states", "lr_schedulers", "callbacks", "loops", "epoch", "global_step"}
AVERAGED = {"current_model_state", "averaging_state"}  # where the weights are averaged
SECONDS_BETWEEN_UPDATES = 0.2  # of the bar


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, each whole and on the disk under its name, or not there at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(Path(path), checkpoint)


class Unprofiled(PassThroughProfiler):
    """Lightning's profiler that does nothing, without a generator for each of some thirty actions a step."""

    nothing = nullcontext()

    def profile(self, action_name: str) -> Any:
        return self.nothing


# --- checkpoints ---------------------------------------------------------------------------------------------


class BestCheckpoint(ModelCheckpoint):
    """best.ckpt at each epoch's end where `monitor` is as high as ever; without one, at each epoch's end.

    Of epochs that are equally good the last is kept: with a hundred validation digits there are many.

    Its state is the best score alone: Lightning's has absolute paths, and a run that was moved would lose the score.
    """

    state_key = BEST  # Lightning asks for it several times a step, and would put it together anew

    def __init__(self, folder: Path, monitor: str | None) -> None:
        super().__init__(
            folder / "checkpoints",
            Path(BEST).stem,
            monitor=monitor,
            mode="max",
            every_n_epochs=1,
            save_on_train_epoch_end=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        best = self.best_model_score
        return current is not None and (best is None or bool(current >= best))

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best_model_score if self.monitor else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["best"] is not None:
            path = str(Path(self.dirpath or "", BEST))
            self.best_model_score = self.kth_value = state_dict["best"]
            self.best_model_path = self.kth_best_model_path = path
            self.best_k_models = {path: state_dict["best"]}


class LastCheckpoint(ModelCheckpoint):
    """last.ckpt and metrics.csv at each epoch's end; last.ckpt within an epoch too, every so many seconds.

    Where a signal asks for it, the run ends after that. At an epoch's last step it waits for the epoch's end, so that
    no checkpoint stands between training and validation.
    """

    state_key = LAST

    def __init__(self, folder: Path, seconds: float, stop: StopRequest, epochs: int) -> None:
        self.folder, self.seconds, self.stop, self.epochs = folder, seconds, stop, epochs
        self.saved = time.monotonic()
        super().__init__(
            folder / "checkpoints",
            Path(LAST).stem,
            every_n_epochs=1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.saved = time.monotonic()
        self.stop.install()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        between_steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0  # no gradients wait for others
        epoch_ends = trainer.is_last_batch or trainer.global_step == trainer.max_steps
        if epoch_ends or _is_dev_run(trainer) or not between_steps:
            return
        due = bool(self.stop.signum) or time.monotonic() - self.saved > self.seconds
        if not _any_rank(trainer, due):
            return
        assert isinstance(module, DigitClassifier)
        module.require_finite()
        trainer.save_checkpoint(self.folder / "checkpoints" / LAST)
        self._end_of_save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if _is_dev_run(trainer):
            return
        assert isinstance(module, DigitClassifier)
        if trainer.is_global_zero:
            write_csv(self.folder / "metrics.csv", module.history)
            log.info("%s", epoch_line(module.history[-1], self.epochs))
        super().on_train_epoch_end(trainer, module)
        self._end_of_save(trainer)

    def _end_of_save(self, trainer: pl.Trainer) -> None:
        self.saved = time.monotonic()
        if _any_rank(trainer, bool(self.stop.signum)):
            raise Stopped(self.stop.signum or signal.SIGTERM)


def _is_dev_run(trainer: Any) -> bool:
    return bool(trainer.fast_dev_run)


def _any_rank(trainer: pl.Trainer, wish: bool) -> bool:
    return wish if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(wish, all=False)


def find_last_checkpoint(folder: Path, config: Train, classes: list[str]) -> Path | None:
    """The newest checkpoint of a run from which it can go on; None where it begins again.

    Raises:
        UserError: it is of another network, other data or another seed than `config`, which someone has changed; or of
            other classes than the data have now.
    """
    for name in (LAST, BEST):
        path = folder / "checkpoints" / name
        if not path.exists():
            continue
        needed = NEEDED | AVERAGED if config.ema_decay else NEEDED
        try:
            content, description = read_checkpoint(path)
            if missing := needed - content.keys():
                raise UserError(f"{path} has no {', '.join(sorted(missing))} to continue from")
            for weights in ("state_dict", "current_model_state") if config.ema_decay else ("state_dict",):
                network_of(path, description, content[weights])
        except UserError as error:
            log.warning("warning: %s", error)
            continue
        settings = config.model_dump()
        theirs = {"architecture": description.architecture.model_dump(), **description.data.model_dump()}
        ours = {**settings["data"], "architecture": settings["architecture"], "seed": settings["seed"]}
        if differing := [key for key, value in theirs.items() if value != ours[key]]:
            raise UserError(f"{folder / 'config.yaml'} was changed: its {', '.join(differing)} is not that of {path}")
        if description.classes != classes:
            had, have = (", ".join(names) for names in (description.classes, classes))
            raise UserError(f"{folder} was trained on the classes {had:.200}; the data have {have:.200} now")
        if name != LAST:
            log.warning("warning: continuing from %s, which is older", path)
            write_whole(folder / "checkpoints" / LAST, path.read_bytes())  # no epoch may follow that would write it
        return path
    log.warning("warning: %s has no whole checkpoint: it begins again", folder)
    return None


# --- the user's own ------------------------------------------------------------------------------------------


def user_callbacks(config: Train, validated: bool) -> list[pl.Callback]:
    """Those that the configuration names.

    Raises:
        UserError: one cannot be made, is none of Lightning's, or watches a figure that a run does not log.
    """
    callbacks = {name: instantiate(each, f"callbacks.{name}") for name, each in config.callbacks.items()}
    parts = ("train", "val") if validated else ("train",)
    logged = [*(f"{part}/{figure}" for part in parts for figure in ("loss", "accuracy")), "learning_rate"]
    for name, each in callbacks.items():
        if not isinstance(each, pl.Callback):
            raise UserError(f"callbacks.{name}: a {type(each).__name__} is no callback of Lightning's")
        if isinstance(each, EarlyStopping) and each.strict and each.monitor not in logged:
            raise UserError(
                f"callbacks.{name}.monitor={each.monitor}: this run does not log it{nearest(each.monitor, logged)} "
                f"(there are {', '.join(logged)})"
            )
    return list(callbacks.values())


# --- progress ------------------------------------------------------------------------------------------------


class ProgressBar(pl.Callback):
    """A bar with the running loss and accuracy of the epoch, drawn a few times a second only.

    Lightning's own bar would stay on the line on which an epoch's figures are printed.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.bar = tqdm(disable=True)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        if self.bar.disable:
            title = f"epoch {trainer.current_epoch + 1}/{self.epochs}"
            total = trainer.num_training_batches
            self.bar = tqdm(total=total, initial=index, desc=title, unit="batch", leave=False)
            self.drawn = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        now = time.monotonic()
        if now - self.drawn > SECONDS_BETWEEN_UPDATES:
            self.drawn = now
            assert isinstance(module, DigitClassifier)
            loss, accuracy = module.running()
            self.bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2%}", refresh=False)
            self.bar.update(index + 1 - self.bar.n)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.bar.close()

    def on_exception(self, *_: Any) -> None:
        self.bar.close()


def progress_bars(epochs: int) -> list[pl.Callback]:
    """A bar on a terminal; elsewhere the line an epoch is all."""
    return [ProgressBar(epochs)] if sys.stderr.isatty() else []


def epoch_line(row: EpochRow, epochs: int) -> str:
    line = f"epoch {row['epoch']:.0f}/{epochs}  loss {row['train/loss']:.4f}  accuracy {row['train/accuracy']:.2%}"
    if "val/loss" in row:
        line += f"  validation loss {row['val/loss']:.4f}  accuracy {row['val/accuracy']:.2%}"
    return f"{line}  {row['seconds']:.1f} s"

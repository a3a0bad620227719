"""What a run keeps while it goes, so that after a crash it goes on: whole checkpoints, one process, clear failures."""

from __future__ import annotations

import copy
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException
from pytorch_lightning.utilities.memory import is_oom_error

from mnist_cnn.config.schema import RunError, UserError
from mnist_cnn.config.settings import Train
from mnist_cnn.models.checkpoint import network_of, read_checkpoint, save
from mnist_cnn.models.convnet import ConvNet
from mnist_cnn.runs.worker import elsewhere
from mnist_cnn.training.module import DigitClassifier

log = logging.getLogger(__name__)

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"
NEEDED = {"optimizer_states", "lr_schedulers", "callbacks", "loops", "epoch", "global_step"}
AVERAGED = {"current_model_state", "averaging_state"}  # where the weights are averaged
QUEUE_SIGNALS = [getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
STEPS = "epoch_loop.manual_optimization.optim_step_progress"  # Lightning's count of optimizer steps


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints, each written whole or not at all; last.ckpt leaves the one before as previous.ckpt."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        if path.name != LAST or not path.exists():
            return save(path, checkpoint)
        new = path.with_name("new.ckpt")
        save(new, checkpoint)
        path.replace(path.with_name(PREVIOUS))
        new.replace(path)
        return None


class Stopped(BaseException):
    """SIGINT or SIGTERM came; what a run had to save is saved."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


class Checkpoints(Checkpoint):
    """best.ckpt where an epoch is better than all before, or at each without a `monitor`; last.ckpt at every one's end.

    last.ckpt is also written after so many `seconds` and when the classifier is stopping, within an epoch. To Lightning
    such a checkpoint is of the end of the epoch before: its own way back into an epoch restores no random states and
    begins the epoch's order anew. What the epoch has done so far stands beside it, and the classifier takes it up.

    Lightning's ModelCheckpoint leaves last.ckpt as it is at an epoch that is not the best, and remembers absolute
    paths, which a run that was moved no longer has.
    """

    def __init__(self, folder: Path, monitor: str | None, seconds: float) -> None:
        self.folder, self.monitor, self.seconds = folder, monitor, seconds
        self.best: float | None = None
        self.loops: dict[str, Any] | None = None  # Lightning's own counts at the end of the epoch before
        self.saved = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_fit_start(self, trainer: pl.Trainer, classifier: pl.LightningModule) -> None:
        self.loops = self.loops or copy.deepcopy(trainer.fit_loop.state_dict())
        self.saved = time.monotonic()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, classifier: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        assert isinstance(classifier, DigitClassifier)
        assert self.loops is not None
        now = checkpoint["loops"]["fit_loop"]
        if classifier.position == 0:
            self.loops = copy.deepcopy(now)
        else:
            steps = {STEPS: copy.deepcopy(now[STEPS])}
            checkpoint["loops"] = {"fit_loop": {**self.loops, **steps}}
            checkpoint["epoch_so_far"] = classifier.so_far()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, classifier: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.loops = copy.deepcopy(checkpoint["loops"]["fit_loop"])

    def on_train_batch_end(self, trainer: pl.Trainer, classifier: pl.LightningModule, *_: Any) -> None:
        assert isinstance(classifier, DigitClassifier)
        if classifier.stopping or classifier.due(time.monotonic() - self.saved > self.seconds):
            classifier.require_finite()
            self.save(trainer, LAST)
        if classifier.stopping:
            raise Stopped(classifier.stopping)

    def on_validation_batch_end(self, trainer: pl.Trainer, classifier: pl.LightningModule, *_: Any) -> None:
        assert isinstance(classifier, DigitClassifier)
        if classifier.stopping:
            self.on_train_batch_end(trainer, classifier)

    def on_train_epoch_end(self, trainer: pl.Trainer, classifier: pl.LightningModule) -> None:
        score = float(trainer.callback_metrics[self.monitor]) if self.monitor else None
        if score is None or self.best is None or score > self.best:
            self.best = score
            self.save(trainer, BEST)
        self.save(trainer, LAST)

    def save(self, trainer: pl.Trainer, name: str) -> None:
        trainer.save_checkpoint(self.folder / name)
        self.saved = time.monotonic()


@contextmanager
def stoppable(folder: Path) -> Iterator[list[DigitClassifier]]:
    """SIGINT and SIGTERM end the run with the line that continues it, and status 130 or 143.

    A classifier in the list that is given finishes its step, and its checkpoint is written; a second signal ends the
    process at once. SIGUSR1 and SIGUSR2 are dealt with in the same way where something handles them, as submitit does
    to queue the job anew: it is handed the signal once the checkpoint is written.
    """
    training: list[DigitClassifier] = []

    def stop(signum: int, _: Any) -> None:
        for number in signals:
            signal.signal(number, before[number] if number in handed_on else signal.SIG_DFL)
        if not training:
            raise Stopped(signum)
        training[0].stopping = signum

    ours = threading.current_thread() is threading.main_thread()
    handed_on = [number for number in QUEUE_SIGNALS if ours and callable(signal.getsignal(number))]
    terminal = [] if elsewhere() else [signal.SIGINT]  # a sweep's own process passes it on
    signals = [*terminal, signal.SIGTERM, *handed_on] if ours else []
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield training
    except (Stopped, SIGTERMException) as stopped:  # the second one is Lightning's, after an epoch's end
        signum = stopped.signum if isinstance(stopped, Stopped) else signal.SIGTERM
        how = (
            f"continue with: mnist-train resume={folder}" if (folder / "config.yaml").exists() else "nothing was begun"
        )
        log.error("stopped by %s; %s", signal.Signals(signum).name, how)
        if callable(queue_anew := before[signum]) and signum in handed_on:
            queue_anew(signum, None)
        raise SystemExit(128 + signum) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_whole(folder: Path, config: Train) -> tuple[Path, float] | None:
    """The newest checkpoint of a run that is whole, and the seconds until it; None where the run begins again.

    Raises:
        UserError: it is of another network, other data or another seed than `config`, which someone has changed.
    """
    for name in (LAST, PREVIOUS, BEST):
        path = folder / "checkpoints" / name
        if not path.exists():
            continue
        try:
            content, description = read_checkpoint(path)
            if missing := (NEEDED | AVERAGED if config.averaging else NEEDED) - content.keys():
                raise UserError(f"{path} has no {', '.join(sorted(missing))} to continue from")
            for weights in ("state_dict", "current_model_state") if config.averaging else ("state_dict",):
                network_of(path, description, content[weights])
        except UserError as error:
            log.warning("warning: %s", error)
            continue
        settings = config.model_dump()
        theirs = {"architecture": description.architecture.model_dump(), **description.data.model_dump()}
        ours = {**settings["data"], "architecture": settings["architecture"], "seed": settings["seed"]}
        if differing := [key for key, value in theirs.items() if value != ours[key]]:
            raise UserError(f"{folder / 'config.yaml'} was changed: its {', '.join(differing)} is not that of {path}")
        if name != LAST:
            log.warning("warning: continuing from %s, which is older", path)
        seconds = sum(row["seconds"] for row in description.history)
        return path, seconds + content.get("epoch_so_far", {}).get("seconds", 0.0)
    log.warning("warning: %s has no whole checkpoint: it begins again", folder)
    return None


@contextmanager
def failing_clearly(folder: Path, config: Train, network: ConvNet) -> Iterator[None]:
    """What goes wrong while a network trains in the user's words.

    Raises:
        RunError: the disk is full, the folder is gone, or the memory does not suffice.
    """
    try:
        yield
    except OSError as error:
        reason = f"{error.filename or folder}: {error.strerror or error}"
        kept = [name for name in (LAST, PREVIOUS) if (folder / "checkpoints" / name).exists()]
        remedy = f"its last checkpoint is whole; mend this, then continue with: mnist-train resume={folder}"
        raise RunError(f"{reason}; {remedy if kept else 'no checkpoint was written yet'}") from None
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or is_oom_error(error)):
            raise
        layers = [f"{block.filters}@{block.kernel}×{block.kernel}" for block in config.architecture.blocks]
        layers += [str(dense.units) for dense in config.architecture.dense]
        raise RunError(
            f"out of memory with data.batch_size={config.data.batch_size} and a network of "
            f"{network.parameter_count():,} parameters ({', '.join(layers)}); make one of them smaller"
        ) from None

"""The trials of a study: each a run of mnist-train in a folder of its own, and what became of it told to the study."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial, TrialState

from mnist_cnn.config.parameters import Sweep
from mnist_cnn.config.schema import RunError, UserError
from mnist_cnn.runs.folder import write_whole
from mnist_cnn.runs.jobs import claim
from mnist_cnn.search.space import Space, compose
from mnist_cnn.search.storage import StorageError
from mnist_cnn.search.study import SharedStudy, TakenError

log = logging.getLogger("mnist-sweep")
package = logging.getLogger("mnist_cnn")

PARENT = "MNIST_CNN_SWEEP"  # in the environment of a local worker: the process that began it
WORKER = f"{socket.gethostname()}:{os.getpid()}"
SECONDS_BETWEEN_LOOKS = 1.0  # at a study whose last trials others run


class Stop(threading.Event):
    """Set by SIGINT or SIGTERM; a second one ends the process at once."""

    signum = 0

    def __call__(self, signum: int, _: Any = None) -> None:
        self.signum = signum
        self.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def stopped_by_signals() -> Iterator[Stop]:
    stop = Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def logged(folder: Path) -> Iterator[None]:
    """What mnist-train prints goes to the trial's train.log, and not to the terminal."""
    handler = logging.FileHandler(folder / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package.addHandler(handler)
    package.propagate = False
    try:
        yield
    finally:
        package.propagate = True
        package.removeHandler(handler)
        handler.close()


class Worker:
    """Runs trials until the study has all of them.

    Args:
        shared: the study.
        space: what it searches.
        settings: of the command.
        stop: ends it, with the trial that it is in saved and given back.
        look: called at each epoch's end, and with True after each trial: there is something to tell.
    """

    def __init__(
        self, shared: SharedStudy, space: Space, settings: Sweep, stop: Stop, look: Callable[[bool], None]
    ) -> None:
        self.shared, self.space, self.settings, self.stop, self.look = shared, space, settings, stop, look
        self.parent = int(os.environ.get(PARENT, "0"))  # a local worker ends with the command that began it

    def run(self) -> None:
        """Raises:
        UserError: no trial could run here: the data or the device.
        RunError: the disk or the storage fails.
        """
        self._try_out()
        while not self.stop.is_set():
            self._with_parent()
            trial, running = self.shared.storage.patiently(
                lambda: self.shared.claim(self.space, self.settings.trials, WORKER), self.stop
            )
            if trial is not None:
                with self.shared.beating(trial):
                    self._run(trial)
            elif not running:
                return
            else:
                self.stop.wait(SECONDS_BETWEEN_LOOKS)
            self.look(trial is not None)

    def _try_out(self) -> None:
        """The data are read, which the first trial then need not, and the device is there."""
        from mnist_cnn.data.datamodule import MNISTDataModule
        from mnist_cnn.models.checkpoint import check_precision, find_device

        check_precision(self.settings.accelerator.precision, find_device(self.settings.accelerator.name))
        MNISTDataModule(**self.settings.data.model_dump(), seed=self.settings.seed).setup()

    def _with_parent(self) -> None:
        if self.parent and os.getppid() != self.parent:
            os.kill(os.getpid(), signal.SIGTERM)

    def _run(self, trial: Trial) -> None:
        """Train, and tell how it ended."""
        about: dict[str, Any] = {}
        state, value = TrialState.FAIL, None
        stopped: BaseException | None = None
        try:
            metrics = self._train(trial)
            value, state = metrics[self.settings.metric], TrialState.COMPLETE
            about = {"epochs": metrics["epochs"], "seconds": metrics["fit_seconds"]}
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        except (TakenError, UpdateFinishedTrialError):
            return
        except (SystemExit, OSError) as error:
            about, stopped = {"interrupted": True}, error
        except Exception as error:
            if isinstance(error, RunError) and isinstance(error.__context__, OSError):
                about, stopped = {"interrupted": True}, error  # no fault of the trial's: the disk is full, or gone
            else:
                about = {"error": self._reason(trial, error)}
        try:
            self.shared.storage.patiently(lambda: self.shared.tell(trial, value, state, **about), self.stop)
        except TakenError:
            log.warning("trial %d was silent for too long: it runs again", trial.number)
        if isinstance(stopped, SystemExit):
            if not self.stop.is_set():  # the run's own handler had the signal
                self.stop(int(str(stopped.code)) - 128)
        elif stopped:
            raise stopped

    def _reason(self, trial: Trial, error: Exception) -> str:
        """In one line, in the trial's folder too; with the traceback in its log where no message foresaw it."""
        reason = " ".join(str(error).split())
        folder = self.shared.folder / trial.user_attrs["folder"]
        if not isinstance(error, UserError | RunError):
            reason = f"{type(error).__name__}: {reason}"
            with logged(folder):
                package.error("error", exc_info=error)
        write_whole(folder / "error.txt", reason + "\n")
        return reason

    def _new_folder(self, trial: Trial) -> Path:
        folder = claim(self.shared.folder / "trials" / f"{trial.number:04d}")
        name = str(folder.relative_to(self.shared.folder))
        self.shared.storage.patiently(lambda: trial.set_user_attr("folder", name), self.stop)
        return folder

    def _train(self, trial: Trial) -> dict[str, Any]:
        """mnist-train in the trial's folder: that of the killed trial which it runs again, or a new one."""
        given = self.shared.folder / trial.user_attrs.get("folder", "nowhere")
        continues = (given / "config.yaml").is_file()
        folder = given if continues else self._new_folder(trial)
        overrides = self.space.overrides(trial.params)
        self.shared.storage.patiently(lambda: trial.set_user_attr("overrides", overrides), self.stop)
        if self.stop.is_set():
            raise SystemExit(128 + self.stop.signum)
        from mnist_cnn.training.fit import fit

        settings, choices = compose(overrides, folder)
        watch = self._watch(trial)
        if continues:
            try:
                with logged(folder):
                    return fit(settings.model_copy(update={"resume": str(folder)}), folder, [], choices, watch)
            except UserError:  # such as: the worker that was silent is still in there
                folder = self._new_folder(trial)
                settings, choices = compose(overrides, folder)
        with logged(folder):
            return fit(settings, folder, overrides, choices, watch)

    def _watch(self, trial: Trial) -> Callable[[list[dict[str, float]]], None]:
        """What happens at an epoch's end: its figure is reported, and a bad trial pruned."""
        reported: set[int] = set()

        def watch(history: list[dict[str, float]]) -> None:
            try:
                for row in history:
                    epoch = int(row["epoch"])
                    if epoch not in reported:
                        trial.report(row[self.settings.metric], epoch)
                        reported.add(epoch)
                if trial.should_prune():
                    raise optuna.TrialPruned
            except UpdateFinishedTrialError:
                raise TakenError from None
            except StorageError:
                package.warning("warning: the storage does not answer: nothing is pruned at this epoch")
            self._with_parent()
            self.look(False)

        return watch

"""Who works on a study: a process that runs its trials, and the local processes of `workers=N`."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial, TrialState

from mnist_cnn.config.schema import RunError, UserError, printable
from mnist_cnn.config.study_settings import SweepSettings
from mnist_cnn.runs.command_line import override_key
from mnist_cnn.runs.files import write_whole
from mnist_cnn.runs.hydra_app import FILE_FORMAT, Printable
from mnist_cnn.runs.multirun import threads_of_job, visible_gpus
from mnist_cnn.search.space import Space, compose
from mnist_cnn.search.study import SharedStudy, is_surplus, storage_error

if TYPE_CHECKING:
    from pytorch_lightning import Callback

log = logging.getLogger("mnist-sweep")
package = logging.getLogger("mnist_cnn")

PARENT = "MNIST_CNN_SWEEP"  # in the environment of a local worker: the process that began it


class FailedTrial(Exception):  # noqa: N818
    """A trial is told as failed, and the others go on."""


class TrialLeft(BaseException):
    """Ends Optuna's loop without telling an end of the trial, which waits again or is another worker's by now."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error  # that ends the worker as well


class Stop(threading.Event):
    """Set by SIGINT or SIGTERM, by which the trial is saved and given back."""

    signum = 0

    def __call__(self, signum: int, _: Any = None) -> None:
        self.signum = signum
        self.set()
        for number in (signal.SIGINT, signal.SIGTERM):  # a second one ends the process at once
            signal.signal(number, signal.SIG_DFL)


class Worker:
    """Runs trials until the study has all of them.

    Args:
        shared: the study.
        space: what it searches.
        total: trials that the study is to have.
        stop: ends it, with the trial that it is in saved and given back.
        look: called after each trial: there is something to tell.
    """

    def __init__(self, shared: SharedStudy, space: Space, total: int, stop: Stop, look: Callable[[], None]) -> None:
        self.shared, self.space, self.total, self.stop, self.look = shared, space, total, stop, look
        self.beaten: set[int] = set()
        self.trial = 0  # the number of the last

    def run(self) -> None:
        """Raises:
        RunError: the disk or the storage fails.
        """
        while not self.stop.is_set():
            self.shared.repeat_killed()
            counts = self.shared.counts()
            try:
                if counts["waiting"]:
                    self.shared.study.optimize(self._objective, n_trials=1, catch=FailedTrial)
                elif counts["running"] or counts["killed"]:
                    self._beat_for_others()
                    self.stop.wait(1)
                else:
                    return
            except TrialLeft as left:
                if left.error:
                    raise left.error from None
            except (AssertionError, ValueError, UpdateFinishedTrialError):
                # Optuna's words where another process took the trial between its end and the telling of it.
                trials = self.shared.trials()
                if self.shared.states(trials)[self.trial] not in ("again", "killed"):
                    raise
            self.look()

    def _beat_for_others(self) -> None:
        """Record one heartbeat for each running trial: Optuna misses no worker that was killed before its first."""
        for trial in self.shared.trials():
            if trial.state == TrialState.RUNNING and trial.number not in self.beaten:
                self.beaten.add(trial.number)
                self.shared.storage.record_heartbeat(trial._trial_id)  # heartbeats know no public number

    def _objective(self, trial: Trial) -> float:
        shared, self.trial = self.shared, trial.number
        try:
            shared.seed_sampler(trial.number)
            parameters = self.space.suggest(trial)
            if is_surplus(shared.trials(), trial.number, self.total):
                trial.set_user_attr("surplus", True)
                raise FailedTrial
            metrics = self._train(trial, parameters)
            trial.set_user_attr("epochs", metrics["epochs"])
            return float(metrics[shared.metric])
        except (optuna.TrialPruned, FailedTrial):
            raise
        except UpdateFinishedTrialError:  # it was silent for too long, as a laptop that slept
            raise TrialLeft from None
        except SystemExit as error:
            self._give_back(trial)
            if not self.stop.is_set():  # the run's own handler had the signal
                self.stop(int(str(error.code)) - 128)
            raise TrialLeft from None
        except Exception as error:
            if storage_error(error):
                raise
            if isinstance(error, OSError) or (isinstance(error, RunError) and isinstance(error.__context__, OSError)):
                self._give_back(trial)  # no fault of the trial's: the disk is full, or gone
                raise TrialLeft(error) from None
            trial.set_user_attr("error", self._reason(trial, error))
            raise FailedTrial from None

    def _give_back(self, trial: Trial) -> None:
        """The trial waits again, under its number and with its folder; Optuna's tell knows ends only."""
        self.shared.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    def _reason(self, trial: Trial, error: Exception) -> str:
        """In one line, in the trial's folder too; with the traceback in its log where no message foresaw it."""
        reason = " ".join(str(error).split())
        if "folder" not in trial.user_attrs:  # such as a sampler that does not take the space
            return f"{type(error).__name__}: {reason}"
        folder = self.shared.folder / trial.user_attrs["folder"]
        if not isinstance(error, UserError | RunError):
            reason = f"{type(error).__name__}: {reason}"
            with trial_log(folder):
                package.error("error", exc_info=error)
        write_whole(folder / "error.txt", printable(reason) + "\n")
        return reason

    def _new_folder(self, trial: Trial) -> Path:
        for attempt in range(1, 1000):
            name = f"trials/{trial.number:04d}" + (f"_{attempt}" if attempt > 1 else "")
            folder = self.shared.folder / name
            if not (folder / "config.yaml").exists():
                break
        folder.mkdir(parents=True, exist_ok=True)
        trial.set_user_attr("folder", name)
        return folder

    def _train(self, trial: Trial, parameters: dict[str, Any]) -> dict[str, Any]:
        """mnist-train in the trial's folder, which it continues where it was begun."""
        given = trial.user_attrs.get("folder")  # of the one that it repeats, too
        folder = self.shared.folder / given if given else self._new_folder(trial)
        begun = (folder / "config.yaml").is_file()
        overrides = self.space.overrides(parameters)
        trial.set_user_attr("overrides", overrides)
        settings, choices = compose(overrides, folder)
        from mnist_cnn.training.fit import fit

        reported = set(self.shared.trials()[trial.number].intermediate_values)
        if begun:
            with trial_log(folder):
                try:
                    resumed = settings.model_copy(update={"resume": str(folder)})
                    return fit(resumed, folder, callbacks=[self._pruning(trial, reported)], silent=True)
                except UserError as error:  # such as: the worker that was silent is still in there
                    package.warning("warning: %s; the trial begins again in another folder", error)
            folder = self._new_folder(trial)
            settings, choices = compose(overrides, folder)
        with trial_log(folder):
            return fit(settings, folder, overrides, choices, [self._pruning(trial, reported)], silent=True)

    def _pruning(self, trial: Trial, reported: set[int]) -> Callback:
        """Reports the metric at each epoch's end, and ends a bad trial.

        Args:
            trial: of Optuna.
            reported: epochs of which it is done; a resumed trial does not report one twice.
        """
        from pytorch_lightning import Callback, LightningModule, Trainer

        metric, stop = self.shared.metric, self.stop

        class Pruning(Callback):
            def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
                epoch = trainer.current_epoch + 1
                if epoch not in reported:
                    reported.add(epoch)
                    trial.report(float(trainer.callback_metrics[metric]), epoch)
                if trial.should_prune():
                    raise optuna.TrialPruned
                if stop.is_set():  # the signal came just before the run took it
                    raise SystemExit(128 + stop.signum)

        return Pruning()


@contextmanager
def trial_log(folder: Path) -> Iterator[None]:
    """What a trial prints goes to its train.log, and not to the terminal."""
    with (folder / "train.log").open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        handler = logging.StreamHandler(file)
        handler.setFormatter(Printable(FILE_FORMAT))
        package.addHandler(handler)
        package.propagate = False
        try:
            yield
        finally:
            package.propagate = True
            package.removeHandler(handler)


# --- local workers -------------------------------------------------------------------------------------------


def start_workers(settings: SweepSettings, folder: Path) -> dict[int, tuple[subprocess.Popen[bytes], Path]]:
    """Local processes of the same command with `workers=1`, their part of the threads, and one GPU each.

    Args:
        settings: of the command.
        folder: of the study; a worker's own messages go to workers/ there.
    """
    words = [word for word in sys.argv[1:] if override_key(word) != "workers"] + ["workers=1"]
    threads = settings.accelerator.threads or threads_of_job(settings.workers)
    if settings.accelerator.threads is None:  # part of each trial: the bits of its weights depend on it
        words.append(f"accelerator.threads={threads}")
    # Threads that spin while they wait would take the cores from the other workers.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ, PARENT: str(os.getpid())}
    environment.pop("HYDRA_FULL_ERROR", None)
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    gpus = [] if settings.accelerator.name == "cpu" else visible_gpus()
    (folder / "workers").mkdir(exist_ok=True)
    workers = {}
    for number in range(1, settings.workers + 1):
        own = {"CUDA_VISIBLE_DEVICES": gpus[(number - 1) % len(gpus)]} if gpus else {}
        messages = folder / "workers" / f"{socket.gethostname()}_{number}.log"
        command = [sys.executable, "-P", "-m", "mnist_cnn.sweep", *words]
        with messages.open("ab") as file:
            # In a group of its own: a terminal's Ctrl-C comes here alone, and each worker hears of it once.
            process = subprocess.Popen(command, env=environment | own, stdout=file, stderr=file, process_group=0)
        workers[number] = process, messages
    return workers


def run_workers(settings: SweepSettings, folder: Path, stop: Stop, look: Callable[[], None]) -> None:
    """Have local processes run the trials; one that is killed is reported, and the others go on.

    Args:
        settings: of the command.
        folder: of the study.
        stop: ends the workers, each with its trial saved and given back.
        look: called now and then: there may be something to tell.

    Raises:
        UserError: a worker refused the settings.
        RunError: a worker failed.
    """
    workers = start_workers(settings, folder)
    ending, failure = False, None
    while workers:
        time.sleep(0.5)
        if (stop.is_set() or failure) and not ending:
            ending = True
            for process, _ in workers.values():
                process.send_signal(stop.signum or signal.SIGTERM)
        for number, (process, messages) in list(workers.items()):
            if (status := process.poll()) is None:
                continue
            del workers[number]
            signum = -status if status < 0 else max(0, status - 128)
            if signum and not ending:
                log.warning("worker %d was ended by %s", number, signal.Signals(signum).name)
            elif status and not ending and failure is None:
                failure = last_error(messages, status)
        look()
    if failure:
        raise failure


def last_error(messages: Path, status: int) -> UserError | RunError:
    """What a worker ended with."""
    lines = messages.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    reason = lines[-1].removeprefix("error: ") if lines else f"a worker ended with status {status}"
    return UserError(reason) if status == 2 else RunError(reason)


def end_with_parent(parent: int) -> None:
    """Have this worker save and end where the command that began it was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()

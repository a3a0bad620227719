"""A study: Optuna's loop, storage and heartbeats around mnist-train. Imports no torch until a trial begins.

The total is exact without a lock of our own. A study is filled with waiting trials up to its total, and a worker begins
one only while some wait. What two processes add or begin at the same moment beyond the total is told by its number:
the storage gives numbers out one by one, so that all processes agree on which trial is one too many. A trial that is
given back waits again under its number; one whose worker was killed is repeated by Optuna's own callback.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import hydra
import numpy as np
import optuna
import yaml
from optuna.distributions import distribution_to_json
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from mnist_cnn.config.schema import RunError, UserError
from mnist_cnn.config.settings import SweepSettings, without_password
from mnist_cnn.runs.folder import write_whole
from mnist_cnn.runs.hydra_app import FILE_FORMAT
from mnist_cnn.search.space import SWEEP_KEYS, Space, compose, of_the_machine

if TYPE_CHECKING:
    from pytorch_lightning import Callback

log = logging.getLogger("mnist-sweep")
package = logging.getLogger("mnist_cnn")
optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=ExperimentalWarning)

STUDY = "study.yaml"
MISSED = 6  # heartbeats, after which a worker counts as killed
DRIVERS = {"postgresql": "psycopg", "mysql": "pymysql"}
SAME_SEED = ("GridSampler", "QMCSampler")  # they deal one sequence out to all workers
StorageErrors = (StorageInternalError, SQLAlchemyError)
history_of: Callable[[FrozenTrial], list[int]] = RetryHeartbeatStaleTrialCallback.retry_history


class FailedTrial(Exception):  # noqa: N818
    """A trial is told as failed, and the others go on."""


class TrialLeft(BaseException):
    """Ends Optuna's loop without telling an end of the trial, which waits again or is another worker's by now."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error  # that ends the worker as well


# --- the storage and the study's folder ----------------------------------------------------------------------


def open_storage(url: str, settings: SweepSettings, begin: bool) -> RDBStorage:
    """Optuna's storage with heartbeats; in SQLite each transaction is alone, so that no two workers take one trial.

    Args:
        url: sqlite:///file, postgresql://user:password@host/database, mysql://…
        settings: of the command.
        begin: make the file or the tables where there are none.

    Raises:
        UserError: it is not reached, or its driver is not installed.
    """
    scheme, shown = url.partition(":")[0], without_password(url)
    local = scheme.startswith("sqlite")
    if local and not begin and not Path(url.partition(":///")[2].partition("?")[0]).is_file():
        raise UserError(f"storage={shown} is not there")
    full = url.replace(scheme, f"{scheme}+{DRIVERS[scheme]}", 1) if scheme in DRIVERS else url
    try:
        for attempt in range(10):
            try:
                storage = RDBStorage(
                    full.replace("{", "{{").replace("}", "}}"),  # Optuna fills in what stands in braces
                    {"connect_args": {"timeout": 60}} if local else {"pool_pre_ping": True},
                    heartbeat_interval=settings.heartbeat,
                    grace_period=MISSED * settings.heartbeat,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(settings.retries, True),
                )
                break
            except SQLAlchemyError as error:  # another process may make the tables at the same time
                if attempt == 9 or not (isinstance(error, IntegrityError) or "already exists" in str(error)):
                    raise
                time.sleep(0.2)
    except (ImportError, NoSuchModuleError) as error:
        extra = scheme.partition("+")[0]
        raise UserError(
            f"storage={shown} needs a driver ({reason_of(error)}): pip install 'mnist-cnn[{extra}]'"
        ) from None
    except (ArgumentError, StorageInternalError, SQLAlchemyError, ValueError) as error:
        unreadable = isinstance(error, ValueError | ArgumentError)  # SQLAlchemy repeats parts of the address
        why = "it cannot be read as an address" if unreadable else reason_of(error)
        raise UserError(f"storage={shown} cannot be used: {why}") from None
    if local:  # as SQLAlchemy's documentation of pysqlite has it
        event.listen(storage.engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
        event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        storage.engine.dispose()
    return storage


def reason_of(error: BaseException) -> str:
    return str(error.__cause__ or error).strip().splitlines()[0]


def storage_error(error: BaseException | None) -> BaseException | None:
    """The storage's own error behind one that Optuna raised because of it, if there is one."""
    if isinstance(error, UserError | RunError):
        return None
    while error is not None and not isinstance(error, StorageErrors):
        error = error.__cause__ or error.__context__
    return error


def read_study_file(folder: Path) -> dict[str, Any]:
    """What finds the study of a folder again: name, metric, storage, retries and the user's --config-dir."""
    try:
        about = yaml.safe_load((folder / STUDY).read_text(encoding="utf-8"))
        known = {key: about[key] for key in ("study", "metric", "storage", "retries")}
        return {**known, "config_dir": about.get("config_dir")}
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise UserError(f"{folder} is not a study's folder: it has no {STUDY} of mnist-sweep") from None


# --- the study -----------------------------------------------------------------------------------------------


class SharedStudy:
    """A study in its storage, which any number of processes work on.

    Args:
        settings: of the command.
        name: of the study, in the storage.
        folder: of the study here.
        config_dir: the folder of the user's own YAMLs.
        begin: it where the storage has none of that name.

    Raises:
        UserError: the storage is not reached, its driver is not installed, or it has no such study.
    """

    def __init__(
        self, settings: SweepSettings, name: str, folder: Path, config_dir: str | None = None, begin: bool = True
    ) -> None:
        self.folder, self.name, self.config_dir = folder, name, config_dir
        self.metric, self.retries, self.heartbeat = settings.metric, settings.retries, settings.heartbeat
        self.storage_key = settings.storage
        url = settings.storage or f"sqlite:///{(folder / 'study.db').absolute()}"
        self.sampler, seed = settings.sampler, settings.sampler.get("seed")
        if seed is not None and (not isinstance(seed, int) or seed < 0):
            raise UserError(f"sampler.seed={seed}: must be a whole number from 0")
        sampler = instance(self.sampler, "sampler", optuna.samplers.BaseSampler)
        pruner = instance(settings.pruner, "pruner", optuna.pruners.BasePruner)
        self.storage = open_storage(url, settings, begin)
        if not begin and name not in optuna.get_all_study_names(self.storage):
            raise UserError(f"storage={without_password(url)} has no study {name}")
        self.study = optuna.create_study(
            storage=self.storage,
            study_name=name,
            direction="maximize" if self.metric == "val/accuracy" else "minimize",
            load_if_exists=True,
            sampler=sampler,
            pruner=pruner,
        )

    def seed_sampler(self, number: int) -> None:
        """Have the sampler's random numbers depend on the user's seed and the trial, whichever process begins it."""
        seed = self.sampler.get("seed")
        if seed is not None and not str(self.sampler["_target_"]).endswith(SAME_SEED):
            own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
            self.study.sampler = instance({**self.sampler, "seed": own}, "sampler", optuna.samplers.BaseSampler)

    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def states(self, trials: Sequence[FrozenTrial]) -> dict[int, str]:
        """What became of each trial, by its number.

        waiting, running, complete and pruned as Optuna has them; fail: with a reason, or killed too often; again: it
        was killed, and a later trial repeats it; killed: none does so yet; surplus: one more than the study has.
        """
        repeated = {number for trial in trials for number in history_of(trial)[-1:]}

        def state(trial: FrozenTrial) -> str:
            if trial.state != TrialState.FAIL:
                return trial.state.name.lower()
            if "surplus" in trial.user_attrs:
                return "surplus"
            if "error" in trial.user_attrs:
                return "fail"
            if trial.number in repeated:
                return "again"
            return "killed" if len(history_of(trial)) < self.retries else "fail"

        return {trial.number: state(trial) for trial in trials}

    def finished(self) -> list[FrozenTrial]:
        """The trials that came to an end of their own, or were killed too often."""
        trials = self.trials()
        states = self.states(trials)
        return [trial for trial in trials if states[trial.number] in ("complete", "pruned", "fail")]

    def counts(self) -> Counter[str]:
        return Counter(self.states(self.trials()).values())

    def best(self) -> FrozenTrial | None:
        """The best complete trial; of equal ones the first."""
        sign = -1 if self.metric == "val/accuracy" else 1
        complete = [trial for trial in self.trials() if trial.state == TrialState.COMPLETE]
        return min(complete, key=lambda trial: (sign * trial.values[0], trial.number), default=None)

    def fill(self, total: int) -> None:
        """Add waiting trials up to the total, ever fewer at once, as another process may do the same just now."""
        while (missing := total - sum(map(is_original, self.trials()))) > 0:
            for _ in range(max(1, missing // 20)):
                self.study.add_trial(create_trial(state=TrialState.WAITING))

    def repeat_killed(self) -> None:
        """Have the trials of killed workers wait again."""
        optuna.storages.fail_stale_trials(self.study)
        trials = self.trials()
        lately = datetime.now() - timedelta(seconds=self.heartbeat)
        for number, state in self.states(trials).items():
            # Its worker was killed, and then the one that was about to repeat it.
            if state == "killed" and cast(datetime, trials[number].datetime_complete) < lately:
                cast(Any, self.storage.get_heartbeat_stale_trial_callback())(self.study, deepcopy(trials[number]))

    def require_same(self, space: Space, settings: SweepSettings) -> None:
        """Note what the study searches, or compare it with what it does already.

        Raises:
            UserError: it is another study.
        """
        train = {key: value for key, value in _flat(settings.model_dump(mode="json")) if _is_learned(key)}
        ours = {**train, "metric": self.metric}
        ours |= {f"sweep.{key}": distribution_to_json(each) for key, each in space.distributions.items()}
        theirs = self.study.user_attrs.get("settings")
        if theirs is None:
            self.study.set_user_attr("settings", ours)
            return
        if differing := [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]:
            said = [f"{key}={theirs.get(key)}, not {ours.get(key)}" for key in differing[:5]]
            raise UserError(f"study {self.name} has {'; '.join(said)}; leave that out, or name another by study=…")

    def write_study_file(self) -> None:
        """Write what finds the study again; a password stays out of it."""
        storage = without_password(self.storage_key, "") if self.storage_key else None
        about = {"study": self.name, "metric": self.metric, "storage": storage, "retries": self.retries}
        write_whole(self.folder / STUDY, yaml.safe_dump({**about, "config_dir": self.config_dir}, sort_keys=False))


def is_original(trial: FrozenTrial) -> bool:
    """Whether it counts for the total: it repeats no other, and is none too many."""
    return not history_of(trial) and "surplus" not in trial.user_attrs


def is_surplus(trials: Sequence[FrozenTrial], number: int, total: int) -> bool:
    """Whether a trial is one too many, as processes may add or begin trials at the same moment."""
    history = history_of(trials[number])
    if any(history_of(trial)[-1:] == history[-1:] for trial in trials[:number] if history):
        return True  # two repeat one killed trial: the first of them does
    return sum(map(is_original, trials[: (history or [number])[0]])) >= total


def instance(settings: dict[str, Any], key: str, kind: type) -> Any:
    """Optuna's sampler or pruner of the user's own `_target_`."""
    try:
        found = hydra.utils.instantiate(settings, _convert_="all")
    except Exception as error:  # each has its own
        raise UserError(f"{key}: {settings.get('_target_')} cannot be made: {error.__cause__ or error}") from None
    if not isinstance(found, kind):
        raise UserError(f"{key}._target_={settings.get('_target_')} is none of optuna.{key}s")
    return found


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, each in value.items():
        yield from _flat(each, f"{prefix}.{key}".lstrip("."))


def _is_learned(key: str) -> bool:
    """Whether the key says what a study's trials learn."""
    return key.split(".")[0] not in SWEEP_KEYS and key != "accelerator.name" and not of_the_machine(key)


# --- trials --------------------------------------------------------------------------------------------------


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
        write_whole(folder / "error.txt", reason + "\n")
        return reason

    def _new_folder(self, trial: Trial) -> Path:
        for attempt in range(1, 1000):
            name = f"trials/{trial.number:04d}" + (f"_{attempt}" if attempt > 1 else "")
            folder = self.shared.folder / name
            if not (folder / "config.yaml").exists():
                break
        trial.set_user_attr("folder", name)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _train(self, trial: Trial, parameters: dict[str, Any]) -> dict[str, Any]:
        """mnist-train in the trial's folder, which it continues where it was begun."""
        given = self.shared.folder / trial.user_attrs.get("folder", "none")
        begun = (given / "config.yaml").is_file()
        folder = given if begun else self._new_folder(trial)
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
        handler.setFormatter(logging.Formatter(FILE_FORMAT))
        package.addHandler(handler)
        package.propagate = False
        try:
            yield
        finally:
            package.propagate = True
            package.removeHandler(handler)

"""A study: Optuna's loop, storage and heartbeats around mnist-train. Imports no torch until a trial begins.

The total is exact without a lock of our own. A study is filled with waiting trials up to its total, and a worker begins
one only while some wait. What two processes add or begin at the same moment beyond the total is told by its number:
the storage gives numbers out one by one, so that all processes agree on which trial is one too many. A trial that is
given back waits again under its number; one whose worker was killed is repeated by Optuna's own callback.
"""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

import hydra
import numpy as np
import optuna
import yaml
from optuna.distributions import distribution_to_json
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import event, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from mnist_cnn.config.schema import RunError, UserError, validated
from mnist_cnn.config.study_settings import StudyFile, SweepSettings
from mnist_cnn.runs.command_line import flat
from mnist_cnn.runs.files import write_whole
from mnist_cnn.runs.strangers import read_mapping
from mnist_cnn.search.space import SWEEP_KEYS, Space, of_the_machine

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=ExperimentalWarning)

STUDY = "study.yaml"
MISSED = 6  # heartbeats, after which a worker counts as killed
DRIVERS = {"postgresql": "psycopg", "mysql": "pymysql"}
SAME_SEED = ("GridSampler", "QMCSampler")  # they deal one sequence out to all workers
StorageErrors = (StorageInternalError, SQLAlchemyError)
history_of: Callable[[FrozenTrial], list[int]] = RetryHeartbeatStaleTrialCallback.retry_history


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


def without_password(url: str) -> str:
    """A storage's address as it may be shown or kept."""
    try:
        found = make_url(url)
    except (ArgumentError, ValueError):
        return f"{url.partition(':')[0]}://…"
    secret = [key for key in found.query if re.search("passw|pwd|secret|token", key, re.IGNORECASE)]
    if found.password is None and not secret:
        return url
    return found._replace(password=None).difference_update_query(secret).render_as_string()


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
        about = read_mapping(folder / STUDY)
    except OSError:
        raise UserError(f"{folder} is not a study's folder: it has no {STUDY} of mnist-sweep") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        return validated(StudyFile, about).model_dump()
    except UserError as error:
        raise UserError(f"{folder / STUDY} is damaged: {error}") from None


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
        train = {key: value for key, value in flat(settings.model_dump(mode="json")) if _is_learned(key)}
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
        storage = without_password(self.storage_key) if self.storage_key else None
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


def _is_learned(key: str) -> bool:
    """Whether the key says what a study's trials learn."""
    return key.split(".")[0] not in SWEEP_KEYS and key != "accelerator.name" and not of_the_machine(key)

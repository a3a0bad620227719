"""One study for many processes: Optuna's storage, a lock around each start of a trial, and what became of them all.

Optuna's own loop may begin more trials than were asked for, loses a trial whose worker dies between two writes, and
with SQLite may give one trial to two workers. Here a trial is begun under a lock, from what the storage says then.
Imports no torch.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import distribution_to_json
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from mnist_cnn.config.parameters import Sweep
from mnist_cnn.config.schema import UserError
from mnist_cnn.search.space import OWN, Space, of_the_machine
from mnist_cnn.search.storage import Storage, StorageError

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=ExperimentalWarning)
warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used with Study.optimize")


class TakenError(Exception):
    """The trial was given to another worker, as this one was silent for too long."""


@dataclass
class Tally:
    """A study's trials by what became of them; a killed one that runs again is not counted twice."""

    complete: list[FrozenTrial] = field(default_factory=list)
    pruned: list[FrozenTrial] = field(default_factory=list)
    failed: list[FrozenTrial] = field(default_factory=list)
    running: list[FrozenTrial] = field(default_factory=list)
    waiting: list[FrozenTrial] = field(default_factory=list)
    lost: list[FrozenTrial] = field(default_factory=list)  # to run again, which no trial does yet

    @property
    def ended(self) -> list[FrozenTrial]:
        return sorted([*self.complete, *self.pruned, *self.failed], key=lambda trial: trial.number)

    @property
    def begun(self) -> int:
        return len(self.ended) + len(self.running) + len(self.waiting)


def replaces(trial: FrozenTrial) -> list[int]:
    """The numbers of the killed trials that it runs again, the first one first."""
    return list(trial.system_attrs.get("retry_history", []))


def tally(trials: list[FrozenTrial], retries: int) -> Tally:
    states = {
        TrialState.COMPLETE: "complete",
        TrialState.PRUNED: "pruned",
        TrialState.RUNNING: "running",
        TrialState.WAITING: "waiting",
    }
    by_number = {trial.number: trial for trial in trials}
    replaced = {number for trial in trials for number in replaces(trial)[-1:]}
    found = Tally()
    for trial in trials:
        if trial.state != TrialState.FAIL:
            getattr(found, states[trial.state]).append(trial)
        elif "error" in trial.user_attrs:
            found.failed.append(trial)
        elif trial.number not in replaced:
            chain = [by_number[number] for number in (*replaces(trial), trial.number)]
            killed = sum("interrupted" not in each.user_attrs for each in chain)
            (found.lost if killed <= retries else found.failed).append(trial)
    return found


class SharedStudy:
    """A study in its storage.

    Args:
        settings: of the command.
        name: of the study, in the storage.
        folder: of the study here.
        begin: it where the storage has none of that name.

    Raises:
        UserError: the storage is not reached, or its driver is not installed; or it has no such study.
    """

    def __init__(self, settings: Sweep, name: str, folder: Path, begin: bool = True) -> None:
        self.folder, self.name, self.retries, self.metric = folder, name, settings.retries, settings.metric
        url = settings.storage or f"sqlite:///{(folder / 'study.db').absolute()}"
        self.storage = Storage(url, settings.heartbeat, begin)
        self.study = self._joined(settings, begin)

    def _joined(self, settings: Sweep, begin: bool) -> optuna.Study:
        from mnist_cnn.training.targets import made

        parts = {}
        for key, kind in {"sampler": optuna.samplers.BaseSampler, "pruner": optuna.pruners.BasePruner}.items():
            parts[key] = made(getattr(settings, key), key)
            if not isinstance(parts[key], kind):
                raise UserError(f"{key}._target_={getattr(settings, key).get('_target_')} is none of optuna.{key}s")
        if not begin and self.name not in optuna.get_all_study_names(self.storage):
            raise UserError(f"storage={self.storage.shown} has no study {self.name}")
        study = optuna.create_study(
            storage=self.storage,
            study_name=self.name,
            direction="maximize" if self.metric == "val/accuracy" else "minimize",
            load_if_exists=True,
            **parts,
        )
        # A sampler that has tried all there is calls this, which Optuna allows in its own loop alone.
        study.stop = lambda: study.set_user_attr("exhausted", True)  # type: ignore[method-assign]
        return study

    def alone(self) -> AbstractContextManager[None]:
        return self.storage.alone(self.study._study_id)

    def tally(self) -> Tally:
        return tally(self.study.get_trials(deepcopy=False), self.retries)

    def agree(self, space: Space, settings: Sweep) -> None:
        """Note what the study searches, or compare it with what it does already.

        Raises:
            UserError: it is another study.
        """
        train = {key: value for key, value in _flat(settings.model_dump(mode="json")) if _is_its(key)}
        ours = {**train, "metric": self.metric}
        ours |= {f"sweep.{key}": distribution_to_json(each) for key, each in space.distributions.items()}
        with self.alone():
            theirs = self.study.user_attrs.get("settings")
            if theirs is None:
                self.study.set_user_attr("settings", ours)
                return
        differing = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
        if differing:
            said = [f"{key}={theirs.get(key)}, not {ours.get(key)}" for key in differing[:5]]
            raise UserError(f"study {self.name} has {'; '.join(said)}; leave that out, or name another by study=…")

    # --- a trial ---------------------------------------------------------------------------------------------

    def claim(self, space: Space, total: int, worker: str) -> tuple[Trial | None, bool]:
        """A trial to run for `worker`, or none left; then whether others still run."""
        with self.alone():
            optuna.storages.fail_stale_trials(self.study)
            for trial in self.tally().running:
                if "worker" not in trial.user_attrs:  # died in here, before its first heartbeat
                    self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            now = self.tally()
            for trial in now.lost:
                history = [*replaces(trial), trial.number]
                again = optuna.trial.create_trial(
                    state=TrialState.WAITING,
                    params=trial.params,
                    distributions=trial.distributions,
                    user_attrs={key: value for key, value in trial.user_attrs.items() if key == "folder"},
                    system_attrs={"failed_trial": history[0], "retry_history": history},
                )
                self.study.add_trial(again)
            full = now.begun + len(now.lost) >= total or self.study.user_attrs.get("exhausted")
            if full and not now.waiting and not now.lost:
                return None, bool(now.running)
            claimed = self.study.ask(space.distributions)
            self.storage.record_heartbeat(claimed._trial_id)
            claimed.set_user_attr("worker", worker)
            return claimed, True

    def give_up(self, worker: str) -> None:
        """The worker was killed: its trial need not wait for the heartbeats that do not come."""
        with self.alone():
            for trial in self.tally().running:
                if trial.user_attrs.get("worker") == worker:
                    self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def tell(self, trial: Trial, value: float | None, state: TrialState, **about: Any) -> None:
        """Note how a trial ended.

        Raises:
            TakenError: it is no longer this worker's.
        """
        with suppress(UpdateFinishedTrialError):  # told already, with an answer that was lost, or taken
            for key, each in about.items():
                trial.set_user_attr(key, each)
        told = self.study.tell(trial.number, value, state, skip_if_finished=True)
        if told.state != state:
            raise TakenError

    @contextmanager
    def beating(self, trial: Trial) -> Iterator[None]:
        """Heartbeats while the trial runs; a storage that is away for a moment is tried again."""
        done = threading.Event()

        def beat() -> None:
            wait = float(self.storage.heartbeat_interval or 1)
            while not done.wait(wait):
                try:
                    self.storage.record_heartbeat(trial._trial_id)
                    wait = float(self.storage.heartbeat_interval or 1)
                except StorageError:
                    wait = 0.5
            self.storage.remove_session()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, each in value.items():
        yield from _flat(each, f"{prefix}.{key}".lstrip("."))


def _is_its(key: str) -> bool:
    """Whether the key says what a study's trials learn."""
    return key.split(".")[0] not in OWN and key != "accelerator.name" and not of_the_machine(key)

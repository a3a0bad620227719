"""What a study says of itself: lines while it runs, trials.csv, best.yaml, a page and pictures. Imports no torch."""

from __future__ import annotations

import logging
import shutil
import statistics
import sys
import time
from typing import Any

import hydra
import yaml
from omegaconf import OmegaConf
from optuna.trial import FrozenTrial, TrialState

from mnist_cnn.runs.folder import write_csv, write_whole
from mnist_cnn.search.space import NOT_SEARCHED, text
from mnist_cnn.search.storage import StorageError
from mnist_cnn.search.study import SharedStudy, Tally, replaces

log = logging.getLogger("mnist-sweep")

SECONDS_BETWEEN_LOOKS = 0.5


def figure(shared: SharedStudy, value: float) -> str:
    return f"{value:.2%}" if shared.metric == "val/accuracy" else f"{value:.4f}"


def best_of(shared: SharedStudy, now: Tally) -> FrozenTrial | None:
    """The best complete trial; of equal ones the first."""
    sign = -1 if shared.metric == "val/accuracy" else 1
    return min(now.complete, key=lambda trial: (sign * trial.values[0], trial.number), default=None)


def seconds(trial: FrozenTrial) -> float:
    return (trial.datetime_complete - trial.datetime_start).total_seconds()  # type: ignore[operator]


def duration(span: float) -> str:
    return f"{span:.0f} s" if span < 100 else f"{span / 60:.0f} min" if span < 6000 else f"{span / 3600:.1f} h"


def parameters(trial: FrozenTrial) -> str:
    return " ".join(
        f"{key}={f'{value:.4g}' if isinstance(value, float) else text(value)}" for key, value in trial.params.items()
    )


class Progress:
    """A line for each trial that ends, in whatever process, and on a terminal one that is refreshed.

    Args:
        shared: the study.
        total: trials that it is to have.
    """

    def __init__(self, shared: SharedStudy, total: int) -> None:
        self.shared, self.total = shared, total
        self.said = {trial.number for trial in shared.tally().ended}
        self.looked = 0.0
        if self.said:
            log.info("continuing: %s", state(shared, shared.tally(), total))

    def look(self, now: bool = False) -> None:
        if not now and time.monotonic() - self.looked < SECONDS_BETWEEN_LOOKS:
            return
        self.looked = time.monotonic()
        try:
            found = self.shared.tally()
        except StorageError:
            return
        self._clear()
        for trial in sorted(found.ended, key=lambda trial: trial.datetime_complete or trial.datetime_start):  # type: ignore[arg-type, return-value]
            if trial.number not in self.said:
                self.said.add(trial.number)
                log.info("%s", self.line(trial))
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns
            sys.stderr.write(f"\r{state(self.shared, found, self.total)[: width - 1]}\x1b[K")
            sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.look(now=True)
        self._clear()

    def state(self) -> str:
        return state(self.shared, self.shared.tally(), self.total)

    @staticmethod
    def _clear() -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def line(self, trial: FrozenTrial) -> str:
        return (
            f"{len(self.said)}/{self.total}  trial {trial.number}  {outcome(self.shared, trial)}  {parameters(trial)}"
        )


def state(shared: SharedStudy, now: Tally, total: int) -> str:
    """Such as `12 of 50 trials done (3 pruned, 1 failed), 4 running; best 98.61% (trial 7); 3 min left`."""
    done = len(now.ended)
    words = f"{done} of {total} trials done ({len(now.pruned)} pruned, {len(now.failed)} failed), "
    words += f"{len(now.running)} running"
    if best := best_of(shared, now):
        words += f"; best {figure(shared, best.values[0])} (trial {best.number})"
    spans = [seconds(trial) for trial in (*now.complete, *now.pruned)]
    if spans and now.running and done < total:
        words += f"; {duration(statistics.mean(spans) * (total - done) / len(now.running))} left"
    return words


def outcome(shared: SharedStudy, trial: FrozenTrial) -> str:
    if trial.state == TrialState.COMPLETE:
        return f"{figure(shared, trial.values[0])}  {seconds(trial):.1f} s"
    if trial.state == TrialState.PRUNED:
        epoch = trial.last_step or 0
        return f"pruned at {figure(shared, trial.intermediate_values[epoch])} after epoch {epoch}"
    return f"failed: {reason(trial)}"


def reason(trial: FrozenTrial) -> str:
    if trial.state != TrialState.FAIL:
        return ""
    if "error" in trial.user_attrs:
        return str(trial.user_attrs["error"])
    return (
        "interrupted"
        if "interrupted" in trial.user_attrs
        else f"its worker was killed {len(replaces(trial)) + 1} times"
    )


def write_report(shared: SharedStudy) -> FrozenTrial | None:
    """trials.csv, and where a trial is complete the best one's experiment, a page and pictures; the best trial."""
    from mnist_cnn.search.study_page import page
    from mnist_cnn.search.study_plots import pictures

    now, folder = shared.tally(), shared.folder
    write_csv(folder / "trials.csv", *rows(shared))
    best = best_of(shared, now)
    if best is None:
        return None
    overrides = best.user_attrs["overrides"]
    title = f"Trial {best.number} of the study {shared.name}: {shared.metric} {figure(shared, best.values[0])}"
    (folder / "experiment").mkdir(exist_ok=True)
    write_whole(
        folder / "experiment" / "best.yaml",
        f"# @package _global_\n# {title}, in {best.user_attrs['folder']}.\n"
        f"# mnist-train --config-dir {folder} experiment=best\n"
        + yaml.safe_dump(experiment(overrides), sort_keys=False, allow_unicode=True),
    )
    pictures(shared, title)
    page(shared, title, parameters(best))
    return best


def rows(shared: SharedStudy) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of trials.csv and its columns."""
    trials = shared.study.get_trials(deepcopy=False)
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    again = {number: trial.number for trial in trials for number in replaces(trial)[-1:]}
    lines = [
        {
            "trial": trial.number,
            "state": "again" if trial.number in again else trial.state.name.lower(),
            shared.metric: trial.values[0] if trial.values else None,
            **{key: text(trial.params[key]) for key in trial.params},
            "epochs": trial.last_step,
            "seconds": round(seconds(trial), 1) if trial.datetime_complete and trial.datetime_start else None,
            "started": trial.datetime_start.isoformat(timespec="seconds") if trial.datetime_start else None,
            "folder": trial.user_attrs.get("folder"),
            "reason": f"runs again as trial {again[trial.number]}" if trial.number in again else reason(trial),
        }
        for trial in trials
    ]
    return lines, ["trial", "state", shared.metric, *keys, "epochs", "seconds", "started", "folder", "reason"]


def experiment(overrides: list[str]) -> dict[str, Any]:
    """A trial as an option of mnist-train's group `experiment`: what differs from the options that it names."""
    config = hydra.compose("train", overrides, return_hydra_config=True)
    groups = {
        group: option
        for group, option in config.hydra.runtime.choices.items()
        if option and not group.startswith("hydra/") and group not in ("experiment", "accelerator", "logger")
    }
    plain = hydra.compose("train", [f"{group}={option}" for group, option in groups.items()])
    kept = [str(key) for key in config if key != "hydra" and key not in NOT_SEARCHED]
    changed = _difference(OmegaConf.to_container(OmegaConf.masked_copy(config, kept)), OmegaConf.to_container(plain))
    for key, inner in {"data": "root", "accelerator": "threads"}.items():  # of the machine
        changed.get(key, {}).pop(inner, None)
    changed.get("accelerator", {}).pop("name", None)
    chosen = [{f"override /{group}": option} for group, option in groups.items()]
    return {"defaults": chosen, **{key: value for key, value in changed.items() if value != {}}}


def _difference(ours: Any, theirs: Any) -> Any:
    """What has to be laid over `theirs` to have `ours`; a list is laid over whole."""
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return ours
    return {
        key: _difference(ours[key], theirs.get(key)) for key in ours if key not in theirs or ours[key] != theirs[key]
    }

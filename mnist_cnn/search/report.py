"""What a study says of itself: lines while it runs, trials.csv and the best trial as best.yaml. Imports no torch."""

from __future__ import annotations

import logging
import shlex
import signal
from typing import Any

import hydra
import yaml
from omegaconf import OmegaConf
from optuna.trial import FrozenTrial, TrialState

from mnist_cnn.config.schema import RunError
from mnist_cnn.config.settings import CONF
from mnist_cnn.runs.command_line import text
from mnist_cnn.runs.files import write_csv, write_whole
from mnist_cnn.search.plots import write_plots
from mnist_cnn.search.space import NOT_SEARCHED, composed
from mnist_cnn.search.study import SharedStudy, history_of

log = logging.getLogger("mnist-sweep")

NOT_RECIPE = ("experiment", "accelerator", "logger")  # groups that best.yaml leaves to whoever uses it


def figure(shared: SharedStudy, value: float) -> str:
    return f"{value:.2%}" if shared.metric == "val/accuracy" else f"{value:.4f}"


def best_command(shared: SharedStudy) -> str:
    return shlex.join(["mnist-train", "--config-dir", str(shared.folder.resolve()), "experiment=best"])


def seconds(trial: FrozenTrial) -> float:
    return (trial.datetime_complete - trial.datetime_start).total_seconds()  # type: ignore[operator]


def parameters(trial: FrozenTrial) -> str:
    return " ".join(
        f"{key}={f'{value:.4g}' if isinstance(value, float) else text(value)}" for key, value in trial.params.items()
    )


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
    return str(trial.user_attrs.get("error", f"its worker was killed {len(history_of(trial)) + 1} times"))


class Progress:
    """A line for each trial that ends, in whatever process.

    Args:
        shared: the study.
        total: trials that it is to have.
    """

    def __init__(self, shared: SharedStudy, total: int) -> None:
        self.shared, self.total = shared, total
        self.told = {trial.number for trial in shared.finished()}
        done = f"continuing: {state(shared, total)}" if self.told else f"{total} trials"
        log.info("%s in %s", done, shared.folder)

    def look(self) -> None:
        ended = [trial for trial in self.shared.finished() if trial.number not in self.told]
        for trial in sorted(ended, key=lambda trial: trial.datetime_complete):  # type: ignore[arg-type, return-value]
            self.told.add(trial.number)
            line = f"{len(self.told)}/{self.total}  trial {trial.number}  {outcome(self.shared, trial)}"
            log.info("%s  %s", line, parameters(trial))

    def conclude(self, signum: int) -> None:
        """Say what is left, after signal `signum` or none.

        Raises:
            RunError: no signal came, and trials are left: their workers were killed.
        """
        self.look()
        left = f"{state(self.shared, self.total)}; the same command continues"
        if signum:
            log.error("stopped by %s: %s", signal.Signals(signum).name, left)
        elif len(self.told) < self.total:
            raise RunError(left)


def state(shared: SharedStudy, total: int) -> str:
    """Such as `12 of 50 trials done (3 pruned, 1 failed), 4 running; best 98.61% (trial 7)`."""
    counts, best = shared.counts(), shared.best()
    done = counts["complete"] + counts["pruned"] + counts["fail"]
    words = f"{done} of {total} trials done ({counts['pruned']} pruned, {counts['fail']} failed)"
    words += f", {counts['running']} running"
    return words + (f"; best {figure(shared, best.values[0])} (trial {best.number})" if best else "")


def write_report(shared: SharedStudy) -> FrozenTrial | None:
    """trials.csv, and where a trial is complete the best one's experiment, a page and pictures; the best trial."""
    write_csv(shared.folder / "trials.csv", *rows(shared))
    best = shared.best()
    if best is None:
        return None
    title = f"Trial {best.number} of the study {shared.name}: {shared.metric} {figure(shared, best.values[0])}"
    (shared.folder / "experiment").mkdir(exist_ok=True)
    write_whole(
        shared.folder / "experiment" / "best.yaml",
        f"# @package _global_\n# {title}, in {best.user_attrs['folder']}.\n"
        f"# {best_command(shared)}\n"
        + yaml.safe_dump(
            experiment(best.user_attrs["overrides"], shared.config_dir), sort_keys=False, allow_unicode=True
        ),
    )
    write_plots(shared, title, parameters(best))
    return best


def rows(shared: SharedStudy) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of trials.csv and its columns."""
    trials = shared.trials()
    states = shared.states(trials)
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    repeats = {number: trial.number for trial in trials for number in history_of(trial)[-1:]}
    lines = [
        {
            "trial": trial.number,
            "state": states[trial.number],
            shared.metric: trial.values[0] if trial.values else None,
            **{key: text(trial.params[key]) for key in trial.params},
            "epochs": trial.last_step,
            "seconds": round(seconds(trial), 1) if trial.datetime_complete and trial.datetime_start else None,
            "started": trial.datetime_start.isoformat(timespec="seconds") if trial.datetime_start else None,
            "folder": trial.user_attrs.get("folder"),
            "reason": f"runs again as trial {repeats[trial.number]}" if trial.number in repeats else reason(trial),
        }
        for trial in trials
        if states[trial.number] != "surplus"
    ]
    return lines, ["trial", "state", shared.metric, *keys, "epochs", "seconds", "started", "folder", "reason"]


def experiment(overrides: list[str], config_dir: str | None) -> dict[str, Any]:
    """A trial as an option of mnist-train's group `experiment`: what differs from the shipped options that it names.

    An option of the user's own folder stands there whole, so that the recipe needs that folder no more.
    """
    config = composed(overrides, config_dir)
    groups = {
        group: option
        for group, option in config.hydra.runtime.choices.items()
        if option and not group.startswith("hydra/") and group not in NOT_RECIPE
    }
    shipped = {group: (CONF / group / f"{option}.yaml").is_file() for group, option in groups.items()}
    named = [f"{group}={option}" if shipped[group] else f"~{group}" for group, option in groups.items()]
    plain = OmegaConf.to_container(hydra.compose("train", named))
    kept = [str(key) for key in config if key != "hydra" and key not in NOT_SEARCHED]
    changed = _difference(OmegaConf.to_container(OmegaConf.masked_copy(config, kept)), plain)
    for key, inner in {"data": "root", "accelerator": "threads"}.items():  # of the machine
        changed.get(key, {}).pop(inner, None)
    changed.get("accelerator", {}).pop("name", None)
    chosen = [{f"override /{group}": option if shipped[group] else None} for group, option in groups.items()]
    return {"defaults": chosen, **{key: value for key, value in changed.items() if value != {}}}


def _difference(ours: Any, theirs: Any) -> Any:
    """What has to be laid over `theirs` to have `ours`; a list is laid over whole."""
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return ours
    return {
        key: _difference(ours[key], theirs.get(key)) for key in ours if key not in theirs or ours[key] != theirs[key]
    }

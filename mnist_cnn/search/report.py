"""What a study says of itself: lines while it runs, trials.csv, best.yaml, a page and pictures. Imports no torch.

The page and the pictures are Optuna's own. Accuracy is drawn as the error that it leaves, on a logarithmic scale as
losses are: one trial that diverged then does not press the others into a line.
"""

from __future__ import annotations

import html
import logging
import math
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import optuna
import yaml
from omegaconf import OmegaConf
from optuna.trial import FrozenTrial, TrialState, create_trial

from mnist_cnn.config.schema import RunError
from mnist_cnn.config.settings import CONF
from mnist_cnn.runs.folder import whole, write_csv, write_whole
from mnist_cnn.search.space import NOT_SEARCHED, text, with_config_dir
from mnist_cnn.search.study import SharedStudy, history_of

log = logging.getLogger("mnist-sweep")

NOT_RECIPE = ("experiment", "accelerator", "logger")  # groups that best.yaml leaves to whoever uses it


def figure(shared: SharedStudy, value: float) -> str:
    return f"{value:.2%}" if shared.metric == "val/accuracy" else f"{value:.4f}"


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
        if self.told:
            log.info("continuing: %s", state(shared, total))

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
        f"# mnist-train --config-dir {shared.folder} experiment=best\n"
        + yaml.safe_dump(
            experiment(best.user_attrs["overrides"], shared.config_dir), sort_keys=False, allow_unicode=True
        ),
    )
    drawn = Drawn(shared)
    write_page(drawn, title, parameters(best), shared.folder / "report.html")
    write_pictures(drawn, title, shared.folder / "pictures")
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
    config = hydra.compose("train", with_config_dir(overrides, config_dir), return_hydra_config=True)
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


# --- page and pictures ---------------------------------------------------------------------------------------


class Drawn:
    """A copy of the study to draw, in which the metric is an error or a loss, greater than 0.

    Attributes:
        study: the copy; what came to no figure is failed there, so that numbers stay.
        name: of the error or loss.
        ticks: where its axis has them, and their labels.
    """

    def __init__(self, shared: SharedStudy) -> None:
        accuracy = shared.metric == "val/accuracy"
        self.name = "validation error" if accuracy else "validation loss"
        ended = [trial.values[0] for trial in shared.trials() if trial.state == TrialState.COMPLETE]
        values = [1 - value if accuracy else value for value in ended]
        least = min((value for value in values if value > 0), default=1.0) / 2  # for 0, which has no logarithm
        self.study = optuna.create_study(direction="minimize")
        for trial in shared.trials():
            complete = trial.state == TrialState.COMPLETE and math.isfinite(trial.values[0])
            value = max(1 - trial.values[0] if accuracy else trial.values[0], least) if complete else None
            state = TrialState.COMPLETE if complete else TrialState.FAIL
            self.study.add_trial(
                create_trial(state=state, value=value, params=trial.params, distributions=trial.distributions)
            )
        drawn = [trial.values[0] for trial in self.study.trials if trial.values]
        self.keys = list(dict.fromkeys(key for trial in self.study.trials if trial.values for key in trial.params))
        edge = 1.02 * (max(drawn) / min(drawn)) ** 0.06
        self.limits = min(drawn) / edge, max(drawn) * edge
        places = _ticks(*self.limits)
        self.label = lambda place: f"{100 * place:.3g}%" if accuracy else f"{place:.3g}"
        self.ticks = places, [self.label(place) for place in places]

    def importances(self) -> str:
        """Why there are none of the parameters, such as too few trials; or nothing."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                optuna.importance.get_param_importances(self.study)
        except (ValueError, RuntimeError, UserWarning) as error:
            return str(error).partition(". ")[0]
        return ""


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    subs = (1, 2, 5) if high / low < 200 else (1,)
    locator = LogLocator(subs=subs) if high / low > 8 else MaxNLocator(5, steps=[1, 2, 5, 10])
    return [float(place) for place in locator.tick_values(low, high) if low <= place <= high]


def write_page(drawn: Drawn, title: str, about: str, file: Path) -> None:
    """A page with Optuna's plots, to point at and zoom in; it holds all that it shows and needs no network."""
    from optuna import visualization

    places, labels = drawn.ticks
    axis = {"type": "log", "tickvals": places, "ticktext": labels}
    history = visualization.plot_optimization_history(drawn.study, target_name=drawn.name).update_yaxes(**axis)
    slices = visualization.plot_slice(drawn.study, target_name=drawn.name).update_yaxes(**axis)
    slices.update_annotations(font_size=11)
    parallel = visualization.plot_parallel_coordinate(drawn.study, target=_log10, target_name=drawn.name)
    colorbar = {"tickvals": np.log10(places), "ticktext": labels}
    parallel.update_traces(marker_colorbar=colorbar, selector={"mode": "markers"})
    parallel.for_each_annotation(
        lambda tick: tick.update(text=drawn.label(10 ** float(tick.text))),
        selector={"x": 0},  # the error's
    )
    figures = [(history, 420), (None, 0), (parallel, 480), (slices, 420)]
    if not (why := drawn.importances()):
        figures[1] = (visualization.plot_param_importances(drawn.study), 160 + 40 * len(drawn.keys))
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(about)}</p>"]
    for number, (shown, height) in enumerate(figures):
        if shown is None:
            parts.append(f"<p>No importances of the parameters: {html.escape(why)}</p>")
            continue
        shown.update_layout(template="plotly_white", height=height, margin={"t": 70, "b": 90, "l": 90, "r": 60})
        shown.update_yaxes(automargin=True)
        parts.append(shown.to_html(full_html=False, include_plotlyjs=not number, config={"displaylogo": False}))
    style = "body{font-family:sans-serif;max-width:1300px;margin:2em auto} h1{font-size:1.4em}"
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    body = "\n".join(parts)
    write_whole(file, f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n')


def _log10(trial: FrozenTrial) -> float:
    return math.log10(trial.values[0])


def _wrapped(name: str) -> str:
    """In lines of some 16 characters, each ending after a dot."""
    lines = [""]
    for part in name.replace(".", ". ").split():
        if lines[-1] and len(lines[-1] + part) > 16:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def write_pictures(drawn: Drawn, title: str, folder: Path) -> None:
    """The same plots as PNGs, and study.png with all of them."""
    import matplotlib
    from PIL import Image

    wide = max(14.0, 2.0 * (len(drawn.keys) + 1))  # inches
    pictures: dict[str, tuple[Callable[[Drawn], Any], float, float]] = {
        "history": (_history, wide / 2, 4.2),
        "importances": (_importances, wide / 2, 4.2),
        "parallel_coordinate": (_parallel_coordinate, wide, 4.8),
        "slice": (_slices, wide, 4.2),
    }
    folder.mkdir(exist_ok=True)
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.use("agg")
        warnings.simplefilter("ignore")
        from matplotlib import pyplot

        for name, (draw, width, height) in pictures.items():
            shown = draw(drawn)
            shown.set_size_inches(width, height)
            beside = name == "parallel_coordinate" or (name == "slice" and len(drawn.keys) == 1)
            shown.set_layout_engine("tight" if beside else "constrained")  # by how Optuna places the colorbar
            shown.set_dpi(100)
            with whole(folder / f"{name}.png") as temporary:
                shown.savefig(temporary, format="png", facecolor="white")
            pyplot.close(shown)
        banner = pyplot.figure(figsize=(wide, 0.5), dpi=100)
        banner.text(0.5, 0.45, title, ha="center", va="center", fontsize=13)
        banner.canvas.draw()
        head = Image.fromarray(np.asarray(banner.canvas.buffer_rgba())).convert("RGB")  # type: ignore[attr-defined]
        pyplot.close(banner)
    images = [Image.open(folder / f"{name}.png").convert("RGB") for name in pictures]
    history, importances, parallel, slices = images
    study = Image.new("RGB", (parallel.width, head.height + history.height + parallel.height + slices.height), "white")
    study.paste(head, (0, 0))
    study.paste(history, (0, head.height))
    study.paste(importances, (history.width, head.height))
    study.paste(parallel, (0, head.height + history.height))
    study.paste(slices, (0, head.height + history.height + parallel.height))
    with whole(folder / "study.png") as temporary:
        study.quantize(256).save(temporary, format="png", optimize=True)


def _error_axis(axes: Any, drawn: Drawn) -> None:
    axes.set_yscale("log")
    axes.set_ylim(*drawn.limits)
    axes.set_yticks(*drawn.ticks)
    axes.minorticks_off()


def _history(drawn: Drawn) -> Any:
    from matplotlib.ticker import MaxNLocator
    from optuna.visualization.matplotlib import plot_optimization_history

    axes = plot_optimization_history(drawn.study, target_name=drawn.name)
    _error_axis(axes, drawn)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(loc="upper right")
    return axes.figure


def _importances(drawn: Drawn) -> Any:
    from matplotlib import pyplot
    from optuna.visualization.matplotlib import plot_param_importances

    if why := drawn.importances():
        figure, axes = pyplot.subplots()
        axes.set_title("Hyperparameter Importances")
        axes.text(0.5, 0.5, why, ha="center", va="center", wrap=True)
        axes.set_axis_off()
        return figure
    axes = plot_param_importances(drawn.study, target_name=drawn.name)
    axes.margins(x=0.12)
    axes.set_ylim(
        -0.6 - max(0, 4 - len(drawn.keys)) / 2, max(4, len(drawn.keys)) - 0.4 - max(0, 4 - len(drawn.keys)) / 2
    )
    if legend := axes.get_legend():
        legend.remove()
    return axes.figure


def _parallel_coordinate(drawn: Drawn) -> Any:
    from matplotlib.ticker import LogLocator
    from optuna.visualization.matplotlib import plot_parallel_coordinate

    axes = plot_parallel_coordinate(drawn.study, target=_log10, target_name=drawn.name)
    (low, high), lines = axes.get_ylim(), axes.collections[0]
    lines.set_clim(low, high + (high - low) / 3)  # the worst is not white
    inside = [(place, label) for place, label in zip(*drawn.ticks, strict=True) if low <= math.log10(place) <= high]
    for each in axes.figure.axes[:2]:  # the second is the colorbar
        each.set_yticks([math.log10(place) for place, _ in inside], [label for _, label in inside])
        each.set_ylim(low, high)
    axes.set_xticks(axes.get_xticks(), [drawn.name, *map(_wrapped, sorted(drawn.keys))], rotation=0)
    for place in axes.get_xticks():
        axes.axvline(place, color="0.8", zorder=0)
    for each in axes.figure.axes:
        each.grid(False)
        each.set_facecolor("none")
        if each.get_yscale() == "log":
            each.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            each.yaxis.set_major_formatter("{x:g}")
            each.minorticks_off()
        for label in each.get_yticklabels():
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.8})
    return axes.figure


def _slices(drawn: Drawn) -> Any:
    from optuna.visualization.matplotlib import plot_slice

    grid = np.atleast_1d(np.asarray(plot_slice(drawn.study, target_name=drawn.name)))
    for axes in grid:
        _error_axis(axes, drawn)
        axes.set_xlabel(_wrapped(axes.get_xlabel()))
        if axes.get_xscale() == "linear" and any(label.get_text().startswith("'") for label in axes.get_xticklabels()):
            axes.set_xticks(
                axes.get_xticks(), [label.get_text().strip("'") for label in axes.get_xticklabels()], rotation=30
            )
    return grid[0].figure

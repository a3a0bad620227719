"""A study's pictures, by Optuna's own plots: a page that needs no network, and PNGs. Imports no torch.

Accuracy is drawn as the error that it leaves, on a logarithmic scale as losses are: one trial that diverged then does
not press the others into a line.
"""

from __future__ import annotations

import html
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from mnist_cnn.runs.folder import whole, write_whole
from mnist_cnn.search.study import SharedStudy


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

"""A study's pictures: history, importances, parallel coordinates and slices, as PNGs. Imports no torch.

Accuracy is drawn as the error that it leaves, on a logarithmic scale, as losses are: one trial that diverged then does
not press the others into a line, and none is cut off.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import NDArray
from optuna.trial import TrialState
from PIL import Image

from mnist_cnn.runs.folder import whole
from mnist_cnn.search.report import outcome, parameters
from mnist_cnn.search.space import text

if TYPE_CHECKING:
    from mnist_cnn.search.study import SharedStudy

COLUMNS = 5  # of slices
COMPLETE: dict[str, Any] = {"s": 22, "edgecolor": "w", "linewidths": 0.4, "vmin": 0}
SLANTED: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
PRUNED: dict[str, Any] = {"color": "0.72", "s": 16, "marker": "x", "linewidths": 0.9, "label": "pruned"}


class Axis:
    """Places of values between an axis's ends, 0 and 1; its ticks, and what stands at them.

    Args:
        name: of a parameter, or of what the study searches.
        values: all that are drawn.
        choices: that each value is one of, in their order.
        log: scale.
        percent: at the ticks.
    """

    def __init__(
        self, name: str, values: list[Any], choices: Any = None, log: bool = False, percent: bool = False
    ) -> None:
        self.name, self.log = name, log
        if choices is not None:
            self.low, self.high = -0.5, len(choices) - 0.5
            beside = 0.5 * (np.arange(len(values)) * 0.618 % 1 - 0.5)  # equal ones stand side by side
            self.places = self.place(np.array([choices.index(each) for each in values]) + beside)
            self.ticks = self.place(np.arange(len(choices)))
            self.labels = [text(each) if len(text(each)) < 16 else f"{text(each)[:14]}…" for each in choices]
        else:
            scaled = self.scaled(values)
            edge = 0.06 * np.ptp(scaled) or 0.06 * abs(scaled[0]) or 1.0
            self.low, self.high = scaled.min() - edge, scaled.max() + edge
            self.places = self.place(scaled)
            found = self._ticks()
            self.ticks = self.place(self.scaled(found))
            self.labels = [f"{100 * each:.4g}%" if percent else f"{each:.4g}" for each in found]

    def scaled(self, values: Any) -> NDArray[np.float64]:
        return np.log10(np.array(values, dtype=float)) if self.log else np.array(values, dtype=float)

    def place(self, scaled: NDArray[Any]) -> NDArray[np.float64]:
        return (scaled - self.low) / (self.high - self.low)

    def _ticks(self) -> list[float]:
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        decades = self.log and high / low > 8
        locator = (
            LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)) if decades else MaxNLocator(5, steps=[1, 2, 5, 10])
        )
        return [each for each in locator.tick_values(low, high) if low <= each <= high]


def _importances(study: optuna.Study) -> dict[str, float] | str:
    """Of each parameter, the greatest first; or why there are none, such as too few trials."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            return optuna.importance.get_param_importances(study)
    except (ValueError, RuntimeError, UserWarning) as error:
        return str(error).partition(". ")[0]


class Outcomes:
    """The trials that came to a figure, a pruned one at its last epoch, and the axes that they stand on."""

    def __init__(self, shared: SharedStudy) -> None:
        now, accuracy = shared.tally(), shared.metric == "val/accuracy"
        ended = [trial for trial in now.ended if trial.values and not math.isnan(trial.values[0])]
        self.importances: dict[str, float] | str = _importances(shared.study)
        self.failed = [trial.number for trial in now.failed]
        self.numbers = np.array([trial.number for trial in ended])
        self.complete = np.array([trial.state == TrialState.COMPLETE for trial in ended])
        values = np.array([1 - trial.values[0] if accuracy else trial.values[0] for trial in ended])
        none = values[values > 0].min(initial=1.0) / 2  # where no error at all is drawn, which has no logarithm
        self.values = np.clip(values, none, 1e30)  # an infinite loss
        name = "validation error" if accuracy else "validation loss"
        self.axis = Axis(name, self.values, log=True, percent=accuracy)
        if (values <= 0).any():
            seen = [(tick, label) for tick, label in zip(self.axis.ticks, self.axis.labels, strict=True) if tick > 0.1]
            self.axis.ticks = np.array([self.axis.place(np.log10(none)), *(tick for tick, _ in seen)])
            self.axis.labels = ["0", *(label for _, label in seen)]
        self.about = [
            f"trial {trial.number}  {outcome(shared, trial)}<br>{parameters(trial).replace(' ', '<br>')}"
            for trial in ended
        ]
        self.best = np.minimum.accumulate(np.where(self.complete, self.axis.places, np.inf))
        self.axes = []
        for key, distribution in ended[0].distributions.items():
            log, choices = getattr(distribution, "log", False), getattr(distribution, "choices", None)
            self.axes.append(Axis(key, [trial.params[key] for trial in ended], choices, log))


def _wrapped(name: str) -> str:
    return textwrap.fill(name.replace(".", ". "), 18, break_long_words=False).replace(". ", ".")


def history(figure: Figure | SubFigure, outcomes: Outcomes) -> None:
    """What each trial came to, in the order that they began, and the best so far."""
    axes, y, done = figure.subplots(), outcomes.axis.places, outcomes.complete
    if not done.all():
        axes.scatter(outcomes.numbers[~done], y[~done], **PRUNED)
    axes.scatter(outcomes.numbers[done], y[done], s=20, label="complete", zorder=3)
    axes.step(outcomes.numbers, outcomes.best, where="post", color="C3", linewidth=1.2, label="best so far")
    if outcomes.failed:
        axes.scatter(outcomes.failed, [1.0] * len(outcomes.failed), s=24, marker="x", color="k", label="failed")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_title("History", loc="left")
    axes.set(xlabel="trial", ylabel=outcomes.axis.name, ylim=(0, 1.03))
    axes.set_yticks(outcomes.axis.ticks, outcomes.axis.labels)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, fontsize=8, frameon=False, borderpad=0)


def importances(figure: Figure | SubFigure, outcomes: Outcomes) -> None:
    """How much each parameter has to do with a trial's being among the best."""
    axes, found = figure.subplots(), outcomes.importances
    axes.set_title("Importances")
    if isinstance(found, str):
        axes.text(0.5, 0.5, textwrap.fill(found, 40), ha="center", va="center")
        axes.set_axis_off()
        return
    bars = axes.barh(list(found), list(found.values()), height=0.6)
    axes.bar_label(bars, [f"{share:.0%}" for share in found.values()], padding=3)
    axes.set(xlim=(0, 1.15 * max(found.values())), xticks=[], xlabel="share, by PED-ANOVA of the complete trials")
    axes.set_ylim(max(len(found), 4) - 0.4, -0.6)
    axes.set_yticks(range(len(found)), found if len(found) > 8 else map(_wrapped, found))
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def parallel_coordinate(figure: Figure | SubFigure, outcomes: Outcomes) -> None:
    """A line for each trial through its parameters to what it came to; the darker, the better."""
    axes, across = figure.subplots(), [*outcomes.axes, outcomes.axis]
    lines = np.stack([axis.places for axis in across], 1)  # (trials, axes)
    for line in lines[~outcomes.complete]:
        axes.plot(line, color="0.88", linewidth=0.7, zorder=1)
    done = lines[outcomes.complete]
    done = done[np.argsort(-done[:, -1])]  # the best is drawn last
    for line, color in zip(done, colormaps["viridis_r"](np.linspace(1, 0, len(done))[::-1]), strict=True):
        axes.plot(line, color=color, linewidth=1.3, alpha=0.9, zorder=2)
    for x, axis in enumerate(across):
        axes.axvline(x, color="0.3", linewidth=0.8, zorder=3)
        for tick, label in zip(axis.ticks, axis.labels, strict=True):
            axes.plot(x, tick, marker="_", color="0.3", zorder=3)
            box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6}
            axes.annotate(label, (x, tick), (4, 0), textcoords="offset points", size=8, va="center", bbox=box, zorder=4)
    axes.set_title("Parallel coordinates: the darker, the better; pruned trials grey")
    axes.set(ylim=(0, 1), xlim=(-0.1, len(across) - 0.6), yticks=[])
    names = [_wrapped(axis.name) for axis in across]
    axes.set_xticks(range(len(across)), names, **(SLANTED if len(across) > 8 else {}))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def slices(figure: Figure | SubFigure, outcomes: Outcomes) -> None:
    """What the trials came to by each parameter's value."""
    columns = min(COLUMNS, len(outcomes.axes))
    rows = -(-len(outcomes.axes) // columns)
    grid = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    grid[0].set_yticks(outcomes.axis.ticks, outcomes.axis.labels)
    done, y = outcomes.complete, outcomes.axis.places
    for axes, axis in zip(grid, outcomes.axes, strict=False):
        axes.scatter(axis.places[~done], y[~done], **PRUNED)
        shown = axes.scatter(
            axis.places[done], y[done], c=outcomes.numbers[done], vmax=max(1, *outcomes.numbers), **COMPLETE
        )
        slanted = SLANTED if sum(map(len, axis.labels)) > 90 / columns else {}
        axes.set_xticks(axis.ticks, axis.labels, fontsize=8, **slanted)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel=_wrapped(axis.name))
        axes.grid(alpha=0.3)
    for axes in grid[::columns]:
        axes.set_ylabel(outcomes.axis.name)
    for axes in grid[len(outcomes.axes) :]:
        axes.set_axis_off()
    figure.colorbar(shown, ax=grid, label="trial", aspect=30, pad=0.01, ticks=MaxNLocator(5, integer=True))
    figure.suptitle("Slices: complete trials by number, pruned ones grey", fontsize="large")


DRAWN = {"history": history, "importances": importances, "parallel_coordinate": parallel_coordinate, "slices": slices}


def pictures(shared: SharedStudy, title: str) -> None:
    """pictures/*.png, and study.png with all of them; not in plots, which would be a group of the --config-dir."""
    outcomes, folder = Outcomes(shared), shared.folder / "pictures"
    folder.mkdir(exist_ok=True)
    high = 0.7 + 2.7 * -(-len(outcomes.axes) // COLUMNS)  # inches, of the slices
    wide = max(11, 1.1 * len(outcomes.axes))
    sizes = {"history": (7, 4), "importances": (6, 4), "parallel_coordinate": (wide, 4.6), "slices": (11, high)}
    together = Figure(figsize=(wide, 3.8 + 4.4 + high), layout="constrained")
    together.suptitle(title, fontsize="large")
    top, middle, bottom = together.subfigures(3, 1, squeeze=False, height_ratios=[3.8, 4.4, high])[:, 0]
    places = dict(zip(DRAWN, [*top.subfigures(1, 2, width_ratios=[1.2, 1]), middle, bottom], strict=True))
    for name, draw in DRAWN.items():
        figure = Figure(figsize=sizes[name], layout="constrained")
        draw(figure, outcomes)
        draw(places[name], outcomes)
        _save(figure, folder / f"{name}.png")
    _save(together, folder / "study.png")


def _save(figure: Figure, file: Path) -> None:
    """As 256 colours, which is a third of the bytes."""
    figure.set_dpi(110)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)
    with whole(file) as temporary:
        picture.save(temporary, "png", optimize=True)

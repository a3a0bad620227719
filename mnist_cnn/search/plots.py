"""A study's pictures, by Optuna's own plots: a page that needs no network, and PNGs. Imports no torch.

Accuracy is drawn as the error that it leaves, on a logarithmic scale as losses are: one trial that diverged then does
not press the others into a line.
"""

from __future__ import annotations

import html
import math
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from mnist_cnn.runs.files import whole, write_whole
from mnist_cnn.search.study import SharedStudy

LEAST = 1e-6  # an error of 0 has no logarithm


def write_plots(shared: SharedStudy, title: str, about: str) -> None:
    """report.html, and the same plots in pictures/."""
    study, name = study_of_errors(shared)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            optuna.importance.get_param_importances(study)
        why = ""
    except (ValueError, RuntimeError, UserWarning) as error:  # such as too few trials
        why = str(error).partition(". ")[0]
    write_page(study, name, title, about, why, shared.folder / "report.html")
    write_pictures(study, name, not why, shared.folder / "pictures")


def study_of_errors(shared: SharedStudy) -> tuple[optuna.Study, str]:
    """A copy of the study whose metric is an error or a loss greater than 0, and the name of that.

    What came to no figure is failed there, so that numbers stay.
    """
    accuracy = shared.metric == "val/accuracy"
    study = optuna.create_study(direction="minimize")
    for trial in shared.trials():
        value = trial.values[0] if trial.state == TrialState.COMPLETE else math.nan
        value = max(1 - value if accuracy else value, LEAST) if math.isfinite(value) else None
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        study.add_trial(create_trial(state=state, value=value, params=trial.params, distributions=trial.distributions))
    return study, "validation error" if accuracy else "validation loss"


def _log10(trial: FrozenTrial) -> float:
    return math.log10(trial.values[0])


def write_page(study: optuna.Study, name: str, title: str, about: str, why: str, file: Path) -> None:
    """The plots to point at and zoom in; `why` there are no importances, or nothing."""
    from optuna import visualization

    axis = {"type": "log", "dtick": "D2", "tickformat": ".2~%" if "error" in name else ".2~g"}
    figures = [
        visualization.plot_optimization_history(study, target_name=name).update_yaxes(axis),
        visualization.plot_parallel_coordinate(study, target=_log10, target_name=f"log10 of {name}"),
        visualization.plot_slice(study, target_name=name).update_yaxes(axis),
    ]
    if not why:
        figures.append(visualization.plot_param_importances(study, target_name=name))
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(about)}</p>"]
    for number, figure in enumerate(figures):
        figure.update_layout(template="plotly_white").update_yaxes(automargin=True)
        parts.append(figure.to_html(full_html=False, include_plotlyjs=not number, config={"displaylogo": False}))
    if why:
        parts.append(f"<p>No importances of the parameters: {html.escape(why)}</p>")
    style = "body{font-family:sans-serif;max-width:1300px;margin:2em auto;padding:0 1em} h1{font-size:1.4em}"
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    body = "\n".join(parts)
    write_whole(file, f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n')


def write_pictures(study: optuna.Study, name: str, importances: bool, folder: Path) -> None:
    """The plots as PNGs."""
    import matplotlib

    folder.mkdir(exist_ok=True)
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.use("agg")
        warnings.simplefilter("ignore")
        from matplotlib import pyplot
        from optuna.visualization import matplotlib as visualization

        plots: dict[str, Any] = {
            "history": visualization.plot_optimization_history(study, target_name=name),
            "parallel_coordinate": visualization.plot_parallel_coordinate(
                study, target=_log10, target_name=f"log10 of {name}"
            ),
            "slice": visualization.plot_slice(study, target_name=name),
        }
        if importances:
            plots["importances"] = visualization.plot_param_importances(study, target_name=name)
        for plot, axes in plots.items():
            first: Any = axes if hasattr(axes, "figure") else axes.flat[0]
            if plot in ("history", "slice"):  # those of a slice share theirs
                first.set_yscale("log")
                for each in first.figure.axes if plot == "slice" else ():
                    each.tick_params("x", labelrotation=25)  # names of options are longer than their place
            elif plot == "parallel_coordinate":
                first.figure.set_size_inches(max(6.4, 2 * len(first.get_xticks())), 4.8)
                for each in first.figure.axes:
                    each.grid(False)
            with whole(folder / f"{plot}.png") as temporary:
                first.figure.savefig(temporary, format="png", bbox_inches="tight")
            pyplot.close(first.figure)

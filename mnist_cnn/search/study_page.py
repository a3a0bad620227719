"""A study's pictures on one page, to point at, zoom and select in; it needs no network. Imports no torch."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from plotly import graph_objects
from plotly.subplots import make_subplots

from mnist_cnn.runs.folder import write_whole
from mnist_cnn.search.study_plots import COLUMNS, Axis, Outcomes

if TYPE_CHECKING:
    from mnist_cnn.search.study import SharedStudy

STYLES: dict[str, dict[str, Any]] = {
    "pruned": {"color": "#bbb", "symbol": "x-thin", "size": 6, "line": {"width": 1, "color": "#aaa"}},
    "complete": {"color": "#1f77b4", "size": 7},
}


def page(shared: SharedStudy, title: str, about: str) -> None:
    """Write report.html, which holds all that it shows."""
    outcomes = Outcomes(shared)
    figures = {
        "History": history(outcomes),
        "Importances: shares, by PED-ANOVA of the complete trials": importances(outcomes),
        "Parallel coordinates of the complete trials: the darker, the better; drag along an axis to select": (
            parallel_coordinate(outcomes)
        ),
        "Slices": slices(outcomes),
    }
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(about)}</p>"]
    for number, (head, figure) in enumerate(figures.items()):
        parts.append(f"<h2>{head}</h2>")
        if isinstance(figure, str):
            parts.append(f"<p>{html.escape(figure)}</p>")
            continue
        figure.update_layout(template="simple_white", margin={"l": 70, "r": 40, "t": 30, "b": 60})
        figure.update_yaxes(showgrid=True).update_layout(height=figure.layout.height or 420)
        parts.append(figure.to_html(full_html=False, include_plotlyjs=not number, config={"displaylogo": False}))
    style = "body{font-family:sans-serif;max-width:1300px;margin:2em auto} h1{font-size:1.4em} h2{font-size:1.1em}"
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    body = "\n".join(parts)
    document = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'
    write_whole(shared.folder / "report.html", document)


def ticks(axis: Axis) -> dict[str, Any]:
    return {"range": (0, 1), "tickvals": axis.ticks, "ticktext": axis.labels}


def points(outcomes: Outcomes, places: Any) -> Iterator[Any]:
    """The trials above their places, pruned ones apart; what one is stands beside it."""
    for name, mask in {"pruned": ~outcomes.complete, "complete": outcomes.complete}.items():
        chosen = [outcomes.about[n] for n in np.flatnonzero(mask)]
        yield graph_objects.Scatter(
            x=places[mask],
            y=outcomes.axis.places[mask],
            mode="markers",
            marker=STYLES[name],
            hovertext=chosen,
            hoverinfo="text",
            name=name,
        )


def history(outcomes: Outcomes) -> Any:
    figure = graph_objects.Figure(list(points(outcomes, outcomes.numbers)))
    line = {"shape": "hv", "color": "#d62728", "width": 1.5}
    figure.add_scatter(
        x=outcomes.numbers, y=outcomes.best, mode="lines", line=line, name="best so far", hoverinfo="skip"
    )
    if outcomes.failed:
        marker, heights = {"color": "black", "symbol": "x", "size": 7}, [1.0] * len(outcomes.failed)
        figure.add_scatter(x=outcomes.failed, y=heights, mode="markers", marker=marker, name="failed")
    figure.update_xaxes(title="trial")
    return figure.update_yaxes(title=outcomes.axis.name, **{**ticks(outcomes.axis), "range": (0, 1.03)})


def importances(outcomes: Outcomes) -> Any:
    found = outcomes.importances
    if isinstance(found, str):
        return found
    shares = list(found.values())
    bars = graph_objects.Bar(y=list(found), x=shares, text=[f"{share:.0%}" for share in shares], orientation="h")
    figure = graph_objects.Figure(bars).update_yaxes(autorange="reversed", automargin=True)
    return figure.update_layout(height=120 + 40 * len(found)).update_xaxes(tickformat=".0%")


def parallel_coordinate(outcomes: Outcomes) -> Any:
    done = outcomes.complete
    ranks = np.argsort(np.argsort(outcomes.values[done]))
    dimensions = [
        {"label": axis.name.replace(".", ".<br>", len(axis.name) > 16), "values": axis.places[done], **ticks(axis)}
        for axis in (*outcomes.axes, outcomes.axis)
    ]
    lines = graph_objects.Parcoords(
        labelside="bottom", line={"color": ranks, "colorscale": "Viridis"}, dimensions=dimensions
    )
    return graph_objects.Figure(lines).update_layout(height=460)


def slices(outcomes: Outcomes) -> Any:
    columns = min(COLUMNS, len(outcomes.axes))
    rows = -(-len(outcomes.axes) // columns)
    figure = make_subplots(rows, columns, shared_yaxes=True, horizontal_spacing=0.02, vertical_spacing=0.32 / rows)
    for number, axis in enumerate(outcomes.axes):
        place = {"row": number // columns + 1, "col": number % columns + 1}
        for each in points(outcomes, axis.places):
            figure.add_trace(each, **place)
        figure.update_xaxes(title=axis.name, **ticks(axis), **place)
    figure.update_yaxes(**ticks(outcomes.axis))
    figure.update_yaxes(title=outcomes.axis.name, col=1)
    return figure.update_layout(height=60 + 340 * rows, showlegend=False)

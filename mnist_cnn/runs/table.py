"""A sweep's table, from what each job has left in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from mnist_cnn.runs.plan import settings_of

INTERRUPTED = "interrupted"


def state(folder: Path) -> str:
    """What a job has left in its folder."""
    for file, name in (("metrics.json", "finished"), ("error.txt", "failed"), ("config.yaml", "interrupted")):
        if (folder / file).is_file():
            return name
    return "not begun"


def number(folder: Path) -> tuple[float, str]:
    """Where a job stands in its sweep: by the number that its folder's name begins with."""
    first = folder.name.split("_")[0]
    return (int(first) if first.isdigit() else float("inf"), folder.name)


def job_row(folder: Path, name: str, words: list[str] | None) -> dict[str, Any]:
    """A line of a sweep's results.csv; `words` are read from the folder where nobody planned them."""
    if words is None:
        words = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text(encoding="utf-8")) or []
    metrics: dict[str, Any] = {}
    reason = ""
    if state(folder) == "finished":
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    else:
        reason = failure(folder) or INTERRUPTED
    figures = {key: metrics.get(key) for key in ("val/accuracy", "test/accuracy", "fit_seconds")}
    return {"job": name, "overrides": " ".join(settings_of(words)), **figures, "error": reason}


def failure(folder: Path) -> str:
    """Why a job failed: the first line of its error.txt, below which a traceback may stand."""
    error = folder / "error.txt"
    return error.read_text(encoding="utf-8").partition("\n")[0] if error.is_file() else ""


def results_table(rows: list[dict[str, Any]]) -> str:
    def percent(value: float | None) -> str:
        return "–" if value is None else f"{value:.2%}"

    width = max(len("overrides"), *(len(row["overrides"]) for row in rows))
    lines = [f"{'overrides':<{width}}  validation     test  seconds"]
    for row in rows:
        seconds = "–" if row["fit_seconds"] is None else f"{row['fit_seconds']:.1f}"
        figures = f"{percent(row['val/accuracy']):>10} {percent(row['test/accuracy']):>8} {seconds:>8}"
        note = {"": "", INTERRUPTED: f"  {INTERRUPTED}"}.get(row["error"], f"  failed: {row['error']}")
        lines.append(f"{row['overrides']:<{width}}  {figures}{note}")
    return "\n".join(lines)

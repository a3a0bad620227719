"""Jobs as Hydra runs them: refused before a folder is made, guarded while they work, listed after a sweep."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from mnist_cnn.command import in_one_line, plain, refuse
from mnist_cnn.config import Evaluate, Export, Import, Predict, Train
from mnist_cnn.parameters import Sweep
from mnist_cnn.runs import read_run, refuse_occupied, write_csv, write_whole
from mnist_cnn.schema import RunError, Strict, UserError, validated

log = logging.getLogger(__name__)

SCHEMAS: dict[str, type[Strict]] = {
    "train": Train,
    "evaluate": Evaluate,
    "predict": Predict,
    "export": Export,
    "import": Import,
    "sweep": Sweep,
}
_claimed: set[Path] = set()  # folders that this process made for itself
_planned: list[list[str]] = []  # the overrides of each job of this process's sweep


class RunFolder(Callback):
    """Hydra's hooks around a command: refuse bad input before a folder is made, claim it, list a sweep's jobs."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        try:
            name = config.hydra.job.config_name
            settings = validated(SCHEMAS[name], plain_job(config))
            if isinstance(settings, Train) and settings.resume:
                folder = Path(settings.resume)
                read_run(folder)
                # Hydra's own record of the first start stays as it is.
                set_hydra(config, folder, output_subdir=None)
            elif config.hydra.output_subdir is not None:
                set_hydra(config, claim(Path(config.hydra.run.dir), chosen(config, "hydra.run.dir")))
        except (UserError, OSError, OmegaConfBaseException) as error:
            refuse(in_one_line(error, config.hydra.job.config_name), error)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        name = config.hydra.job.config_name
        try:
            _planned[:] = planned_jobs(config)
            for job in _planned:
                composed = hydra.compose(name, job, return_hydra_config=True)
                settings = validated(SCHEMAS[name], plain_job(composed))
                if isinstance(settings, Train) and settings.resume:
                    raise UserError("resume continues one run: leave out -m")
            with read_write(config.hydra):
                folder = claim(Path(config.hydra.sweep.dir), chosen(config, "hydra.sweep.dir"))
                config.hydra.sweep.dir = str(folder)
        except (UserError, OSError, OmegaConfBaseException) as error:
            refuse(in_one_line(error, name), error)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        if config.hydra.job.config_name == "train" and any(
            row["error"] for row in conclude(Path(config.hydra.sweep.dir))
        ):
            raise SystemExit(1)


def conclude(folder: Path) -> list[dict[str, Any]]:
    """Write and show a sweep's table of the jobs that have begun."""
    rows = [job_row(job.parent) for job in sorted(folder.glob("*/.hydra"), key=lambda job: number(job.parent))]
    if rows:
        # Best first by validation; a sweep without validation stays in the order of its jobs.
        rows.sort(key=lambda row: -(row["val/accuracy"] or 0.0))
        write_csv(folder / "results.csv", rows)
        log.info("%s\n%s", results_table(rows), folder / "results.csv")
    return rows


def stop_sweep(folder: Path) -> None:
    """Say which jobs of a sweep are done, which one was stopped, and what was not begun."""
    rows = conclude(folder)
    done = sorted((row["job"] for row in rows if not row["error"]), key=lambda job: number(Path(job)))
    left = [" ".join(job) for job in _planned[len(rows) :]]
    log.error(
        "the sweep was stopped: %d of %d jobs are done%s; not begun: %s",
        len(done),
        len(_planned),
        f" ({', '.join(done)})" if done else "",
        " | ".join(left) or "none",
    )


def plain_job(config: DictConfig, folder: Path = Path()) -> dict[str, Any]:
    """The job's part of a composed configuration, resolved for a run in `folder`, without Hydra's own part."""
    previous = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        runtime: Any = HydraConfig.get().runtime
        with read_write(runtime):
            runtime.output_dir = str(folder)
        return plain(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
    finally:
        HydraConfig.instance().cfg = previous


def chosen(config: DictConfig, key: str) -> bool:
    return any(override.lstrip("+").startswith(f"{key}=") for override in config.hydra.overrides.hydra)


def set_hydra(config: DictConfig, folder: Path, **settings: Any) -> None:
    with read_write(config.hydra):
        config.hydra.run.dir = str(folder)
        for key, value in settings.items():
            config.hydra[key] = value


def planned_jobs(config: DictConfig) -> list[list[str]]:
    """The overrides of every job of Hydra's own sweeper; another one plans its jobs as it goes."""
    if not config.hydra.sweeper._target_.endswith("BasicSweeper"):
        return []
    swept = (config.hydra.sweeper.params or {}).items()
    words = [*(f"{key}={value}" for key, value in swept), *config.hydra.overrides.task]
    batches = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)
    return [list(job) for batch in batches for job in batch]


def claim(folder: Path, by_user: bool = False) -> Path:
    """Make a folder: the user's, which must hold no run, or else the first free of `folder`, `folder_2`, `folder_3`…

    Raises:
        UserError: the user's folder holds a run or a sweep already.
    """
    if by_user and folder == Path():
        raise UserError("hydra.run.dir is empty: name a folder")
    for attempt in count(1):
        candidate = folder if attempt == 1 else folder.with_name(f"{folder.name}_{attempt}")
        try:
            candidate.mkdir(parents=True)
            _claimed.add(candidate.absolute())
            return candidate
        except FileExistsError:
            if not candidate.is_dir():
                raise
            if by_user:
                refuse_occupied(candidate)
                return candidate
    raise AssertionError


def discard(folder: Path) -> None:
    """Remove a folder that this process made for itself and began nothing in."""
    if folder.absolute() in _claimed and not (folder / "config.yaml").exists():
        shutil.rmtree(folder, ignore_errors=True)


def number(job: Path) -> tuple[float, str]:
    """Where a job stands in its sweep: by the number that its folder's name begins with."""
    first = job.name.split("_")[0]
    return (int(first) if first.isdigit() else float("inf"), job.name)


def job_row(folder: Path) -> dict[str, Any]:
    """A line of a sweep's results.csv."""
    overrides = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
    metrics: dict[str, Any] = {}
    reason = ""
    if (folder / "metrics.json").is_file():
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    else:
        error = folder / "error.txt"
        reason = error.read_text(encoding="utf-8").strip() if error.is_file() else "did not finish"
    keys = ("val/accuracy", "test/accuracy", "fit_seconds")
    figures = {key: metrics.get(key) for key in keys}
    return {"job": folder.name, "overrides": " ".join(overrides), **figures, "error": reason}


def results_table(rows: list[dict[str, Any]]) -> str:
    def percent(value: float | None) -> str:
        return "–" if value is None else f"{value:.2%}"

    width = max(len("overrides"), *(len(row["overrides"]) for row in rows))
    lines = [f"{'overrides':<{width}}  validation     test  seconds"]
    for row in rows:
        seconds = "–" if row["fit_seconds"] is None else f"{row['fit_seconds']:.1f}"
        figures = f"{percent(row['val/accuracy']):>10} {percent(row['test/accuracy']):>8} {seconds:>8}"
        lines.append(f"{row['overrides']:<{width}}  {figures}{'  failed: ' + row['error'] if row['error'] else ''}")
    return "\n".join(lines)


def guarded(work: Callable[[], Any], folder: Path) -> Any:
    """A job's failures as the contract has them; in a sweep they are reported and the other jobs go on."""
    try:
        return work()
    except UserError as error:
        status, reason = 2, str(error)
    except RunError as error:
        status, reason = 1, str(error)
    except OSError as error:
        status, reason = 1, in_one_line(error, "train")
    except SystemExit as stopped:
        discard(folder)
        if HydraConfig.get().mode == RunMode.MULTIRUN and stopped.code not in (None, 0, 1, 2):
            stop_sweep(Path(HydraConfig.get().sweep.dir))
        raise
    reason = " ".join(reason.split())
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        log.error("error: job %s: %s", folder.name, reason)
        write_whole(folder / "error.txt", reason + "\n")
        return None
    log.error("error: %s", reason)
    discard(folder)
    raise SystemExit(status)

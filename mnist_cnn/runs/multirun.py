"""Sweeps by `mnist-train -m`: all jobs checked before the first begins, a table at the end, and the way on from there.

Hydra's sweeper and launchers run the jobs; what a job has done is read from its folder.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, configure_log
from hydra.experimental.callback import Callback
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from mnist_cnn.config.schema import UserError, validated
from mnist_cnn.config.settings import Train
from mnist_cnn.runs import hydra_app
from mnist_cnn.runs.errors import in_one_line, refuse
from mnist_cnn.runs.folder import claim, override_key, read_metrics, release, write_csv
from mnist_cnn.runs.hydra_app import chosen, config_dir_flag, job_title, literal, plain_job, user_config_dir
from mnist_cnn.runs.machine import GPUS, cores, visible_gpus
from mnist_cnn.runs.strangers import plain_override
from mnist_cnn.runs.sweep_record import (
    RECORD,
    Job,
    continued,
    job_overrides,
    read_record,
    recorded_words,
    require_same,
    write_record,
)

log = logging.getLogger(__name__)

ACCURACIES = {"validation": "val/accuracy", "test": "test/accuracy"}


@dataclass
class Sweep:
    """The sweep that this process runs."""

    folder: Path
    jobs: list[Job]
    config: DictConfig
    handlers: dict[int, Any]  # of signals, from before the sweep
    ended: bool = False


current: Sweep | None = None


# --- Hydra's hooks -----------------------------------------------------------------------------------------


class MultirunCallback(Callback):
    """Hydra's hooks of a sweep: all jobs checked, the folder claimed, a line for a worker's job, a table at the end."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        global current
        name = config.hydra.job.config_name
        try:
            jobs = planned(config)
            folder, by_user = Path(config.hydra.sweep.dir), chosen(config, "hydra.sweep.dir")
            begun = any((folder / file).exists() for file in (RECORD, "multirun.yaml"))
            if name == "train" and jobs and by_user and begun:
                claim(folder, by_user, lambda _: require_same(folder, config, jobs))
            else:
                folder = claim(folder, by_user)
            if name == "train" and jobs:
                jobs = [job._replace(folder=folder / job.folder) for job in jobs]
                current = Sweep(folder, jobs, config, _stop_at_signals())
                write_record(folder, config)
                report_states(current)
            hydra_app.sweep_process = os.getpid()
            share_machine(config, jobs)
            _set_everywhere(config, "hydra.sweep.dir", str(folder.absolute()))
        except Exception as error:  # Hydra would warn of it and go on
            refuse(in_one_line(error, name), error)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        if hydra_app.in_worker() and config.hydra.job.config_name == "train":
            for handler in logging.getLogger().handlers:
                if isinstance(handler, hydra_app.Console):  # it shows the lines of this module only
                    handler.addFilter(logging.Filter(__name__))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if hydra_app.in_worker() and config.hydra.job.config_name == "train":
            details = HydraConfig.get()
            report_end(Path(details.runtime.output_dir), job_title(details.job.num, details.overrides.task))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        if current is None:  # of another command or sweeper: its jobs' lines are all there is
            failed = any(Path(config.hydra.sweep.dir).glob("*/error.txt"))
        else:
            rows = conclude(current)
            unfinished = sum(bool(row["error"]) for row in rows)
            failed = unfinished > 0
            if failed:
                log.error("%d of %d jobs failed%s", unfinished, len(rows), continue_line(current))
        if failed:
            raise SystemExit(1)


def run_sweep(task: Callable[[], Any]) -> None:
    """Run a `@hydra.main` task; where it is a sweep that breaks off, end it with its table and how to continue."""
    global current
    sys.argv[1:] = continued(sys.argv[1:])
    try:
        task()
    except BaseException as error:
        refused = isinstance(error, SystemExit) and error.code in (None, 0, 2)
        if current is None or current.ended or refused:
            raise
        if isinstance(error, Exception):  # of a launcher; what fails in a job is reported there
            if not any(job.folder.exists() for job in current.jobs):
                raise
            log.error("error: the sweep broke off: %.300s", " ".join(f"{type(error).__name__}: {error}".split()))
        report_stop(current)
        raise SystemExit(error.code if isinstance(error, SystemExit) else 1) from None
    finally:
        if current:
            for number, handler in current.handlers.items():
                signal.signal(number, handler)
            release(current.folder)
        current = hydra_app.sweep_process = None


def _stop_at_signals() -> dict[int, Any]:
    """Ctrl-C and SIGTERM end the sweep between two jobs; a job that trains here deals with them itself."""
    if threading.current_thread() is not threading.main_thread():
        return {}

    def stop(signum: int, _: Any) -> None:
        for number in before:
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        raise SystemExit(128 + signum)

    before: dict[int, Any] = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    return before


def _set_everywhere(config: DictConfig, key: str, value: Any) -> None:
    """Set a key of Hydra's for the sweep and for each of its jobs, wherever they are composed anew."""
    with read_write(config.hydra), open_dict(config.hydra):
        OmegaConf.update(config, key, value)
        config.hydra.overrides.hydra.append(literal(key, value) if isinstance(value, str) else f"{key}={value}")


# --- jobs before they begin --------------------------------------------------------------------------------


def planned(config: DictConfig) -> list[Job]:
    """Every job of Hydra's own sweeper, its settings checked, its folder still relative to the sweep's.

    Another sweeper plans its jobs as it goes: none is known then.

    Raises:
        UserError: a job's settings are wrong, or two jobs have one folder.
    """
    sweeper: Any = get_class(config.hydra.sweeper._target_)
    if not hasattr(sweeper, "split_arguments"):
        return []
    loader = GlobalHydra.instance().config_loader()
    parameters = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parsed = OverridesParser.create(loader).parse_overrides([*parameters, *config.hydra.overrides.task])
    jobs: dict[Path, Job] = {}
    for number, overrides in enumerate(sweeper.split_arguments(parsed, None)[0]):
        composed = loader.load_sweep_config(config, list(overrides))
        with open_dict(composed.hydra.job):
            composed.hydra.job.id = composed.hydra.job.num = number
        settings = validated(hydra_app.SCHEMAS[config.hydra.job.config_name], plain_job(composed))
        if isinstance(settings, Train) and settings.resume:
            raise UserError("resume continues one run: leave out -m; a sweep is continued by multirun.resume=FOLDER")
        folder = Path(str(composed.hydra.sweep.subdir))
        if folder in jobs:
            raise UserError(
                f"hydra.sweep.subdir={folder} is the folder of jobs {jobs[folder].number} and {number} alike; "
                "let it contain ${hydra.job.num}"
            )
        jobs[folder] = Job(number, list(overrides), folder, settings)
    return list(jobs.values())


def share_machine(config: DictConfig, jobs: list[Job]) -> None:
    """Say which GPUs the jobs share, and how many run at once: as many as there are GPUs, or else cores, or jobs."""
    accelerators = {job.settings.accelerator.name for job in jobs if isinstance(job.settings, Train)}
    gpus = [] if accelerators == {"cpu"} else visible_gpus()
    os.environ[GPUS] = ",".join(gpus)
    launcher = config.hydra.launcher._target_.rpartition(".")[2]
    limits = {"JoblibLauncher": "hydra.launcher.n_jobs", "LocalLauncher": "hydra.sweeper.max_batch_size"}
    if key := limits.get(launcher):
        asked = OmegaConf.select(config, key) or 0
        at_once = asked if asked > 0 else len(gpus) or cores()
        _set_everywhere(config, key, min(at_once, len(jobs) or at_once))


def with_own_threads(settings: Train) -> Train:
    """A job's settings with the threads that its launcher gives it: they are part of the bits, and of config.yaml."""
    threads = os.environ.get("OMP_NUM_THREADS", "") if hydra_app.in_worker() else ""
    if not threads.isdigit() or settings.accelerator.threads is not None:
        return settings
    accelerator = settings.accelerator.model_copy(update={"threads": int(threads)})
    return settings.model_copy(update={"accelerator": accelerator})


# --- what jobs have done -----------------------------------------------------------------------------------


def state(folder: Path) -> str:
    """What a job has left in its folder: `finished`, `failed`, `interrupted` or `not begun`."""
    with suppress(UserError):  # a damaged one is none
        read_metrics(folder)
        return "finished"
    for file, name in (("error.txt", "failed"), ("config.yaml", "interrupted")):
        if (folder / file).is_file():
            return name
    return "not begun"


def failure(folder: Path) -> str:
    """Why a job failed: the first line of its error.txt, below which a traceback may stand."""
    error = folder / "error.txt"
    return error.read_text(encoding="utf-8").partition("\n")[0] if error.is_file() else ""


def report_states(sweep: Sweep) -> None:
    """Of a sweep that is continued: which of its jobs are kept, resumed, run again or run."""
    states = {job.folder: state(job.folder) for job in sweep.jobs}
    if set(states.values()) <= {"not begun"}:
        return
    done = list(states.values()).count("finished")
    log.info("continuing %s: %d of %d jobs are done", sweep.folder, done, len(states))
    verbs = {"finished": "kept", "interrupted": "resumed", "failed": "failed, run again", "not begun": "run"}
    for folder, name in states.items():
        log.info("\t%s: %s", folder.relative_to(sweep.folder), verbs[name])
        (folder / "error.txt").unlink(missing_ok=True)  # its train.log has the reason too


def report_end(folder: Path, title: str) -> None:
    """One line on how a job of another process has ended."""
    how = state(folder)
    if how == "failed":
        log.error("error: %s: %s", title, failure(folder))
        return
    if how == "finished":
        metrics = read_metrics(folder)
        test = f"test accuracy {metrics['test/accuracy']:.2%}, " if metrics.get("test/accuracy") is not None else ""
        how = f"{test}{metrics['fit_seconds']:.1f} s"
    log.info("%s: %s", title, how)


def conclude(sweep: Sweep) -> list[dict[str, Any]]:
    """Write results.csv and show it as a table: the jobs that have begun, best first by validation."""
    configure_log(sweep.config.hydra.hydra_logging, sweep.config.hydra.verbose)  # the last job's may still be there
    sweep.ended = True
    rows = []
    for job in sweep.jobs:
        if (how := state(job.folder)) == "not begun":
            continue
        finished = how == "finished"
        metrics = read_metrics(job.folder) if finished else {}
        row: dict[str, Any] = {
            "job": str(job.folder.relative_to(sweep.folder)),
            "overrides": " ".join(job_overrides(job.overrides)),
            **{override_key(word): word.partition("=")[2] for word in job_overrides(job.overrides)},
        }
        row |= {key: metrics.get(key) for key in ("val/accuracy", "test/accuracy", "fit_seconds")}
        rows.append({**row, "error": "" if finished else failure(job.folder) or how})
    if rows:
        rows.sort(key=lambda row: -(row["val/accuracy"] or 0.0))  # without validation in the order of the jobs
        write_csv(sweep.folder / "results.csv", rows)
        log.info("%s\n%s%s", results_table(rows), over_seeds(rows), sweep.folder / "results.csv")
    return rows


def results_table(rows: list[dict[str, Any]]) -> str:
    def percent(value: float | None) -> str:
        return "–" if value is None else f"{value:.2%}"

    width = max(len("overrides"), *(len(row["overrides"]) for row in rows))
    lines = [f"{'overrides':<{width}}  validation     test  seconds"]
    for row in rows:
        seconds = "–" if row["fit_seconds"] is None else f"{row['fit_seconds']:.1f}"
        figures = f"{percent(row['val/accuracy']):>10} {percent(row['test/accuracy']):>8} {seconds:>8}"
        note = {"": "", "interrupted": "  interrupted"}.get(row["error"], f"  failed: {row['error']}")
        lines.append(f"{row['overrides']:<{width}}  {figures}{note}")
    return "\n".join(lines)


def over_seeds(rows: list[dict[str, Any]]) -> str:
    """A line for each set of overrides that several seeds share: mean ± sd of their accuracies."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if not row["error"]:
            others = [word for word in row["overrides"].split() if override_key(word) != "seed"]
            groups.setdefault(" ".join(others), []).append(row)
    lines = []
    for overrides, group in groups.items():
        figures = {name: [100 * row[key] for row in group if row[key]] for name, key in ACCURACIES.items()}
        shown = [f"{name} {mean(f):.2f} ± {stdev(f):.2f} %" for name, f in figures.items() if len(f) == len(group) > 1]
        if shown:
            lines.append(f"{overrides}  {', '.join(shown)} ({len(group)} seeds)\n".lstrip())
    return "".join(lines)


def report_stop(sweep: Sweep) -> None:
    """The end of a sweep that broke off: its table, which jobs are done, and which were not begun."""
    rows = conclude(sweep)
    done = [row["job"] for row in rows if not row["error"]]
    waiting = [" ".join(job_overrides(job.overrides)) for job in sweep.jobs if state(job.folder) == "not begun"]
    failed = any(state(job.folder) == "failed" for job in sweep.jobs)
    log.error(
        "the sweep was stopped%s: %d of %d jobs are done%s; not begun: %s%s",
        ", as fail_fast=true" if sweep.config.get("fail_fast") and failed else "",
        len(done),
        len(sweep.jobs),
        f" ({', '.join(done)})" if done else "",
        " | ".join(waiting) or "none",
        continue_line(sweep),
    )


def continue_line(sweep: Sweep) -> str:
    """The command that continues it, with what its folder alone may not name."""
    words = [*config_dir_flag(user_config_dir(sweep.config.hydra)), f"multirun.resume={sweep.folder.absolute()}"]
    again = [word for word in recorded_words(read_record(sweep.folder)).values() if not plain_override(word)]
    return f"; continue with: {shlex.join(['mnist-train', '-m', *words, *again])}"

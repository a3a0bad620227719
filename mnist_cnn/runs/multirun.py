"""A sweep of mnist-train as it goes: alone in its folder, stopped by a signal, ended with its table."""

from __future__ import annotations

import logging
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.utils import configure_log
from omegaconf import DictConfig, OmegaConf

from mnist_cnn.runs.folder import alone_in, write_csv, write_whole
from mnist_cnn.runs.plan import RECORD, Job, continued, settings_of
from mnist_cnn.runs.table import job_row, number, results_table, state
from mnist_cnn.runs.worker import STOP

log = logging.getLogger(__name__)


@dataclass
class Sweep:
    """What a process knows of the sweep that it runs."""

    folder: Path
    jobs: list[Job]  # none where a sweeper other than Hydra's own plans them as it goes
    config: DictConfig
    halt: Callable[[], None] = lambda: None  # ends the jobs of other processes
    all_told: Callable[[], None] = lambda: None  # waits until each end of a job there has been told
    over: threading.Event = field(default_factory=threading.Event)
    stopped_by_failure: bool = False
    concluded: bool = False
    cleanup: ExitStack = field(default_factory=ExitStack)

    @property
    def fail_fast(self) -> bool:
        return bool(self.config.get("fail_fast"))

    def folders(self) -> list[Path]:
        """Of the jobs that are planned, or else of those that have begun."""
        return [job.folder for job in self.jobs] or sorted(
            (path.parent for path in self.folder.glob("*/.hydra")), key=number
        )


_sweeps: list[Sweep] = []


def current() -> Sweep | None:
    """The sweep that this process runs; none in a process that only works on a job of one."""
    return _sweeps[-1] if _sweeps else None


def begin(config: DictConfig, folder: Path, jobs: list[Job]) -> Sweep:
    """This process runs the sweep in `folder` from here on, alone; SIGINT and SIGTERM end it with its table.

    Raises:
        UserError: another process runs it.
    """
    sweep = Sweep(folder, [job._replace(folder=folder / job.folder) for job in jobs], config)
    sweep.cleanup.enter_context(alone_in(folder))
    _sweeps.append(sweep)
    sweep.cleanup.enter_context(_stoppable(sweep))
    (folder / STOP).unlink(missing_ok=True)
    if not (copy := folder / f".{RECORD}").exists():
        write_whole(copy, OmegaConf.to_yaml(config))
    found = {job.folder: state(job.folder) for job in sweep.jobs}
    if set(found.values()) - {"not begun"}:
        finished = list(found.values()).count("finished")
        log.info("continuing %s: %d of %d jobs are done", folder, finished, len(found))
        means = {"finished": "kept", "interrupted": "resumed", "failed": "failed, run again", "not begun": "run"}
        for job_folder, name in found.items():
            log.info("\t%s: %s", job_folder.relative_to(folder), means[name])
            if name == "failed":
                (job_folder / "error.txt").unlink()  # its train.log has the reason too
    return sweep


@contextmanager
def _stoppable(sweep: Sweep) -> Iterator[None]:
    def stop(signum: int, _: Any) -> None:
        for number in before:
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        sweep.halt()
        raise SystemExit(1 if sweep.stopped_by_failure else 128 + signum)

    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def swept(task: Callable[[], Any]) -> None:
    """Run a `@hydra.main` task; where it is a sweep, end it with its table and how to continue, whatever ends it."""
    sys.argv[1:] = continued(sys.argv[1:])
    try:
        task()
    except BaseException as error:
        sweep = current()
        failed = isinstance(error, Exception)
        refused = isinstance(error, SystemExit) and error.code in (None, 0, 2)
        if sweep is None or sweep.concluded or refused:
            raise
        if failed and not any(folder.exists() for folder in sweep.folders()):
            raise  # before the first job
        if failed:  # a launcher; what fails in a job is reported there
            sweep.halt()
            reason = " ".join(f"{type(error).__name__}: {error}".split()).partition(". ")[0]
            log.error("error: the sweep broke off: %.300s", reason)
        stopped(sweep)
        raise SystemExit(error.code if isinstance(error, SystemExit) else 1) from None
    finally:
        while _sweeps:
            _sweeps[-1].over.set()
            _sweeps.pop().cleanup.close()


# --- its end -----------------------------------------------------------------------------------------------


def conclude(sweep: Sweep) -> list[dict[str, Any]]:
    """Write and show the table of the jobs that have begun."""
    configure_log(sweep.config.hydra.hydra_logging, sweep.config.hydra.verbose)  # the last job's may still be there
    sweep.concluded = True
    words = {job.folder: job.words for job in sweep.jobs}
    begun = [folder for folder in sweep.folders() if not sweep.jobs or state(folder) != "not begun"]
    rows = [job_row(folder, _name(sweep, folder), words.get(folder)) for folder in begun]
    if rows:
        # Best first by validation; a sweep without validation stays in the order of its jobs.
        rows.sort(key=lambda row: -(row["val/accuracy"] or 0.0))
        write_csv(sweep.folder / "results.csv", rows)
        log.info("%s\n%s", results_table(rows), sweep.folder / "results.csv")
    return rows


def ended(sweep: Sweep) -> bool:
    """The end of a sweep whose jobs have all run: its table, and whether one failed."""
    rows = conclude(sweep)
    failed = sum(bool(row["error"]) for row in rows)
    if failed:
        log.error("%d of %d jobs failed%s", failed, len(rows), _continue(sweep))
    return failed > 0


def stopped(sweep: Sweep) -> None:
    """The end of a sweep that was stopped: its table, which jobs are done, and which were not begun."""
    rows = conclude(sweep)
    done = [_name(sweep, folder) for folder in sweep.folders() if state(folder) == "finished"]
    begun = {row["job"] for row in rows}
    left = [" ".join(settings_of(job.words)) for job in sweep.jobs if _name(sweep, job.folder) not in begun]
    log.error(
        "the sweep was stopped%s: %d of %d jobs are done%s; not begun: %s%s",
        ", as fail_fast=true" if sweep.stopped_by_failure else "",
        len(done),
        len(sweep.jobs) or len(rows),
        f" ({', '.join(done)})" if done else "",
        " | ".join(left) or "none",
        _continue(sweep),
    )


def _continue(sweep: Sweep) -> str:
    word = shlex.quote(f"multirun.resume={sweep.folder.absolute()}")
    return f"; continue with: mnist-train -m {word}" if sweep.jobs else ""


def _name(sweep: Sweep, folder: Path) -> str:
    return str(folder.relative_to(sweep.folder))

"""Jobs of a sweep in processes of their own (joblib, submitit), from the sweep's own process: their shares, their ends.

What they are told goes through the sweep's folder, as they may run on other machines; worker.py is their side of it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, open_dict, read_write

from mnist_cnn.config.settings import Train
from mnist_cnn.runs.multirun import Sweep
from mnist_cnn.runs.plan import Job
from mnist_cnn.runs.table import failure, state
from mnist_cnn.runs.worker import SECONDS, SHARED, STOP, launcher_of

log = logging.getLogger(__name__)


def share(config: DictConfig, jobs: list[Job]) -> dict[str, Any]:
    """How many jobs run at once on this machine, and what they have of it; sets the launcher accordingly."""
    launcher = launcher_of(config)
    if launcher not in ("JoblibLauncher", "LocalLauncher"):
        return {}  # one after the other here, or where a scheduler divides
    import joblib

    cores = joblib.cpu_count()
    wanted = any(isinstance(job.settings, Train) and job.settings.accelerator.name != "cpu" for job in jobs)
    gpus = visible_gpus() if wanted else []
    with read_write(config.hydra), open_dict(config.hydra):
        key, part = ("n_jobs", config.hydra.launcher)
        if launcher == "LocalLauncher":  # which has no limit of its own
            key, part = ("max_batch_size", config.hydra.sweeper)
        asked = part.get(key)
        if asked is None or asked < 1:
            asked = len(gpus) or cores
        at_once = min(asked, len(jobs) or asked)
        part[key] = at_once
    return {"pid": os.getpid(), "threads": max(1, cores // at_once), "gpus": gpus, "at_once": at_once}


def visible_gpus() -> list[str]:
    """The GPUs as CUDA_VISIBLE_DEVICES names them; asked of nvidia-smi, as torch takes seconds to import."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in chosen.split(",") if gpu]
    if shutil.which("nvidia-smi") is None:
        return []
    asked = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
    return [line.strip() for line in answer.stdout.splitlines() if line.strip().isdigit()]


def watch(sweep: Sweep, shared: dict[str, Any]) -> None:
    """From here on tell of each job's end; SIGTERM and SIGINT end the jobs as well."""
    if launcher_of(sweep.config) == "BasicLauncher":
        return
    sweep.cleanup.callback(_clear, sweep.folder, os.environ.get(SHARED))
    if shared:
        os.environ[SHARED] = json.dumps(shared)
        threads = f"{shared['threads']} thread{'s' * (shared['threads'] > 1)} each"
        on = f", on GPUs {', '.join(shared['gpus'])}" if shared["gpus"] else ""
        log.info("%d jobs at once, %s%s", shared["at_once"], threads, on)
    told = {folder for folder in sweep.folders() if state(folder) == "finished"}

    def tell() -> None:
        while True:
            last = sweep.over.wait(SECONDS)
            for folder in sweep.folders():
                if folder not in told and (what := state(folder)) in ("finished", "failed"):
                    told.add(folder)
                    _tell(sweep, folder, what, len(told))
            if last:
                return

    thread = threading.Thread(target=tell, daemon=True)

    def finish() -> None:
        sweep.over.set()
        thread.join()

    sweep.all_told = finish
    sweep.halt = lambda: _halt(sweep)
    thread.start()


def _tell(sweep: Sweep, folder: Path, what: str, ended: int) -> None:
    name = next((job.title() for job in sweep.jobs if job.folder == folder), f"job {folder.name}")
    if what == "finished":
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        of = f"{ended} of {len(sweep.jobs)}: " if sweep.jobs else ""
        log.info("%s%s: test accuracy %.2f%%, %.1f s", of, name, 100 * metrics["test/accuracy"], metrics["fit_seconds"])
        return
    log.error("error: %s: %s", name, failure(folder))
    if sweep.fail_fast and not sweep.stopped_by_failure:
        sweep.stopped_by_failure = True
        os.kill(os.getpid(), signal.SIGTERM)  # the handler runs in the main thread


def _halt(sweep: Sweep, patience: float = 60) -> None:
    """Have the jobs of other processes save and end, and wait for it."""
    (sweep.folder / STOP).touch()
    until = time.monotonic() + patience
    while time.monotonic() < until and any(map(_busy, sweep.folders())):
        time.sleep(SECONDS / 2)
    sweep.all_told()


def _busy(folder: Path) -> bool:
    if not (folder / ".lock").exists():
        return False
    try:
        with FileLock(folder / ".lock", blocking=False):
            return False
    except (Timeout, OSError):
        return True


def _clear(folder: Path, before: str | None) -> None:
    os.environ.pop(SHARED, None)
    if before is not None:
        os.environ[SHARED] = before
    for lock in folder.glob(".gpu_*"):
        lock.unlink(missing_ok=True)

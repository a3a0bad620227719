"""A job of a sweep in a process of its own: its share of the machine, and its end with the sweep's."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from mnist_cnn.config.settings import Train
from mnist_cnn.runs.hydra_app import Console

log = logging.getLogger(__name__)

SHARED = "MNIST_CNN_JOBS"  # the environment variable by which jobs know what they share
STOP = ".stop"  # in a sweep's folder: its jobs are to save and end
SECONDS = 0.2  # between looks into the sweep's folder

_sweeping: set[int] = set()  # the process that runs a sweep itself
_running = threading.Event()
_held: list[FileLock] = []  # the place on a GPU, until the process ends


def launcher_of(config: Any) -> str:
    return str(config.hydra.launcher._target_).rpartition(".")[2]


def elsewhere() -> bool:
    """Whether this process works on a job of a sweep that another process runs."""
    if os.getpid() in _sweeping or not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return False
    return launcher_of(HydraConfig.instance().cfg) != "BasicLauncher"


def sweeps_here() -> None:
    """This process runs a sweep itself."""
    _sweeping.add(os.getpid())


def told_to_stop() -> bool:
    return elsewhere() and _stopping(Path(HydraConfig.get().sweep.dir), _shared().get("pid"))


def _shared() -> dict[str, Any]:
    return json.loads(os.environ.get(SHARED, "{}"))


def settle(config: DictConfig) -> None:
    """Make this process one of several: quiet on the terminal, on a GPU of its own, ended with the sweep."""
    if not elsewhere() or config.hydra.job.config_name != "train":
        return
    if launcher_of(config) not in ("LocalLauncher", "SlurmLauncher"):  # whose jobs' output goes to files
        root = logging.getLogger()
        root.handlers = [handler for handler in root.handlers if not isinstance(handler, Console)]
        os.environ["TQDM_DISABLE"] = "1"
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C comes to the sweep's process as well
    folder, shared = Path(config.hydra.sweep.dir), _shared()
    if shared.get("gpus"):
        _take_gpu(folder, shared)
    if not any(thread.name == STOP for thread in threading.enumerate()):
        threading.Thread(target=_listen, args=(folder, shared.get("pid")), name=STOP, daemon=True).start()
    _running.set()


def left() -> None:
    """The job of this process has ended."""
    _running.clear()


def _take_gpu(folder: Path, shared: dict[str, Any]) -> None:
    """One place for each job that runs at once, dealt out over the GPUs; a lock holds it while the process lives."""
    for place in range(shared["at_once"] if not _held else 0):
        lock = FileLock(folder / f".gpu_{place}")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        _held.append(lock)
        os.environ["CUDA_VISIBLE_DEVICES"] = shared["gpus"][place % len(shared["gpus"])]
        break
    log.info("on GPU %s", os.environ.get("CUDA_VISIBLE_DEVICES"))


def _listen(folder: Path, pid: int | None) -> None:
    while True:
        time.sleep(SECONDS)
        if not _stopping(folder, pid):
            continue
        if callable(signal.getsignal(signal.SIGTERM)):  # a job that is stopping already has put it back
            os.kill(os.getpid(), signal.SIGTERM)
        elif not _running.is_set() and not _alive(pid):
            os._exit(1)


def _stopping(folder: Path, pid: int | None) -> bool:
    return (folder / STOP).exists() or not _alive(pid)


def _alive(pid: int | None) -> bool:
    if pid is None:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def own_share(settings: Train) -> Train:
    """The settings with this job's share of the threads, which stands in its config.yaml: it is part of the bits."""
    threads = _shared().get("threads") if elsewhere() else None
    if threads is None or settings.accelerator.threads is not None:
        return settings
    return settings.model_copy(update={"accelerator": settings.accelerator.model_copy(update={"threads": threads})})

"""The local processes of a study: each the same command with `workers=1`, its share of the threads, and one GPU."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from mnist_cnn.config.parameters import Sweep
from mnist_cnn.config.schema import RunError, UserError
from mnist_cnn.search.report import Progress
from mnist_cnn.search.space import key_of
from mnist_cnn.search.storage import StorageError
from mnist_cnn.search.study import SharedStudy
from mnist_cnn.search.trials import PARENT, Stop

log = logging.getLogger("mnist-sweep")

RESTARTS = 100  # of one worker; a trial that kills its workers is given up long before
SECONDS_BETWEEN_LOOKS = 0.3


class Crew:
    """Starts the workers, starts those anew that are killed, and ends all of them on a signal.

    Args:
        shared: the study.
        settings: of the command.
        stop: ends the workers, each with its trial saved and given back.
        progress: what the user sees.
    """

    def __init__(self, shared: SharedStudy, settings: Sweep, stop: Stop, progress: Progress) -> None:
        self.shared, self.settings, self.stop, self.progress = shared, settings, stop, progress
        self.words = [word for word in sys.argv[1:] if key_of(word) != "workers"] + ["workers=1"]
        self.threads = settings.accelerator.threads or max(1, cores() // settings.workers)
        if settings.accelerator.threads is None:  # part of each trial: the bits of its weights depend on it
            self.words.append(f"accelerator.threads={self.threads}")
        self.devices = devices(settings)
        self.restarts = dict.fromkeys(range(settings.workers), 0)
        self.processes = {number: self._start(number) for number in self.restarts}

    def run(self) -> None:
        """Raises:
        UserError: a worker refused the settings.
        RunError: a worker failed.
        """
        told, failure = False, None
        while self.processes:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            if (self.stop.is_set() or failure) and not told:
                told = True
                for process in self.processes.values():
                    process.send_signal(self.stop.signum or signal.SIGTERM)
            for number, process in list(self.processes.items()):
                status = process.poll()
                if status is None:
                    continue
                del self.processes[number]
                if status and not told:
                    failure = self._ended(number, process.pid, status)
            self.progress.look()
        if failure:
            raise failure

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        environment = {**os.environ, PARENT: str(os.getpid())}
        environment.pop("HYDRA_FULL_ERROR", None)
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[number % len(self.devices)]
        command = [sys.executable, "-P", "-m", "mnist_cnn.sweep", *self.words]
        self._log(number).parent.mkdir(exist_ok=True)
        with self._log(number).open("ab") as file:
            # In a group of its own: a terminal's Ctrl-C comes here alone, and each worker hears of it once.
            return subprocess.Popen(command, env=environment, stdout=file, stderr=file, process_group=0)

    def _log(self, number: int) -> Path:
        return self.shared.folder / "workers" / f"{socket.gethostname()}_{number + 1}.log"

    def _ended(self, number: int, pid: int, status: int) -> UserError | RunError | None:
        """A worker that was killed starts anew; what else ended it is what the command ends with."""
        if status > 0:
            lines = self._log(number).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            reason = lines[-1].removeprefix("error: ") if lines else f"status {status}"
            return UserError(reason) if status == 2 else RunError(reason)
        self.restarts[number] += 1
        name = signal.Signals(-status).name
        if self.restarts[number] > RESTARTS:
            return RunError(f"worker {number + 1} was ended by {name} {self.restarts[number]} times")
        log.warning("worker %d was ended by %s: it starts anew", number + 1, name)
        with suppress(*StorageError):  # away just now: the heartbeats that do not come say the same
            self.shared.give_up(f"{socket.gethostname()}:{pid}")
        self.processes[number] = self._start(number)
        return None


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices(settings: Sweep) -> list[str]:
    """The GPUs that the workers divide among themselves, as CUDA_VISIBLE_DEVICES names them."""
    if settings.accelerator.name == "cpu":
        return []
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]

"""The ranks of a run: processes that train on shares of the same batches, and that end together.

Rank 0 is the command as ever: it alone reads the command line, has the run's folder and speaks. The others take their
jobs from it through torch's TCPStore, in which each rank also leaves a beat a second and the first that fails leaves
its reason. So it is wherever they come from: rank 0 itself on one machine, torchrun, or srun. Imports no torch.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import subprocess
import threading
import time
from datetime import timedelta
from typing import Any

from mnist_cnn.config.schema import RunError

log = logging.getLogger(__name__)

BEAT = 1.0  # seconds between the signs of life of a rank
SILENT = 15  # beats after which a rank that gives none is lost
GRACE = 8  # beats in which a process ends by itself once a rank has failed; a hanging collective is never left
COMING = 600  # seconds within which every rank has come


def outside() -> tuple[int, int] | None:
    """Rank and number of ranks where torchrun or srun has started several, as Lightning finds them.

    SLURM's job names bash and interactive are those of a shell, in which a command stands alone.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        names = ("RANK", "WORLD_SIZE")
    elif "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        names = ("SLURM_PROCID", "SLURM_NTASKS")
    else:
        return None
    rank, size = (int(os.environ.get(name, "0")) for name in names)
    return (rank, size) if size > 1 else None


class Group:
    """This process's place among the ranks, and the store through which they know of each other."""

    theirs: Group | None = None  # the group that torchrun or srun has started, for all jobs of this process

    def __init__(self, rank: int, size: int, store: Any, children: list[subprocess.Popen[bytes]] | None = None) -> None:
        self.rank, self.size, self.store, self.children = rank, size, store, children or []
        self.job = -1
        self.over, self.busy, self.broken = threading.Event(), False, False
        self.remedy = ""  # what to do after a rank has been lost
        # A machine that vanishes answers nothing, not even with an error: this then ends a rank that waits for it.
        self.elsewhere = os.open(os.devnull, os.O_WRONLY) if outside() else 0
        # A store's connection serves one thread at a time.
        threading.Thread(target=self._watch, args=(store.clone(),), daemon=True).start()

    # --- rank 0 --------------------------------------------------------------------------------------------

    def hand_over(self, job: dict[str, Any]) -> None:
        """Give the other ranks a job, and wait till all are ready for it.

        Raises:
            RunError: one has failed or does not come.
        """
        self.job, self.busy = self.job + 1, True
        self.store.set(f"job {self.job}", json.dumps(job))
        last = time.monotonic() + COMING
        while (ready := self.store.add(f"ready {self.job}", 0)) < self.size - 1:
            self._bury(self.store)
            if time.monotonic() > last:
                self.fail(f"{self.size - 1 - ready} of {self.size} ranks have not come within {COMING} s")
            if reason := self.failure():
                raise RunError(reason)
            time.sleep(0.02)  # signals are heard here, and not within a collective

    def end(self, status: int) -> None:
        """Send the other ranks home; those that this process has started leave within moments."""
        if self.over.is_set():
            return
        self.over.set()
        if status == 0 or not self.children:
            self.store.set(f"job {self.job + 1}", json.dumps({"status": status}))
            last = time.monotonic() + BEAT * GRACE
            while self.store.add("gone", 0) < self.size - 1 and not self.broken and time.monotonic() < last:
                time.sleep(0.02)
        for child in self.children:
            child.kill()
            child.wait()

    def reason(self, error: BaseException) -> str:
        """Why a collective broke: the first failure that a rank has told of, or the end of a process of ours."""
        for _ in range(60):
            self._bury(self.store)
            if reason := self.failure():
                return reason
            time.sleep(0.05)
        said = str(error).rpartition("] ")[2].partition(". ")[0][:200]
        return self.fail(f"the connection to another rank broke ({said}): it was killed, or its machine is gone")

    def _bury(self, store: Any) -> None:
        for rank, child in enumerate(self.children, start=1):
            if (status := child.poll()) is not None:
                how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                self.fail(f"rank {rank} was {how}", store)

    # --- the other ranks -----------------------------------------------------------------------------------

    def take_over(self) -> dict[str, Any]:
        """The next job of rank 0, when it comes."""
        self.job += 1
        self.store.wait([f"job {self.job}"], timedelta(days=365))
        job: dict[str, Any] = json.loads(self.store.get(f"job {self.job}"))
        return job

    def ready(self) -> None:
        self.store.add(f"ready {self.job}", 1)

    def leave(self) -> None:
        self.over.set()
        faulthandler.cancel_dump_traceback_later()
        self.store.add("gone", 1)

    # --- all -----------------------------------------------------------------------------------------------

    def fail(self, reason: str, store: Any = None) -> str:
        """Tell all ranks why this one fails; the first reason stands, and is returned."""
        reason = " ".join(reason.split())[:2000]
        first: bytes = (store or self.store).compare_set("failure", "", reason)
        return first.decode(errors="replace")

    def failure(self, store: Any = None) -> str:
        return self.fail("", store)

    def _watch(self, store: Any) -> None:
        """Beat, hear the others, and end this process where one has failed and a collective holds the main thread."""
        others = range(1, self.size) if self.rank == 0 else range(1)
        last, silent = dict.fromkeys(others, 0), dict.fromkeys(others, 0)
        try:
            while not self.over.wait(BEAT):
                store.add(f"beat {self.rank}", 1)
                if self.rank and self.elsewhere:
                    faulthandler.dump_traceback_later(BEAT * (SILENT + GRACE), exit=True, file=self.elsewhere)
                self._bury(store)
                for rank in others:
                    beat = store.add(f"beat {rank}", 0)
                    silent[rank] = silent[rank] + 1 if beat == last[rank] and beat else 0
                    last[rank] = beat
                    if silent[rank] > SILENT:
                        self.fail(f"rank {rank} has given no sign of life for {BEAT * SILENT:.0f} s", store)
                if reason := self.failure(store):
                    break
            if any(self.over.wait(BEAT) for _ in range(GRACE)):  # what stalls the machine stalls this as well
                return
        except RuntimeError:  # the store has gone: with rank 0, or with torchrun's agent
            reason = "torchrun has gone"
            if self.over.is_set():
                return
        if self.rank == 0:
            log.error("error: %s%s", reason, self.remedy)
            for child in self.children:
                child.kill()
        logging.shutdown()
        os._exit(1)


def broke(error: BaseException) -> bool:
    """Whether a collective failed, as it does where another rank has."""
    import torch

    return isinstance(error, torch.distributed.DistError) or ("gloo" in str(error) and isinstance(error, RuntimeError))

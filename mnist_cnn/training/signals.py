"""SIGINT, SIGTERM and a queue's signals: a flag at which a run ends its step, saves, and says how to go on."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

QUEUE_SIGNALS = [getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)]


class Stopped(BaseException):
    """A signal came, and what a run had to save is saved."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


class StopRequest:
    """SIGINT and SIGTERM as a flag that a training step looks at; before training begins they end the run at once.

    SIGUSR1 and SIGUSR2 are dealt with in the same way where something handles them, as submitit does to queue the job
    again: it is handed the signal once the checkpoint is written.

    Args:
        patient: a second signal changes nothing, as for the ranks of a run, which hear of one several times; else it
            ends the process at once.

    Attributes:
        signum: the signal that came, or 0.
        training: whether a step is there to end.
    """

    def __init__(self, patient: bool = False) -> None:
        self.patient, self.signum, self.training = patient, 0, False
        self.before: dict[int, Any] = {}

    def __call__(self, signum: int, _: Any = None) -> None:
        self.signum = signum
        for number, handler in () if self.patient else self.before.items():
            signal.signal(number, handler if number in QUEUE_SIGNALS else signal.SIG_DFL)
        if not self.training:
            raise Stopped(signum)

    def install(self) -> None:
        """Handle the signals, also after Lightning's connector has put its own handlers in place."""
        if threading.current_thread() is not threading.main_thread() or self.signum:
            return
        queue = [number for number in QUEUE_SIGNALS if callable(signal.getsignal(number))]
        for number in (signal.SIGINT, signal.SIGTERM, *queue):
            handler = signal.signal(number, self)
            self.before.setdefault(number, handler)

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextmanager
def stop_on_signal(folder: Path, command: str) -> Iterator[StopRequest]:
    """A signal ends the run in `folder` with the command that continues it, and status 128 + its number."""
    stop = StopRequest()
    stop.install()
    try:
        yield stop
    except Stopped as stopped:
        begun = (folder / "config.yaml").exists()
        how = f"continue with: {command}" if begun else "nothing was begun"
        log.error("stopped by %s; %s", signal.Signals(stopped.signum).name, how)
        if stopped.signum in QUEUE_SIGNALS and callable(queue_again := stop.before[stopped.signum]):
            queue_again(stopped.signum, None)
        raise SystemExit(128 + stopped.signum) from None
    finally:
        stop.restore()

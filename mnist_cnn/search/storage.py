"""Where a study is kept: SQLite for one machine, PostgreSQL or MySQL for many; opened, waited for, and locked."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import make_url, text
from sqlalchemy.exc import ArgumentError, InterfaceError, NoSuchModuleError, OperationalError, SQLAlchemyError

from mnist_cnn.config.schema import RunError, UserError

PATIENCE = 300  # seconds that a storage may be away
MISSED = 6  # heartbeats, after which a worker counts as killed
DRIVERS = {"postgresql": "psycopg", "mysql": "pymysql"}
StorageError: tuple[type[Exception], ...] = (StorageInternalError, SQLAlchemyError)
AWAY = (OperationalError, InterfaceError)
Result = TypeVar("Result")


class AwayError(UserError):
    """The storage is not reached: a wrong address, or a server that is not up."""


PASSWORD = r"[?&](?:ssl)?passw(?:or)?d="  # in an address's query


def shown(url: str) -> str:
    """A storage's address without its password."""
    return re.sub(rf"({PASSWORD})[^&]*", r"\1***", re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url))


def without_password(url: str) -> str:
    """The same address to keep, for which the user's own files (~/.pgpass) have the password."""
    kept = re.sub(rf"{PASSWORD}[^&]*", "", re.sub(r"(://[^:/@]*):.*@", r"\1@", url))
    return kept if "?" in kept else kept.replace("&", "?", 1)


def is_away(error: Exception) -> bool:
    """Whether it is that the server does not answer: SQLAlchemy's own error, or Optuna's around it."""
    return isinstance(error, AWAY) or isinstance(error.__cause__, AWAY)


def reason_of(error: Exception) -> str:
    return str(error.__cause__ or error).strip().splitlines()[0]


class Storage(RDBStorage):
    """Optuna's storage at `url`, with a lock for what its own transactions leave open.

    Args:
        url: sqlite:///file, postgresql://user:password@host/database, mysql://…
        heartbeat: seconds from one to the next.
        begin: make the file or the tables where there are none.

    Raises:
        UserError: it is not reached, or its driver is not installed.
    """

    def __init__(self, url: str, heartbeat: int, begin: bool) -> None:
        scheme = url.partition(":")[0]
        self.shown = shown(url)
        self.local = scheme.startswith("sqlite")
        options: dict[str, Any] = {"connect_args": {"timeout": 60}} if self.local else {"pool_pre_ping": True}
        full = url.replace(scheme, f"{scheme}+{DRIVERS[scheme]}", 1) if scheme in DRIVERS else url
        try:
            file = Path(make_url(full).database or "")
            if self.local and not begin and not file.is_file():
                raise UserError(f"storage={url} is not there")
            self.file_lock = FileLock(f"{file}.lock") if self.local else None
            with self.file_lock or nullcontext():
                self._open(full, options, heartbeat)
        except OSError as error:
            raise UserError(f"storage={self.shown} cannot be used: {error.filename}: {error.strerror}") from None
        except (ImportError, NoSuchModuleError) as error:
            extra = scheme.partition("+")[0]
            raise UserError(
                f"storage={self.shown} needs a driver ({reason_of(error)}): pip install 'mnist-cnn[{extra}]'"
            ) from None
        except (ArgumentError, StorageInternalError, SQLAlchemyError) as error:
            kind = AwayError if is_away(error) else UserError
            raise kind(f"storage={self.shown} cannot be used: {reason_of(error)}") from None

    def _open(self, url: str, options: dict[str, Any], heartbeat: int) -> None:
        for attempt in range(10):
            try:
                super().__init__(url, options, heartbeat_interval=heartbeat, grace_period=MISSED * heartbeat)
                return
            except (OperationalError, ArgumentError, NoSuchModuleError):
                raise
            except SQLAlchemyError:  # another process makes the tables at the same time
                if attempt == 9:
                    raise
                time.sleep(random.random())

    @contextmanager
    def alone(self, study: int) -> Iterator[None]:
        """The only process with the study in here; one that is killed leaves at once."""
        if self.file_lock:
            with self.file_lock:
                yield
            return
        with self.engine.begin() as connection:
            if self.engine.name == "postgresql":  # a machine that vanishes does not hold the others up for hours
                connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = '60s'"))
            # A row that Optuna itself never locks.
            row = text("SELECT study_id FROM study_directions WHERE study_id = :study FOR UPDATE")
            connection.execute(row, {"study": study})
            yield

    def patiently(self, action: Callable[[], Result], stop: threading.Event) -> Result:
        """Do it again while the storage does not answer, until `stop`; RunError as `patiently`."""
        return patiently(action, stop, self.shown)


def patiently(action: Callable[[], Result], stop: threading.Event, address: str) -> Result:
    """Do it again while the storage does not answer, until `stop`.

    Raises:
        RunError: the storage stays away.
    """
    begun = time.monotonic()
    tried_again: tuple[type[Exception], ...] = (AwayError, *StorageError)
    while True:
        try:
            return action()
        except tried_again as error:
            away = isinstance(error, AwayError) or is_away(error)
            if not away or stop.is_set() or time.monotonic() - begun > PATIENCE:
                raise RunError(f"storage={address} does not answer: {reason_of(error)}") from None
            stop.wait(0.2 + random.random())

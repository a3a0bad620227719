"""Published files fetched from their mirrors, by one process at a time."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from filelock import FileLock, Timeout

from mnist_cnn.config.schema import UserError
from mnist_cnn.runs.files import write_whole

log = logging.getLogger(__name__)

SECONDS_TO_WAIT_FOR_A_MIRROR = 20
SECONDS_BETWEEN_ROUNDS = (1, 3)  # a mirror that was busy or cut the connection is asked again after these
MAXIMUM_ARCHIVE = 2**28  # bytes; the largest published one has 30 MB


def md5_of(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def only_downloader(folder: Path) -> Iterator[None]:
    """One process at a time downloads into `folder`; one that fails takes its lock and empty folders away."""
    own = [path for path in (folder.parent, folder.parent.parent) if not path.exists()]
    lock = FileLock(folder.parent / ".download.lock")
    while not lock.is_locked:
        folder.parent.mkdir(parents=True, exist_ok=True)  # one that failed may just have taken it away
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=1)
    try:
        folder.mkdir(exist_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):  # files are in it
            folder.rmdir()
        Path(lock.lock_file).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # or another process waits
            for path in own:
                path.rmdir()
        lock.release()


def download(folder: Path, archive: str, fault: str, dataset: Any) -> bytes:
    """A file fetched from the first mirror that has the published one; it and its archive are left in `folder`.

    Raises:
        UserError: no mirror has it; the message has what each said.
    """
    own = os.environ.get("MNIST_CNN_MIRRORS", "").split()  # laid out as data.root is
    mirrors = [f"{mirror.rstrip('/')}/{dataset.__name__}/raw/" for mirror in own] or dataset.mirrors
    md5 = dict(dataset.resources)[archive]
    said: dict[str, str] = {}
    asked = list(mirrors)
    for wait in (*SECONDS_BETWEEN_ROUNDS, 0):
        for mirror in list(asked):
            log.info("downloading %s%s", mirror, archive)
            try:
                packed = _fetched(mirror + archive, md5)
            except (OSError, HTTPException, ValueError) as error:
                said[mirror] = _reason(error)
                if not _may_pass(error):
                    asked.remove(mirror)
                continue
            content = gzip.decompress(packed)
            write_whole(folder / archive, packed)
            write_whole(folder / archive.removesuffix(".gz"), content)
            return content
        if not asked:
            break
        time.sleep(wait)
    answers = "; ".join(f"{mirror}: {reason}" for mirror, reason in said.items())
    raise UserError(
        f"{fault}, and {archive} could not be downloaded ({answers}). "
        f"Put the files into ROOT/{dataset.__name__}/raw and set data.root=ROOT, or set MNIST_CNN_DATA to a folder "
        "that has them, or MNIST_CNN_MIRRORS to the address of one, or use data=digits, which needs no download"
    )


def _fetched(address: str, md5: str) -> bytes:
    request = Request(address, headers={"User-Agent": "mnist_cnn"})
    with urlopen(request, timeout=SECONDS_TO_WAIT_FOR_A_MIRROR) as response:
        content: bytes = response.read(MAXIMUM_ARCHIVE)
        if missing := getattr(response, "length", None):
            raise ConnectionError(f"broke off, {missing:,} bytes are missing")
    if md5_of(content) != md5:
        raise ConnectionError(f"sent {len(content):,} bytes that are not the published file")
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"{error.code} {error.reason}"
    cause = error.reason if isinstance(error, URLError) else error
    return " ".join(str(getattr(cause, "strerror", None) or cause or type(cause).__name__).split())


def _may_pass(error: Exception) -> bool:
    """Whether to ask the mirror again: not where it is not reached, or has said that it has no such file for us."""
    if isinstance(error, HTTPError):
        return error.code >= 500 or error.code == 429
    if isinstance(error, URLError):
        return isinstance(error.reason, TimeoutError)
    return not isinstance(error, ValueError)


def through_torchvision(name: str, root: Path, **settings: Any) -> Any:
    """A data set of torchvision's own class, which checks the md5 of what it downloads."""
    import torchvision

    kind = getattr(torchvision.datasets, name)
    place = root / name if name == "USPS" else root  # the others make a folder of their own
    try:
        try:
            return kind(str(place), **settings)
        except (RuntimeError, FileNotFoundError):  # torchvision's words for files that are not there
            pass
        with only_downloader(root / name / "raw"):
            for mirror in os.environ.get("MNIST_CNN_MIRRORS", "").split() or [""]:
                try:
                    log.info("downloading %s, from %s", name, mirror or "torchvision's mirror")
                    return _mirrored(kind, mirror)(str(place), **settings, download=True)
                except (URLError, RuntimeError, HTTPException) as error:
                    reason = _reason(error)
    except (OSError, ValueError, EOFError, AssertionError) as error:
        raise UserError(f"{root / name} does not have {name}'s files, and cannot take them: {_reason(error)}") from None
    raise UserError(
        f"{name} is not in {root}, and could not be downloaded ({reason}): put its files into {root / name} as "
        "torchvision has them, or set data.root, or MNIST_CNN_MIRRORS to an address that has them"
    )


def _mirrored(kind: Any, mirror: str) -> Any:
    """torchvision's class with its files at another address, laid out as data.root is."""
    if not mirror:
        return kind
    name, base = kind.__name__, f"{mirror.rstrip('/')}/{kind.__name__}"
    if name == "EMNIST":
        return type(name, (kind,), {"url": f"{base}/raw/gzip.zip"})
    if name == "USPS":
        files = {part: [f"{base}/{file}", file, md5] for part, (_, file, md5) in kind.split_list.items()}
        return type(name, (kind,), {"split_list": files})
    resources = {
        part: [(f"{base}/raw/{address.rpartition('/')[2]}", md5) for address, md5 in files]
        for part, files in kind.resources.items()
    }
    return type(name, (kind,), {"resources": resources})

"""Files that are whole or not there at all, and where none can be written. Imports no torch."""

from __future__ import annotations

import csv
import errno
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from mnist_cnn.config.schema import UserError

TEMPORARY = re.compile(r"\.mnist_cnn-[0-9a-f]{8}-.+")
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.EEXIST, errno.EISDIR}


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name to write under; the file appears as `path` once it is whole and on the disk, or not at all."""
    temporary = path.with_name(f".mnist_cnn-{secrets.token_hex(4)}-{path.name}")  # keeps its ending
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def unwritable(path: Path, error: OSError, remedy: str = "choose another place") -> OSError | UserError:
    """The error of a user who named a place where nothing can be written; a full disk's stays as it is."""
    if error.errno not in UNWRITABLE:
        return error
    return UserError(f"{path} cannot be written ({error.strerror}): {remedy}")


def writable(path: str) -> Path:
    """`path` of a file that is to be written, its folder made if need be.

    Raises:
        UserError: nothing can be written there.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=Path(path).parent):
            return Path(path)
    except OSError as error:
        raise unwritable(Path(path), error) from None


def write_whole(path: Path, content: str | bytes) -> None:
    """Write so that a reader finds the old file or the new one."""
    with whole(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """The rows under `columns`, or else under the union of their keys in order of first appearance."""
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    with whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writerow({name: cell(name) for name in columns})
        writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)


def cell(value: Any) -> Any:
    """A value for a CSV file; text that a spreadsheet would take for a formula begins with an apostrophe."""
    if isinstance(value, str) and value[:1] in "=+-@\t\r" and len(value) > 1:
        try:
            float(value)
        except ValueError:
            return f"'{value}"
    return value

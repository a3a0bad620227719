"""Predictions, written batch by batch: a table on the terminal, or a .csv, .json, .jsonl or .parquet file."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from numpy.typing import NDArray

from mnist_cnn.config.schema import UserError
from mnist_cnn.runs.files import cell, whole, writable

if TYPE_CHECKING:
    from mnist_cnn.inference.classifier import Classifier

log = logging.getLogger(__name__)
Prediction = dict[str, Any]  # path, label, probability, unsure, one probability a class, top k, place, error


@cache
def _columns(classes: tuple[str, ...], top_k: int) -> list[str]:
    """The columns between path and error."""
    ranked = [f"top {rank} {what}" for rank in range(1, top_k + 1) for what in ("label", "probability")]
    return ["label", "probability", "unsure", *(f"probability {name}" for name in classes), *ranked]


def prediction(
    path: str,
    probabilities: NDArray[np.float32] | None,
    classifier: Classifier,
    top_k: int,
    error: str,
    place: Mapping[str, str | None],
) -> Prediction:
    """The row of one digit; `probabilities` (classes,) are None where it could not be read, and `error` says why.

    `place` has the number and the box of a digit of several.
    """
    classes = classifier.classes
    columns = _columns(tuple(classes), top_k)
    if probabilities is None:
        return {"path": path, **dict.fromkeys(columns), **place, "error": error}
    values = probabilities.tolist()
    best = values.index(max(values))
    unsure = "unsure" if values[best] < classifier.unsure_below else None
    row: list[Any] = [classes[best], values[best], unsure, *values]
    for index in sorted(range(len(values)), key=values.__getitem__, reverse=True)[:top_k] if top_k else ():
        row += [classes[index], values[index]]
    return {"path": path, **dict(zip(columns, row, strict=True)), **place, "error": None}


class TerminalTable:
    """Lines on the terminal, above those of several digits the number that they are; the longest path of the first
    batch sets the width of that column."""

    width = 0
    path: str | None = None  # of the last row

    def write(self, rows: Sequence[Prediction]) -> None:
        if rows and not self.width:
            self.width = max(len("picture"), *(len(row["path"]) for row in rows))
            names = [key.removeprefix("probability ") for key in rows[0] if key.startswith("probability ")]
            ranked = " ".join(f"{key:>17}" for key in rows[0] if key.startswith("top ") and key.endswith("label"))
            header = "".join(f"{name:>7.6}" for name in names)
            log.info("%-*s  label  probability  %s  %s", self.width, "picture", header, ranked)
        for row in rows:
            if row.get("number") and row["path"] != self.path:
                log.info("%-*s  %s", self.width, row["path"], row["number"])
            self.path = row["path"]
            log.info("%s", self._line(row))

    def _line(self, row: Prediction) -> str:
        if row["error"] is not None:
            return f"{row['path']:<{self.width}}  –"  # stderr has the reason
        each = "".join(f" {value:.4f}" for key, value in row.items() if key.startswith("probability "))
        labels = [value for key, value in row.items() if key.startswith("top ") and key.endswith("label")]
        values = [value for key, value in row.items() if key.startswith("top ") and key.endswith("probability")]
        top = " ".join(f"{label:>10} {value:.4f}" for label, value in zip(labels, values, strict=True))
        answer = f"{row['label']:<5}  {row['probability']:.4f} {row['unsure'] or '':<6}"
        box = f"  at {row['box']}" if "box" in row else ""
        return f"{row['path']:<{self.width}}  {answer}{each}  {top}".rstrip() + box


class CsvFile:
    """Rows under one header; what is None is empty."""

    def __init__(self, path: Path) -> None:
        self.file: TextIO = path.open("w", newline="", encoding="utf-8")
        self.begun = False

    def write(self, rows: Sequence[Prediction]) -> None:
        writer = csv.writer(self.file)
        if rows and not self.begun:
            writer.writerow(map(cell, rows[0]))
            self.begun = True
        writer.writerows(map(cell, row.values()) for row in rows)

    def close(self) -> None:
        self.file.close()


class JsonLinesFile(CsvFile):
    """An object a line."""

    def write(self, rows: Sequence[Prediction]) -> None:
        self.file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class JsonFile(CsvFile):
    """A list of objects."""

    def write(self, rows: Sequence[Prediction]) -> None:
        for row in rows:
            self.file.write((",\n" if self.begun else "[\n") + json.dumps(row, ensure_ascii=False))
            self.begun = True

    def close(self) -> None:
        self.file.write("\n]\n" if self.begun else "[]\n")
        super().close()


class ParquetFile:
    """A row group a batch; probabilities are float32, all else text."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow.parquet
        except ImportError:
            raise UserError(
                "a .parquet output needs a package that is not installed: pip install 'mnist-cnn[parquet]'"
            ) from None
        self.path, self.pyarrow = path, pyarrow
        self.writer: Any = None

    def write(self, rows: Sequence[Prediction]) -> None:
        if not rows:
            return
        text, number = self.pyarrow.string(), self.pyarrow.float32()
        schema = self.pyarrow.schema([(key, number if "probability" in key else text) for key in rows[0]])
        self.writer = self.writer or self.pyarrow.parquet.ParquetWriter(self.path, schema)
        self.writer.write_table(self.pyarrow.Table.from_pylist(list(rows), schema))

    def close(self) -> None:
        if self.writer:
            self.writer.close()


Writer = TerminalTable | CsvFile | ParquetFile
FILES: dict[str, type[CsvFile] | type[ParquetFile]] = {
    ".csv": CsvFile,
    ".json": JsonFile,
    ".jsonl": JsonLinesFile,
    ".parquet": ParquetFile,
}


@contextmanager
def prediction_writer(output: str | None) -> Iterator[Writer]:
    """The writer for `output`, a file of one of the endings in `FILES`, which appears once it is whole, or None.

    Raises:
        UserError: .parquet without its package.
    """
    if output is None:
        yield TerminalTable()
        return
    path = writable(output)
    with whole(path) as temporary:
        file = FILES[path.suffix](temporary)
        try:
            yield file
        finally:
            file.close()
    log.info("%s", path)

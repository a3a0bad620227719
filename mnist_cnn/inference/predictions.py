"""Predictions written as they come: a table on the terminal, or a csv, json, jsonl or parquet file."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from mnist_cnn.config.schema import UserError
from mnist_cnn.runs.folder import whole

log = logging.getLogger(__name__)
Row = dict[str, Any]


@cache
def _keys(classes: tuple[str, ...], top_k: int) -> list[str]:
    """The columns of figures, which all rows share."""
    ranked = [f"top {rank} {what}" for rank in range(1, top_k + 1) for what in ("label", "probability")]
    return ["label", "probability", *(f"probability {name}" for name in classes), *ranked]


def row_of(path: str, probabilities: NDArray[np.float32] | None, classes: list[str], top_k: int, error: str) -> Row:
    """A picture's row; without probabilities it has its error only."""
    keys = _keys(tuple(classes), top_k)
    if probabilities is None:
        return {"path": path, **dict.fromkeys(keys), "error": error}
    values = probabilities.tolist()
    best = values.index(max(values))
    row: list[Any] = [classes[best], values[best], *values]
    for index in sorted(range(len(values)), key=values.__getitem__, reverse=True)[:top_k] if top_k else ():
        row += [classes[index], values[index]]
    return {"path": path, **dict(zip(keys, row, strict=True)), "error": None}


class Table:
    """Lines on the terminal, the paths' width being that of the first batch's."""

    width = 0

    def write(self, rows: Sequence[Row]) -> None:
        if not rows:
            return
        if not self.width:
            self.width = max(len("picture"), *(len(row["path"]) for row in rows))
            names = [key.removeprefix("probability ") for key in rows[0] if key.startswith("probability ")]
            ranked = " ".join(f"{key:>17}" for key in rows[0] if key.startswith("top ") and key.endswith("label"))
            log.info(
                "%-*s  label  probability  %s  %s", self.width, "picture", "".join(f"{n:>7.6}" for n in names), ranked
            )
        for row in rows:
            log.info("%s", self._line(row))

    def _line(self, row: Row) -> str:
        if row["error"] is not None:
            return f"{row['path']:<{self.width}}  –      {row['error']}"
        ten = "".join(f" {value:.4f}" for key, value in row.items() if key.startswith("probability "))
        labels = [value for key, value in row.items() if key.startswith("top ") and key.endswith("label")]
        values = [value for key, value in row.items() if key.startswith("top ") and key.endswith("probability")]
        top = " ".join(f"{label:>10} {value:.4f}" for label, value in zip(labels, values, strict=True))
        return f"{row['path']:<{self.width}}  {row['label']:<5}  {row['probability']:.4f}       {ten}  {top}".rstrip()


class File:
    """Rows to the end of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.first = True
        self.open()

    def open(self) -> None:
        self.file: TextIO = self.path.open("w", newline="", encoding="utf-8")

    def end(self) -> None:
        self.file.close()

    def write(self, rows: Sequence[Row]) -> None:
        raise NotImplementedError


class Csv(File):
    def write(self, rows: Sequence[Row]) -> None:
        writer = csv.writer(self.file)
        if self.first and rows:
            writer.writerow(rows[0])
            self.first = False
        writer.writerows(row.values() for row in rows)


class JsonLines(File):
    def write(self, rows: Sequence[Row]) -> None:
        self.file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class Json(File):
    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.file.write(("[\n" if self.first else ",\n") + json.dumps(row, ensure_ascii=False))
            self.first = False

    def end(self) -> None:
        self.file.write("[]\n" if self.first else "\n]\n")
        super().end()


class Parquet(File):
    def open(self) -> None:
        try:
            import pyarrow.parquet
        except ImportError:
            raise UserError(
                "a .parquet output needs a package that is not installed: pip install 'mnist-cnn[parquet]'"
            ) from None
        self.arrow = pyarrow
        self.writer: Any = None

    def write(self, rows: Sequence[Row]) -> None:
        if not rows:
            return
        text, number = self.arrow.string(), self.arrow.float32()
        schema = self.arrow.schema([(key, number if "probability" in key else text) for key in rows[0]])
        self.writer = self.writer or self.arrow.parquet.ParquetWriter(self.path, schema)
        self.writer.write_table(self.arrow.Table.from_pylist(list(rows), schema))

    def end(self) -> None:
        if self.writer:
            self.writer.close()


FILES: dict[str, type[File]] = {".csv": Csv, ".json": Json, ".jsonl": JsonLines, ".parquet": Parquet}


@contextmanager
def writer_for(output: str | None) -> Iterator[Table | File]:
    """A file by its ending, which the configuration has checked, there once it is whole; a table without one."""
    if output is None:
        yield Table()
        return
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        file = FILES[path.suffix](temporary)
        try:
            yield file
        finally:
            file.end()
    log.info("%s", path)

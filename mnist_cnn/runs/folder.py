"""A run's folder: what is written there, and how it is read again."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from mnist_cnn.config.schema import UserError, validated
from mnist_cnn.config.settings import CONF, PACKAGE, Train

PACKAGES = ("mnist-cnn", "torch", "torchvision", "pytorch-lightning", "hydra-core")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name to write under; the file appears as `path` once it is whole and on the disk, or not at all."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # keeps its ending
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write so that a reader finds the old file or the new one."""
    with whole(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """The rows under `columns`, or else under the union of their keys in order of first appearance."""
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    with whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def git_commit() -> str | None:
    """The checkout's commit, with `+` where files differ from it; None outside a checkout."""
    if CONF.parent == PACKAGE:
        return None  # installed from a wheel: the checkout around it, if any, is not this package's
    command = ["git", "-C", str(PACKAGE), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def describe_run(folder: Path, config: Train, overrides: Sequence[str], choices: Mapping[str, Any]) -> None:
    """Write config.yaml: the resolved configuration, then what ran it; a resumed run may have grown in epochs."""
    if config.resume:
        content = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        if content["epochs"] != config.epochs:
            write_whole(folder / "config.yaml", yaml.safe_dump({**content, "epochs": config.epochs}, sort_keys=False))
        return
    run = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "overrides": list(overrides),
        "choices": {key: value for key, value in choices.items() if not key.startswith("hydra/")},
        "versions": versions(),
        "git_commit": git_commit(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
    settings = config.model_dump(mode="json", exclude={"fail_fast", "multirun"})
    settings["data"]["root"] = str(Path(config.data.root).absolute())
    write_whole(folder / "config.yaml", yaml.safe_dump({**settings, "run": run}, sort_keys=False))


def read_run(folder: Path) -> tuple[Train, dict[str, Any]]:
    """The configuration of a run's folder, and what ran it.

    Raises:
        UserError: the folder is not a run's.
    """
    file = folder / "config.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        run = content.pop("run")
    except (OSError, yaml.YAMLError, AttributeError, KeyError, UnicodeDecodeError, TypeError):
        raise UserError(f"{folder} is not a run's folder: it has no config.yaml of mnist-train") from None
    return validated(Train, content), run


def refuse_occupied(folder: Path) -> None:
    """Raise UserError where a run or a sweep has been written already."""
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} is another run's folder: choose another, or continue that run by resume={folder}")
    if any((folder / name).exists() for name in ("results.csv", "multirun.yaml")) or any(folder.glob("*/.hydra")):
        raise UserError(f"{folder} is another sweep's folder: choose another")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process works in a run's folder at a time.

    Raises:
        UserError: another one does.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"{folder}: another process trains in this folder; wait for it, or choose another") from None
    try:
        for place in (folder, folder / "checkpoints"):
            for left in place.glob(".[0-9]*.*"):  # by a process that was killed while it wrote
                left.unlink()
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def resumed(config: Train, folder: Path, overrides: Sequence[str]) -> tuple[Train, dict[str, Any]]:
    """The run's own configuration to continue with, and its metrics where it has finished.

    Raises:
        UserError: an override differs from what the run began with; only `epochs` may grow.
    """
    stored, run = read_run(folder)
    ours, theirs = stored.model_dump(), config.model_dump()
    named = [word.lstrip("+~").partition("=")[0].partition("@")[0] for word in overrides]
    differing = []
    for word, key in zip(overrides, named, strict=True):
        if key.startswith(("resume", "plots", "epochs", "accelerator", "data.root", "checkpoint")):
            continue
        if key in run["choices"]:
            was, asked = run["choices"][key], word.partition("=")[2]
        else:
            was, asked = (OmegaConf.select(OmegaConf.create(settings), key) for settings in (ours, theirs))
        if was != asked:
            differing.append(f"{key}={was}, not {asked}")
    if differing:
        raise UserError(f"resume={folder}: the run has {'; '.join(differing)}; leave that out or start a new run")
    epochs = config.epochs if "epochs" in named else stored.epochs
    if epochs < stored.epochs:
        raise UserError(f"resume={folder}: the run has epochs={stored.epochs}; epochs may only grow, not be {epochs}")
    if epochs > stored.epochs and stored.schedule.length:
        raise UserError(f"resume={folder}: epochs cannot grow, as the run's schedule ends with epoch {stored.epochs}")
    finished = folder / "metrics.json"
    metrics = json.loads(finished.read_text(encoding="utf-8")) if finished.is_file() else {}
    moved = "data.root" in named or not Path(stored.data.root).is_dir()
    data = stored.data.model_copy(update={"root": config.data.root if moved else stored.data.root})
    update: dict[str, Any] = {"resume": config.resume, "epochs": epochs, "data": data, "plots": config.plots}
    for part in ("accelerator", "checkpoint"):
        if any(key.startswith(part) for key in named):
            update[part] = getattr(config, part)
    return stored.model_copy(update=update), metrics if metrics.get("epochs", 0) >= epochs else {}

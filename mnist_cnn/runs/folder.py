"""A run's folder: what is written there, which process may work there, and how it is read again."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from mnist_cnn.config.schema import UserError, validated
from mnist_cnn.config.settings import CONF, PACKAGE, Train
from mnist_cnn.runs.command_line import override_key
from mnist_cnn.runs.files import TEMPORARY, unwritable, write_whole
from mnist_cnn.runs.strangers import read_mapping, require_known

PACKAGES = ("mnist-cnn", "torch", "torchvision", "pytorch-lightning", "hydra-core")
OLDEST = (0, 2)  # the first version whose runs and sweeps can be continued
LOCK = ".lock"


# --- config.yaml -------------------------------------------------------------------------------------------


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
        content = read_mapping(folder / "config.yaml")
        if content["epochs"] != config.epochs:
            (folder / "metrics.json").unlink(missing_ok=True)  # it has not finished any more
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


def refuse_old(folder: Path, written_by: str) -> None:
    """Raise UserError where `folder` comes from a version whose runs and sweeps cannot be continued."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", written_by)[:2])
    if numbers < OLDEST:
        raise UserError(
            f"{folder} was written by mnist-cnn {written_by}, and version {version('mnist-cnn')} cannot continue it: "
            "start anew in another folder, or from a run's weights by initialize=FOLDER"
        )


def read_run(folder: Path) -> tuple[Train, dict[str, Any]]:
    """The configuration of a run's folder, and what ran it.

    Raises:
        UserError: the folder is not a run's, or is one of a version before 0.2.
    """
    file = folder / "config.yaml"
    try:
        content = read_mapping(file)
        run = content.pop("run")
        written_by, _ = run["versions"]["mnist-cnn"], {**run["choices"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f" ({error})" if isinstance(error, ValueError) else ""
        raise UserError(f"{folder} is not a run's folder: it has no config.yaml of mnist-train{why}") from None
    refuse_old(folder, str(written_by))
    try:
        return validated(Train, content), run
    except RecursionError:
        raise UserError(f"{file} is damaged: it is nested too deeply") from None


def read_metrics(folder: Path) -> dict[str, Any]:
    """What metrics.json holds.

    Raises:
        UserError: it is not there, or is damaged.
    """
    file = folder / "metrics.json"
    try:
        metrics = read_mapping(file, json.loads)
    except (OSError, ValueError) as error:
        raise UserError(f"{error}; without it the run is finished anew") from None
    numbers = all(value is None or type(value) in (int, float) for value in metrics.values())
    if not numbers or metrics.get("fit_seconds") is None:
        raise UserError(f"{file} is damaged; without it the run is finished anew")
    return metrics


# --- one process in a folder -------------------------------------------------------------------------------

_held: dict[Path, FileLock] = {}  # folders that this process has claimed, until it releases them
_created: set[Path] = set()  # those of them that it made


def refuse_occupied(folder: Path) -> None:
    """Raise UserError where a run or a sweep has been written already."""
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} is another run's folder: choose another, or continue that run by resume={folder}")
    if any((folder / name).exists() for name in ("results.csv", "sweep.yaml", "multirun.yaml")) or any(
        folder.glob("*/.hydra")
    ):
        raise UserError(f"{folder} is another sweep's folder: choose another")


def _lock(folder: Path) -> FileLock:
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"{folder}: another process trains in this folder; wait for it, or choose another") from None
    return lock


def _unlock(lock: FileLock) -> None:
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def claim(folder: Path, by_user: bool = False, check: Callable[[Path], None] = refuse_occupied) -> Path:
    """Take a folder for this process until it is released: the user's, or else the first free of it, `_2`, `_3`…

    Of several processes that claim one folder at once, one gets it; `check` looks at a user's that was there already.

    Raises:
        UserError: the user's folder is another process's, or holds a run or a sweep already.
    """
    if by_user and folder == Path():
        raise UserError("hydra.run.dir is empty: name a folder")
    if re.search("[\ud800-\udfff]", str(folder.absolute())):  # torch could not read its checkpoints again
        raise UserError(f"{folder.absolute()}: the name is no UTF-8; choose another folder by hydra.run.dir=FOLDER")
    attempt = 1
    while True:
        candidate = folder if attempt == 1 else folder.with_name(f"{folder.name}_{attempt}")
        try:
            candidate.mkdir(parents=True)
            created = True
        except OSError as error:
            created = False
            if error.errno != errno.EEXIST or (candidate.exists() and not candidate.is_dir()):
                remedy = "choose another folder by hydra.run.dir=FOLDER, for a sweep by hydra.sweep.dir=FOLDER"
                raise unwritable(candidate, error, remedy) from None
        if not created and not by_user:
            attempt += 1
            continue
        try:
            lock = _lock(candidate)
        except (FileNotFoundError, FileExistsError):  # another process, which made it for nothing, has just removed it
            continue
        try:
            check(candidate)
        except BaseException:
            _unlock(lock)
            raise
        _held[candidate.absolute()] = lock
        if created:
            _created.add(candidate.absolute())
        return candidate


def release(folder: Path) -> None:
    """Let other processes have a folder that this one claimed; nothing happens where it did not."""
    if lock := _held.pop(folder.absolute(), None):
        _unlock(lock)
    _created.discard(folder.absolute())


def release_all() -> None:
    for folder in list(_held):
        release(folder)


def discard(folder: Path) -> None:
    """Remove a folder that this process made and holds, where no run has begun in it."""
    if folder.absolute() not in _created or (folder / "config.yaml").exists() or not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            path.unlink(missing_ok=True)
    release(folder)
    with suppress(OSError):  # another process has taken it since
        folder.rmdir()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process works in a run's folder at a time; what a killed one left half written is cleared away.

    Raises:
        UserError: another one does.
    """
    try:
        lock = None if folder.absolute() in _held else _lock(folder)
    except OSError as error:
        raise unwritable(folder, error, "a run goes on in its own folder alone") from None
    try:
        for place in (folder, folder / "checkpoints"):
            for path in place.glob(".mnist_cnn-*"):
                if TEMPORARY.fullmatch(path.name) and (path.is_file() or path.is_symlink()):
                    path.unlink()
        yield
    finally:
        if lock:
            _unlock(lock)


# --- resume=FOLDER -----------------------------------------------------------------------------------------


def resumed(config: Train, folder: Path, overrides: Sequence[str]) -> tuple[Train, dict[str, Any]]:
    """The run's own configuration to continue with, and its metrics where it has finished.

    Raises:
        UserError: an override differs from what the run began with; only `epochs` may grow.
    """
    stored, run = read_run(folder)
    require_known(stored, config, folder)
    named = [override_key(word) for word in overrides]
    if differing := _differing(stored, config, run["choices"], dict(zip(named, overrides, strict=True))):
        raise UserError(f"resume={folder}: the run has {'; '.join(differing)}; leave that out or start a new run")
    epochs = config.epochs if "epochs" in named else stored.epochs
    if epochs < stored.epochs:
        raise UserError(f"resume={folder}: the run has epochs={stored.epochs}; epochs may only grow, not be {epochs}")
    if epochs > stored.epochs and stored.schedule.length:
        raise UserError(f"resume={folder}: epochs cannot grow, as the run's schedule ends with epoch {stored.epochs}")
    moved = "data.root" in named or not Path(stored.data.root).is_dir()
    data = stored.data.model_copy(update={"root": config.data.root if moved else stored.data.root})
    update: dict[str, Any] = {"resume": config.resume, "epochs": epochs, "data": data}
    for part in ("accelerator", "checkpoint", "plots"):
        if any(key.startswith(part) for key in named):
            update[part] = getattr(config, part)
    finished = epochs == stored.epochs and (folder / "metrics.json").is_file()
    return stored.model_copy(update=update), read_metrics(folder) if finished else {}


def _differing(stored: Train, config: Train, choices: Mapping[str, Any], overrides: Mapping[str, str]) -> list[str]:
    """`["seed=1, not 2", …]` for each override that is not what the run has."""
    theirs, ours = (OmegaConf.create(settings.model_dump()) for settings in (stored, config))
    differing = []
    for key, word in overrides.items():
        if key.startswith(("resume", "plots", "epochs", "accelerator", "data.root", "checkpoint")):
            continue
        if key in choices:
            was, asked = choices[key], word.partition("=")[2]
        else:
            was, asked = (OmegaConf.select(settings, key) for settings in (theirs, ours))
        if was != asked:
            differing.append(f"{key}={was}, not {asked}")
    return differing

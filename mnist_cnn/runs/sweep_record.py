"""A sweep's record in its folder, sweep.yaml: whether a command is that of the sweep, and how to continue it."""

from __future__ import annotations

import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from mnist_cnn.config.schema import Strict, UserError, validated
from mnist_cnn.config.settings import Train
from mnist_cnn.runs.folder import override_key, read_run, refuse_old, write_whole
from mnist_cnn.runs.hydra_app import config_dir_flag, literal, parsed, user_config_dir
from mnist_cnn.runs.strangers import AGAIN, read_mapping, require_plain

RECORD = "sweep.yaml"  # the sweep's command
OF_THE_COMMAND = ("fail_fast", "multirun.resume")  # these overrides change no job


class Record(Strict):
    """What it holds."""

    version: str
    overrides: list[str]
    hydra: list[str]
    config_dir: str | None
    working_folder: str


class Job(NamedTuple):
    number: int
    overrides: list[str]
    folder: Path
    settings: Strict


def job_overrides(overrides: list[str]) -> list[str]:
    """Those that make a job what it is."""
    return [word for word in overrides if override_key(word) not in OF_THE_COMMAND]


def write_record(folder: Path, config: DictConfig) -> None:
    """Note a sweep's command in its folder, once."""
    if (folder / RECORD).exists():
        return
    record = {
        "version": version("mnist-cnn"),
        "overrides": list(config.hydra.overrides.task),
        "hydra": list(config.hydra.overrides.hydra),
        "config_dir": user_config_dir(config.hydra),
        "working_folder": config.hydra.runtime.cwd,
    }
    write_whole(folder / RECORD, yaml.safe_dump(record, sort_keys=False))


def read_record(folder: Path) -> dict[str, Any]:
    """A sweep's command, from its folder.

    Raises:
        UserError: there is none of mnist-train, or it is one of a version before 0.2.
    """
    for file in (RECORD, "multirun.yaml"):
        try:
            record = read_mapping(folder / file)
            if file == RECORD:
                return validated(Record, record).model_dump()
            if record["hydra"]["job"]["config_name"] == "train":  # Hydra's, of a version that wrote none of its own
                for job in folder.glob("*/config.yaml"):
                    read_run(job.parent)
                refuse_old(folder, "0.1.0")
        except ValueError as error:
            raise UserError(str(error)) from None
        except (OSError, KeyError, TypeError):
            continue
    raise UserError(f"{folder} is not a sweep's folder: it has no {RECORD} of mnist-train -m")


def recorded_words(record: dict[str, Any]) -> dict[str, str]:
    """The words of a sweep's command by their keys, but for those that make it a sweep in its folder."""
    words = {override_key(word): word for word in [*record["overrides"], *record["hydra"]]}
    return {key: word for key, word in words.items() if key not in ("hydra.mode", "hydra.sweep.dir")}


def require_same(folder: Path, config: DictConfig, jobs: list[Job]) -> None:
    """Raise UserError, with what differs, where the command is not that of the sweep in `folder`."""
    theirs = job_overrides(read_record(folder)["overrides"])
    if differing := differences(theirs, job_overrides(list(config.hydra.overrides.task))):
        raise UserError(
            f"{folder} is another sweep's folder: it has {differing}; choose another folder, or continue that "
            f"sweep with: mnist-train -m multirun.resume={folder}"
        )
    begun = {path.parent for path in folder.rglob("config.yaml") if path.parent.name != ".hydra"}
    for job in jobs:
        place = folder / job.folder
        if place in begun and (changed := changed_keys(read_run(place)[0], job.settings)):
            raise UserError(
                f"{folder} is another sweep's folder: its {job.folder} has another {', another '.join(changed)}; "
                "choose another"
            )
    if foreign := begun - {folder / job.folder for job in jobs}:
        raise UserError(
            f"{folder} is another sweep's folder: {min(foreign).name} is no job of this one; choose another"
        )


def differences(theirs: list[str], ours: list[str]) -> str:
    """`"seed=1, not seed=2; …"`, or nothing where both are the same."""
    if theirs == ours:
        return ""
    was, asked = ({override_key(word): word for word in words} for words in (theirs, ours))
    keys = [key for key in dict.fromkeys([*was, *asked]) if was.get(key) != asked.get(key)]
    named = [f"{was.get(key, f'no {key}')}, not {asked.get(key, 'none')}" for key in keys]
    return "; ".join(named) or f"{' '.join(theirs)}, not {' '.join(ours)}"


def changed_keys(stored: Train, settings: Strict) -> list[str]:
    """What of a job that has begun would not be the same now, as where a YAML was edited."""
    may_change = {"resume", "plots", "accelerator", "checkpoint", "logger", "fail_fast", "multirun", "data"}
    was, now = (
        {key: value for key, value in content.items() if key not in may_change}
        | {f"data.{key}": value for key, value in content["data"].items() if key != "root"}
        for content in (stored.model_dump(), settings.model_dump())
    )
    # These two are brought by the checkpoint that a run starts from.
    brought = {"architecture", "data.normalization"} if stored.initialize else set()
    return [key for key in was if key not in brought and was[key] != now.get(key)]


def continued(words: list[str]) -> list[str]:
    """The command line with `multirun.resume=FOLDER` written out: the sweep's own overrides, in its own folder.

    Raises:
        UserError: FOLDER is no sweep's, or has more than plain values that the command line does not give again.
    """
    arguments = parsed(words)
    ours = {override_key(word): word for word in arguments.overrides}
    if (resume := ours.pop("multirun.resume", None)) is None:
        return words
    named = OverridesParser.create().parse_override(resume).value()
    if named in (None, ""):
        raise UserError("multirun.resume is empty: name a sweep's folder")
    if "hydra.sweep.dir" in ours:
        raise UserError("multirun.resume names the sweep's folder: leave out hydra.sweep.dir")
    folder = Path(str(named)).absolute()
    record = read_record(folder)
    if record["config_dir"] and not arguments.config_dir:
        raise UserError(f"{folder} has --config-dir {record['config_dir']}, which {AGAIN}")
    # Relative paths in its overrides mean that folder. The user has to go there: of a stranger's, modules would be run.
    begun = Path(record["working_folder"])
    if begun.is_dir() and not begun.samefile(Path()):
        raise UserError(f"{folder} was begun in another folder: continue it there, after cd {shlex.quote(str(begun))}")
    theirs = recorded_words(record)
    if "hydra/launcher" in ours:  # without the settings of the one before
        theirs = {key: word for key, word in theirs.items() if not key.startswith("hydra.launcher.")}
    require_plain((word for key, word in theirs.items() if key not in ours), folder)
    flags = ["--multirun", *config_dir_flag(arguments.config_dir)]
    return [*flags, *{**theirs, **ours, "hydra.sweep.dir": literal("hydra.sweep.dir", str(folder))}.values()]

"""What jobs a sweep's command makes, and whether they are those of a sweep that has begun."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, open_dict

from mnist_cnn.config.schema import Strict, UserError
from mnist_cnn.config.settings import Train
from mnist_cnn.runs.folder import read_run
from mnist_cnn.runs.hydra_app import literal

RECORD = "multirun.yaml"  # Hydra's own: the command's overrides, and what it ran with


class Job(NamedTuple):
    number: int
    words: list[str]  # its overrides
    folder: Path
    settings: Strict

    def title(self) -> str:
        return title(self.number, self.words)


def title(number: int | str, words: Sequence[str]) -> str:
    return f"job {number} ({' '.join(settings_of(words)) or 'no overrides'})"


def settings_of(words: Sequence[str]) -> list[str]:
    """The overrides that make a job what it is."""
    return [word for word in words if key_of(word) not in ("fail_fast", "multirun.resume")]


def key_of(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def planned(config: DictConfig, check: Callable[[DictConfig], Strict]) -> list[Job]:
    """Every job of Hydra's own sweeper, its settings checked, its folder still relative to the sweep's.

    Another sweeper plans its jobs as it goes: none is known then.

    Raises:
        UserError: two jobs have one folder, or what `check` raises.
    """
    if not config.hydra.sweeper._target_.endswith("BasicSweeper"):
        return []
    loader = GlobalHydra.instance().config_loader()
    words = [*_parameters(config.hydra.sweeper), *config.hydra.overrides.task]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(words)
    jobs: dict[Path, Job] = {}
    for number, job in enumerate(BasicSweeper.split_arguments(parsed, None)[0]):
        composed = loader.load_sweep_config(config, list(job))
        with open_dict(composed.hydra.job):
            composed.hydra.job.id = composed.hydra.job.num = number
        settings = check(composed)
        if isinstance(settings, Train) and settings.resume:
            raise UserError("resume continues one run: leave out -m; a sweep is continued by multirun.resume=FOLDER")
        folder = Path(str(composed.hydra.sweep.subdir))
        if folder in jobs:
            raise UserError(
                f"hydra.sweep.subdir={folder} is the folder of jobs {jobs[folder].number} and {number} alike; "
                "let it contain ${hydra.job.num}"
            )
        jobs[folder] = Job(number, list(job), folder, settings)
    return list(jobs.values())


def _parameters(sweeper: Any) -> list[str]:
    return [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]


def read_record(folder: Path) -> dict[str, Any]:
    """What Hydra noted of a sweep's command: `hydra` of its multirun.yaml.

    Raises:
        UserError: there is none of mnist-train.
    """
    for name in (RECORD, f".{RECORD}"):  # Hydra writes its own anew each time, and may be killed at it
        try:
            record = yaml.safe_load((folder / name).read_text(encoding="utf-8"))["hydra"]
            if record["job"]["config_name"] == "train" and isinstance(record["overrides"]["task"], list):
                return record
        except (OSError, yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
            continue
    raise UserError(f"{folder} is not a sweep's folder: it has no multirun.yaml of mnist-train -m")


def require_same(folder: Path, config: DictConfig, jobs: list[Job]) -> None:
    """Whether the command is that of the sweep in `folder`, so that it may be continued.

    Raises:
        UserError: it is another one; names what differs.
    """
    record = read_record(folder)
    theirs = settings_of(_parameters(record["sweeper"]) + record["overrides"]["task"])
    ours = settings_of(_parameters(config.hydra.sweeper) + list(config.hydra.overrides.task))
    if differing := differences(theirs, ours):
        raise UserError(
            f"{folder} is another sweep's folder: it has {differing}; choose another folder, or continue that "
            f"sweep with: mnist-train -m multirun.resume={folder}"
        )
    begun = {path.parent for path in folder.rglob("config.yaml") if path.parent.name != ".hydra"}
    for job in jobs:
        place = folder / job.folder
        if place in begun:
            stored, run = read_run(place)
            words = differences(settings_of(run["overrides"]), settings_of(job.words))
            if changed := words or _changed(stored, job.settings):
                raise UserError(f"{folder} is another sweep's folder: its {job.folder} has {changed}; choose another")
    if foreign := begun - {folder / job.folder for job in jobs}:
        raise UserError(
            f"{folder} is another sweep's folder: {min(foreign).name} is no job of this one; choose another"
        )


def differences(theirs: list[str], ours: list[str]) -> str:
    """`"seed=1, not seed=2; …"`, or nothing where both are the same."""
    if theirs == ours:
        return ""
    was, asked = ({key_of(word): word for word in words} for words in (theirs, ours))
    keys = [key for key in dict.fromkeys([*was, *asked]) if was.get(key) != asked.get(key)]
    named = [f"{was.get(key, f'no {key}')}, not {asked.get(key, 'none')}" for key in keys]
    return "; ".join(named) or f"{' '.join(theirs)}, not {' '.join(ours)}"


def _changed(stored: Train, settings: Strict) -> str:
    """What of a job that has begun would not be the same now, as where a YAML was edited."""
    assert isinstance(settings, Train)
    keys = ["architecture", "optimizer", "schedule", "seed", "epochs", "selection", "initialize", "freeze"]
    keys += ["augmentation", "label_smoothing", "averaging", "views"]
    was, now = (
        {key: getattr(one, key) for key in keys}
        | {f"data.{key}": value for key, value in one.data.model_dump(exclude={"root"}).items()}
        for one in (stored, settings)
    )
    brought = {"architecture", "data.normalization"} if settings.initialize else set()  # by its checkpoint
    return ", ".join(f"another {key}" for key in was if key not in brought and was[key] != now[key])


def continued(words: list[str]) -> list[str]:
    """The command line with `multirun.resume=FOLDER` written out: the sweep's own overrides, in its own folder.

    Raises:
        UserError: FOLDER is no sweep's, or overrides beside it differ from the sweep's.
    """
    arguments = get_args_parser().parse_known_args(words)[0]
    asked = [word for word in arguments.overrides if key_of(word) == "multirun.resume"]
    if not asked:
        return words
    named = OverridesParser.create().parse_override(asked[-1]).value()
    if named in (None, ""):
        raise UserError("multirun.resume is empty: name a sweep's folder")
    folder = Path(str(named)).absolute()
    record = read_record(folder)
    own = [word for word in arguments.overrides if word not in asked]
    hydras = [word for word in own if key_of(word).startswith(("hydra.", "hydra/"))]
    if any(key_of(word) == "hydra.sweep.dir" for word in hydras):
        raise UserError("multirun.resume names the sweep's folder: leave out hydra.sweep.dir")
    theirs = record["overrides"]["task"]
    known = {key_of(word): word for word in theirs}
    other = [word for word in settings_of(own) if word not in hydras and known.get(key_of(word)) != word]
    if other:
        was = [known.get(key_of(word), f"no {key_of(word)}") for word in other]
        raise UserError(
            f"multirun.resume={folder}: the sweep has {', '.join(was)}, not {', '.join(other)}; "
            "leave that out or start a new sweep"
        )
    ours = {key_of(word) for word in own} | {"hydra.sweep.dir", "hydra.mode"}
    flags = words[: len(words) - len(arguments.overrides)]
    if not arguments.multirun:
        flags = [*flags, "--multirun"]
    sources = [source["path"] for source in record["runtime"]["config_sources"] if source["provider"] == "command-line"]
    if sources and not arguments.config_dir:
        flags = [*flags, "--config-dir", sources[0]]
    if Path(record["runtime"]["cwd"]).is_dir():
        os.chdir(record["runtime"]["cwd"])  # relative paths in the sweep's overrides mean what they meant
    fast = [word for word in own if key_of(word) == "fail_fast"]
    tasks = [word for word in theirs if not fast or key_of(word) != "fail_fast"]
    kept = [word for word in record["overrides"]["hydra"] if key_of(word) not in ours]
    if "hydra/launcher" in ours:  # whose settings were the other one's
        kept = [word for word in kept if not key_of(word).startswith("hydra.launcher.")]
    return [*flags, *tasks, *fast, *kept, *hydras, literal("hydra.sweep.dir", str(folder))]

"""A sweep's folder: its command in sweep.yaml, how it is continued, and what its jobs have done, in results.csv."""

from __future__ import annotations

import logging
import shlex
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import configure_log
from omegaconf import DictConfig

from mnist_cnn.config.schema import Strict, UserError, validated
from mnist_cnn.config.settings import Train
from mnist_cnn.runs.command_line import literal, override_key, parsed, typed
from mnist_cnn.runs.files import write_csv, write_whole
from mnist_cnn.runs.folder import read_metrics, read_run, refuse_old
from mnist_cnn.runs.hydra_app import config_dir_flag, user_config_dir
from mnist_cnn.runs.strangers import AGAIN, plain_override, read_mapping, require_plain

log = logging.getLogger(__name__)

ACCURACIES = {"validation": "val/accuracy", "test": "test/accuracy"}
RECORD = "sweep.yaml"  # the sweep's command
OF_THE_COMMAND = ("fail_fast", "multirun.resume")  # these overrides change no job


class Record(Strict):
    """What sweep.yaml holds."""

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


@dataclass
class Sweep:
    """The sweep that this process runs."""

    folder: Path
    jobs: list[Job]
    config: DictConfig
    handlers: dict[int, Any]  # of signals, from before the sweep
    ended: bool = False


def job_overrides(overrides: list[str]) -> list[str]:
    """Those that make a job what it is."""
    return [word for word in overrides if override_key(word) not in OF_THE_COMMAND]


# --- its command -------------------------------------------------------------------------------------------


def write_record(folder: Path, config: DictConfig) -> None:
    """Note a sweep's command in its folder, once."""
    if (folder / RECORD).exists():
        return
    record = {
        "version": version("mnist-cnn"),
        "overrides": typed(config.hydra.overrides.task),
        "hydra": typed(config.hydra.overrides.hydra),
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
    if differing := differences(theirs, job_overrides(typed(config.hydra.overrides.task))):
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


# --- what its jobs have done -------------------------------------------------------------------------------


def state(folder: Path) -> str:
    """What a job has left in its folder: `finished`, `failed`, `interrupted` or `not begun`."""
    with suppress(UserError):  # a damaged one is none
        read_metrics(folder)
        return "finished"
    for file, name in (("error.txt", "failed"), ("config.yaml", "interrupted")):
        if (folder / file).is_file():
            return name
    return "not begun"


def failure(folder: Path) -> str:
    """Why a job failed: the first line of its error.txt, below which a traceback may stand."""
    error = folder / "error.txt"
    return error.read_text(encoding="utf-8").partition("\n")[0] if error.is_file() else ""


def report_states(sweep: Sweep) -> None:
    """Of a sweep that is continued: which of its jobs are kept, resumed, run again or run."""
    states = {job.folder: state(job.folder) for job in sweep.jobs}
    if set(states.values()) <= {"not begun"}:
        return
    done = list(states.values()).count("finished")
    log.info("continuing %s: %d of %d jobs are done", sweep.folder, done, len(states))
    verbs = {"finished": "kept", "interrupted": "resumed", "failed": "failed, run again", "not begun": "run"}
    for folder, name in states.items():
        log.info("\t%s: %s", folder.relative_to(sweep.folder), verbs[name])
        (folder / "error.txt").unlink(missing_ok=True)  # its train.log has the reason too


def report_end(folder: Path, title: str) -> None:
    """One line on how a job of another process has ended."""
    how = state(folder)
    if how == "failed":
        log.error("error: %s: %s", title, failure(folder))
        return
    if how == "finished":
        metrics = read_metrics(folder)
        test = f"test accuracy {metrics['test/accuracy']:.2%}, " if metrics.get("test/accuracy") is not None else ""
        how = f"{test}{metrics['fit_seconds']:.1f} s"
    log.info("%s: %s", title, how)


def conclude(sweep: Sweep) -> list[dict[str, Any]]:
    """Write results.csv and show it as a table: the jobs that have begun, best first by validation."""
    configure_log(sweep.config.hydra.hydra_logging, sweep.config.hydra.verbose)  # the last job's may still be there
    sweep.ended = True
    rows = []
    for job in sweep.jobs:
        if (how := state(job.folder)) == "not begun":
            continue
        finished = how == "finished"
        metrics = read_metrics(job.folder) if finished else {}
        row: dict[str, Any] = {
            "job": str(job.folder.relative_to(sweep.folder)),
            "overrides": " ".join(job_overrides(job.overrides)),
            **{override_key(word): word.partition("=")[2] for word in job_overrides(job.overrides)},
        }
        row |= {key: metrics.get(key) for key in ("val/accuracy", "test/accuracy", "fit_seconds")}
        rows.append({**row, "error": "" if finished else failure(job.folder) or how})
    if rows:
        rows.sort(key=lambda row: -(row["val/accuracy"] or 0.0))  # without validation in the order of the jobs
        write_csv(sweep.folder / "results.csv", rows)
        log.info("%s\n%s%s", results_table(rows), over_seeds(rows), sweep.folder / "results.csv")
    return rows


def results_table(rows: list[dict[str, Any]]) -> str:
    def percent(value: float | None) -> str:
        return "–" if value is None else f"{value:.2%}"

    width = max(len("overrides"), *(len(row["overrides"]) for row in rows))
    lines = [f"{'overrides':<{width}}  validation     test  seconds"]
    for row in rows:
        seconds = "–" if row["fit_seconds"] is None else f"{row['fit_seconds']:.1f}"
        figures = f"{percent(row['val/accuracy']):>10} {percent(row['test/accuracy']):>8} {seconds:>8}"
        note = {"": "", "interrupted": "  interrupted"}.get(row["error"], f"  failed: {row['error']}")
        lines.append(f"{row['overrides']:<{width}}  {figures}{note}")
    return "\n".join(lines)


def over_seeds(rows: list[dict[str, Any]]) -> str:
    """A line for each set of overrides that several seeds share: mean ± sd of their accuracies."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if not row["error"]:
            others = [word for word in row["overrides"].split() if override_key(word) != "seed"]
            groups.setdefault(" ".join(others), []).append(row)
    lines = []
    for overrides, group in groups.items():
        figures = {name: [100 * row[key] for row in group if row[key]] for name, key in ACCURACIES.items()}
        shown = [f"{name} {mean(f):.2f} ± {stdev(f):.2f} %" for name, f in figures.items() if len(f) == len(group) > 1]
        if shown:
            lines.append(f"{overrides}  {', '.join(shown)} ({len(group)} seeds)\n".lstrip())
    return "".join(lines)


def report_stop(sweep: Sweep) -> None:
    """The end of a sweep that broke off: its table, which jobs are done, and which were not begun."""
    rows = conclude(sweep)
    done = [row["job"] for row in rows if not row["error"]]
    waiting = [" ".join(job_overrides(job.overrides)) for job in sweep.jobs if state(job.folder) == "not begun"]
    failed = any(state(job.folder) == "failed" for job in sweep.jobs)
    log.error(
        "the sweep was stopped%s: %d of %d jobs are done%s; not begun: %s%s",
        ", as fail_fast=true" if sweep.config.get("fail_fast") and failed else "",
        len(done),
        len(sweep.jobs),
        f" ({', '.join(done)})" if done else "",
        " | ".join(waiting) or "none",
        continue_line(sweep),
    )


def continue_line(sweep: Sweep) -> str:
    """The command that continues it, with what its folder alone may not name."""
    words = [*config_dir_flag(user_config_dir(sweep.config.hydra)), f"multirun.resume={sweep.folder.absolute()}"]
    again = [word for word in recorded_words(read_record(sweep.folder)).values() if not plain_override(word)]
    return f"; continue with: {shlex.join(['mnist-train', '-m', *words, *again])}"

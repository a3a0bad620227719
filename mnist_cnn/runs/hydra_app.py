"""How Hydra starts a command: checked before a folder is made, errors in one line, and the contract's exit statuses."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import threading
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn, TextIO

import hydra
from hydra._internal.utils import get_args_parser  # Hydra's own flags: there is no public parser of them
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from mnist_cnn.config.schema import RunError, Strict, UserError, nearest, validated
from mnist_cnn.config.settings import CONF, OWNED_TRAINER_KEYS, Evaluate, Export, Import, Predict, Train
from mnist_cnn.config.study_settings import SweepSettings
from mnist_cnn.runs.folder import claim, discard, override_key, read_run, release_all, versions, write_whole

log = logging.getLogger(__name__)

# The schema of each command, by the name of its configuration.
SCHEMAS: dict[str, type[Strict]] = {
    "train": Train,
    "evaluate": Evaluate,
    "predict": Predict,
    "export": Export,
    "import": Import,
    "sweep": SweepSettings,
}
PATHS = {"checkpoint", "images", "initialize", "resume", "multirun.resume", "data.root"}
NEW_PATHS = {"output", "grid", "folder", "keras", "hydra.run.dir", "hydra.sweep.dir"}  # they need not be there yet
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # no fault of the user's input
SEARCHES = "searches are mnist-sweep's, as in mnist-sweep sweep=learning_rate"
# Words that other packages have for it.
MEANT = {
    "lr": "optimizer.lr",
    "learning_rate": "optimizer.lr",
    "dropout": "architecture.dense=[{units:64,dropout:0.5}]",
    "batch_size": "data.batch_size",
    "device": "accelerator",
    "devices": "accelerator.devices",
    "gpus": "accelerator.devices",
    "trainer.gpus": "accelerator.devices",
    "model": "architecture",
    "dataset": "data",
    "max_epochs": "epochs",
    "ckpt_path": "resume",
}
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)

FILE_FORMAT = "%(asctime)s %(levelname)s %(message)s"  # of a log in a file, as in conf/base.yaml


def folder_name(text: Any) -> str:
    """Overrides as a folder's name: only characters that need no quoting in a shell or in Hydra."""
    return re.sub(r"[^\w.+-]+", "-", str(text)).strip("-")[:180]


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


class Console(logging.StreamHandler[TextIO]):
    """What a user reads on stdout, what went wrong on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """A reader that has gone, such as `head`, ends the output and not the work."""
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        else:
            super().handleError(record)


# --- errors ------------------------------------------------------------------------------------------------


def refuse(reason: object, error: Exception | None = None) -> NoReturn:
    """End the command as the contract says for wrong input: one line on stderr, status 2; 1 where a disk is full."""
    print(f"error: {' '.join(str(reason).split())}", file=sys.stderr)
    raise SystemExit(1 if isinstance(error, OSError) and error.errno in NO_ROOM else 2)


def in_one_line(error: Exception, config_name: str) -> str:
    """Hydra's and OmegaConf's errors in our words, with the nearest right name."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, MissingConfigException) and (plugin := re.search(r"hydra/launcher/(joblib|submitit)_?", text)):
        return f"hydra/launcher needs a package that is not installed: pip install 'mnist-cnn[{plugin[1]}]'"
    if isinstance(error, MissingConfigException) and str(error.missing_cfg_file).startswith("hydra/sweeper/"):
        return f"{error.missing_cfg_file}: no such sweeper: {SEARCHES}"
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = ", ".join(error.options)
        return f"{group}={option}: no such option{nearest(option, error.options)} (there are {options})"
    if isinstance(error, OverrideParseException) and str(error.override).startswith("storage="):
        # The address is not repeated: it may hold a password.
        return "storage: expected storage='\"ADDRESS\"', as it has characters that are special to Hydra"
    if isinstance(error, OverrideParseException):
        if (torn := str(error.override)).count("[") != torn.count("]") or torn.count("{") != torn.count("}"):
            return f"{torn}: the shell has taken it apart: put the whole of key=value in single quotes"
        reason = next(line for line in text.splitlines() if line.strip()).removeprefix("LexerNoViableAltException: ")
        return f"{error.override}: expected key=value; quote what is special to Hydra, as in 'key=\"a b\"' ({reason})"
    if text.startswith("Config group override"):
        return f"a group takes the name of one of its options, such as architecture=conv10 ({text.splitlines()[0]})"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else text
    if match := re.match(r"Error merging override (\S+?)([.][0-9]+)?([.][^.=]+)?=", text):
        what = f"{match[1]} has no item {match[2][1:]}" if match[2] else "it does not fit what is there"
        return f"{text.removeprefix('Error merging override ')}: {what}"
    if match := re.match(r"Could not append to config. An item is already at '(.+)'", text):
        return f"+{match[1]} adds a key that is there already; set it with {match[1]}=…"
    if match := re.match(
        r"Could not (?:override|append to config|delete from config)[^'\n]*'([^'\n]+?)(?:@.*)?'", text
    ):
        return _unknown_key(match[1], config_name)
    if match := re.match(r"(?:Missing mandatory value|Structured config of type.*): (\S+)", text):
        return f"{match[1]} is missing; give {match[1]}=…"
    lines = (line.strip() for line in text.splitlines())
    return "; ".join(line for line in lines if line and "full_key" not in line and "object_type" not in line)


def _unknown_key(key: str, config_name: str) -> str:
    if key == "hparams_search":
        return f"unknown key {key}: {SEARCHES}"
    group, _, flag = key.partition(".")
    if group == "trainer" and flag in OWNED_TRAINER_KEYS:
        return f"{key} is set by the run itself; {OWNED_TRAINER_KEYS[flag]}"
    if key.startswith("hydra"):
        return f"unknown key {key}"
    within_command = GlobalHydra.instance().is_initialized()
    with nullcontext() if within_command else hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        known = OmegaConf.to_container(hydra.compose(config_name))
    keys = set(_keys(known))
    if (meant := MEANT.get(key)) and meant.partition(".")[0] in keys:
        return f"unknown key {key}; did you mean {meant}?"
    flags = sorted(each.partition(".")[2] for each in keys if each.startswith(f"{group}."))
    if flag and flags and not nearest(flag, flags):
        return f"unknown key {key}; {group} has {', '.join(flags)}"
    return f"unknown key {key}{nearest(key, keys)}"


def _keys(config: Any, prefix: str = "") -> Iterable[str]:
    """Every key of a composed configuration, groups included, as the command line writes it."""
    for key, value in config.items() if isinstance(config, dict) else ():
        yield f"{prefix}{key}"
        yield from _keys(value, f"{prefix}{key}.")


# --- a command's configuration -----------------------------------------------------------------------------


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain dicts and lists, every interpolation resolved."""
    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def plain_job(config: DictConfig, folder: Path = Path()) -> dict[str, Any]:
    """The job's part of a composed configuration, resolved for a run in `folder`, without Hydra's own part."""
    previous = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        runtime: Any = HydraConfig.get().runtime
        with read_write(runtime):
            runtime.output_dir = str(folder)
        return plain(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
    finally:
        HydraConfig.instance().cfg = previous


def chosen(config: DictConfig, key: str) -> bool:
    """Whether the user has set this key of Hydra's on the command line."""
    return any(override.lstrip("+").startswith(f"{key}=") for override in config.hydra.overrides.hydra)


def user_config_dir(hydra_config: Any) -> str | None:
    """The folder that the user's --config-dir names, from Hydra's own configuration of the command."""
    for source in hydra_config.runtime.config_sources:
        if source.provider == "command-line":
            return str(Path(source.path).absolute())
    return None


class RunCallback(Callback):
    """Hydra's hook before a single run: refuse wrong settings before a folder is made, then claim the folder."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        name = config.hydra.job.config_name
        try:
            settings = validated(SCHEMAS[name], plain_job(config))
            with read_write(config.hydra):
                if isinstance(settings, Train) and settings.resume:
                    read_run(Path(settings.resume))
                    config.hydra.run.dir = settings.resume
                    config.hydra.output_subdir = None  # Hydra's own record of the first start stays as it is
                elif config.hydra.output_subdir is not None:
                    folder = claim(Path(config.hydra.run.dir), chosen(config, "hydra.run.dir"))
                    config.hydra.run.dir = str(folder)
        except (UserError, OSError, OmegaConfBaseException) as error:
            refuse(in_one_line(error, name), error)


# --- a job -------------------------------------------------------------------------------------------------

sweep_process: int | None = None  # the process that runs a sweep, in itself; see multirun


def is_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def in_worker() -> bool:
    """Whether this process works on one job of a sweep that another process runs."""
    return is_sweep() and sweep_process != os.getpid()


def launcher_name() -> str:
    return str(HydraConfig.get().launcher["_target_"]).rpartition(".")[2]


def job_title(number: int | str, overrides: Iterable[str]) -> str:
    words = [word for word in overrides if not word.startswith("fail_fast=")]
    return f"job {number} ({' '.join(words) or 'no overrides'})"


def guarded(work: Callable[[], Any], folder: Path, fail_fast: bool = False) -> Any:
    """A job's failures as the contract has them; in a sweep they are reported and the other jobs go on."""
    details = ""
    try:
        return work()
    except UserError as error:
        status, reason = 2, str(error)
    except RunError as error:
        status, reason = 1, str(error)
    except OSError as error:
        status, reason = 1, in_one_line(error, "train")
    except KeyboardInterrupt:  # while torch is imported: from then on a run saves at it
        discard(folder)
        print("stopped by SIGINT", file=sys.stderr)
        raise SystemExit(130) from None
    except SystemExit as ended:
        discard(folder)
        # In a worker a signal ends this job alone, to be resumed; SLURM has to see it, as it may queue the job anew.
        if ended.code in STOPPED and in_worker() and launcher_name() != "SlurmLauncher":
            return None
        raise
    except Exception as error:
        if not is_sweep():
            raise
        status, reason, details = 1, f"{type(error).__name__}: {error}", traceback.format_exc()
    reason = " ".join(reason.split())
    if not is_sweep():
        log.error("error: %s", reason)
        discard(folder)
        raise SystemExit(status)
    log.error("error: %s: %s", job_title(HydraConfig.get().job.num, HydraConfig.get().overrides.task), reason)
    write_whole(folder / "error.txt", f"{reason}\n{details}")
    if fail_fast:
        raise SystemExit(1)
    return None


# --- a command ---------------------------------------------------------------------------------------------


def text(value: Any) -> str:
    """A value as an override writes it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(text, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{text(each)}' for key, each in value.items())}}}"
    return str(value)


def literal(key: str, value: str) -> str:
    """An override by which Hydra takes every character of `value` as it is."""
    # Of a backslash Hydra takes another meaning before a quote only.
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"{key}='{escaped}'"


def _literal_paths(arguments: list[str]) -> list[str]:
    """Quote paths, so that spaces, commas, `=` and letters of any script in them mean themselves; `~` is the home."""
    quoted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key in PATHS | NEW_PATHS and (value == "~" or value.startswith("~/")):
            value = str(Path(value).expanduser())
            argument = f"{key}={value}"
        odd = key in PATHS or re.search(r"[^\w./+:-]", value)
        there = odd and not key.startswith("-") and os.path.exists(value)  # noqa: PTH110
        new = key in NEW_PATHS and value[:1] not in ("'", '"', "[") and value != "null" and "${" not in value
        if equals and value and (there or new):
            argument = literal(key, value)
        quoted.append(argument)
    return quoted


def parsed(words: list[str]) -> Namespace:
    """The command line as Hydra's own parser reads it, flags and overrides in any order."""
    # Ctrl-C ends what has not begun at once; argparse would make an error of its own of it.
    signals = (signal.SIGINT,) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, signal.SIG_DFL) for number in signals}
    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign, assignment]
    try:
        known, unknown = parser.parse_known_intermixed_args(words)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        refuse(f"unknown flag {unknown[0]}; settings are written without dashes, such as {name}=…")
    return known


def run_command(task: Callable[[], Any], config_name: str) -> NoReturn:
    """Run a `@hydra.main` task as a command: `task` ends by SystemExit or returns for status 0."""
    # Before torch is imported: threads that spin while they wait take the cores from whoever else has work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ["MPLBACKEND"] = (
        "agg"  # pictures go to files; a notebook's own backend is not there for its `!mnist-train`
    )
    if sys.stdin is not None and hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # paths, which may be no UTF-8
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as services do
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # no name of a file or a class is lost for its letters
    words = _literal_paths(sys.argv[1:])
    if "--version" in words:
        print(", ".join(f"{name} {number}" for name, number in versions().items()))
        raise SystemExit(0)
    known = parsed(words)
    given = [override_key(word) for word in known.overrides]
    for key, word in zip(given, known.overrides, strict=True):
        if given.count(key) > 1 and re.search(r"=.*[\[{].*:", word):  # as bash makes of [{filters:32,kernel:3}]
            refuse(f"{word}: the shell has taken it apart: put the whole of {key}=… in single quotes")
    # argparse takes overrides in one place only; users write flags anywhere between them.
    sys.argv[1:] = [word for word in words if word not in known.overrides] + known.overrides
    # Hydra hands its errors on only in this mode; a user who asks for it gets the traceback as well.
    traceback_wanted = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if known.help:
        from mnist_cnn.runs.help import help_text

        try:
            shown = help_text(config_name, known.overrides, known.config_dir)
        except Exception as error:  # a wrong override: Hydra has no common one
            refuse(in_one_line(error, config_name))
        Console().handle(logging.makeLogRecord({"msg": shown, "levelno": logging.INFO}))
        raise SystemExit(0)
    logging.raiseExceptions = False  # a log that finds no room on the disk prints no traceback
    try:
        task()
    except Exception as error:
        # What fails before the job begins is the command line or a YAML of the user's.
        in_job = any(frame.name == "run_job" for frame in traceback.extract_tb(error.__traceback__))
        if traceback_wanted or (in_job and not isinstance(error, UserError | OSError)):
            raise
        GlobalHydra.instance().clear()
        refuse(in_one_line(error, config_name), error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        release_all()
    raise SystemExit(0)

"""How Hydra starts a command: checked before a folder is made, errors in one line, and the contract's exit statuses."""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TextIO

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write

from mnist_cnn.config.schema import RunError, Strict, UserError, printable, validated
from mnist_cnn.config.settings import Draw, Evaluate, Export, Import, Predict, Train
from mnist_cnn.config.study_settings import SweepSettings
from mnist_cnn.runs.command_line import help_text, literal_paths, override_key, parsed, typed
from mnist_cnn.runs.errors import in_one_line, refuse
from mnist_cnn.runs.files import write_whole
from mnist_cnn.runs.folder import claim, discard, read_run, release_all, versions
from mnist_cnn.runs.strangers import plain_override, require_own_files

log = logging.getLogger(__name__)

# The schema of each command, by the name of its configuration.
SCHEMAS: dict[str, type[Strict]] = {
    "train": Train,
    "evaluate": Evaluate,
    "predict": Predict,
    "export": Export,
    "draw": Draw,
    "import": Import,
    "sweep": SweepSettings,
}
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)

FILE_FORMAT = "%(asctime)s %(levelname)s %(message)s"  # of a log in a file, as in conf/base.yaml


def folder_name(text: Any) -> str:
    """Overrides as a folder's name: only characters that need no quoting in a shell or in Hydra."""
    return re.sub(r"[^\w.+-]+", "-", str(text)).strip("-")[:180]


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


class Printable(logging.Formatter):
    """Lines as a terminal may show them, in a log's file too."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class LogFile(logging.FileHandler):
    """A run's train.log; where it cannot be written, as in a folder that is only read, the work goes on."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            super().emit(record)


class Console(logging.StreamHandler[TextIO]):
    """What a user reads on stdout, what went wrong on stderr."""

    lost: OSError | None = None  # why what was to be read is not

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self.setFormatter(Printable())

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """A reader that has gone, such as `head`, or a full disk ends the output and not the work."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        if not isinstance(error, BrokenPipeError):
            Console.lost = error
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


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
    return any(override.lstrip("+").startswith(f"{key}=") for override in typed(config.hydra.overrides.hydra))


def user_config_dir(hydra_config: Any) -> str | None:
    """The folder that the user's --config-dir names, from Hydra's own configuration of the command."""
    for source in hydra_config.runtime.config_sources:
        if source.provider == "command-line":
            return str(Path(source.path).absolute())
    return None


IN_THE_FOLDER = ("resume", "hydra.run.dir", "fail_fast", "data.root")  # keys that a resumed run has without them


def resume_command(folder: Path, overrides: Iterable[str]) -> str:
    """The command that continues a run; all of its command line where that names what a folder alone may not."""
    config_dir = user_config_dir(HydraConfig.get()) if HydraConfig.initialized() else None
    words = [word for word in overrides if override_key(word) not in IN_THE_FOLDER]
    again = words if config_dir or not all(map(plain_override, words)) else []
    return shlex.join(["mnist-train", *config_dir_flag(config_dir), f"resume={folder}", *again])


def config_dir_flag(config_dir: str | None) -> list[str]:
    return ["--config-dir", config_dir] if config_dir else []


class RunCallback(Callback):
    """Hydra's hook before a single run: refuse wrong settings before a folder is made, then claim the folder."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        name = config.hydra.job.config_name
        try:
            settings = validated(SCHEMAS[name], plain_job(config))
            with read_write(config.hydra):
                if isinstance(settings, Train) and settings.resume:
                    read_run(Path(settings.resume))
                    require_own_files(Path(settings.resume))
                    config.hydra.run.dir = settings.resume
                    config.hydra.output_subdir = None  # Hydra's own record of the first start stays as it is
                elif config.hydra.output_subdir is not None:
                    folder = claim(Path(config.hydra.run.dir), chosen(config, "hydra.run.dir"))
                    config.hydra.run.dir = str(folder)
        except Exception as error:  # Hydra would warn of it and go on
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
        raise
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
    log.error("error: %s: %s", job_title(HydraConfig.get().job.num, typed(HydraConfig.get().overrides.task)), reason)
    write_whole(folder / "error.txt", printable(f"{reason}\n{details}"))
    if fail_fast:
        raise SystemExit(1)
    return None


# --- a command ---------------------------------------------------------------------------------------------


def run_command(task: Callable[[], Any], config_name: str) -> NoReturn:
    """Run a `@hydra.main` task as a command: `task` ends by SystemExit or returns for status 0."""
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
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)
    words = literal_paths(sys.argv[1:])
    if "--version" in words:
        print(", ".join(f"{name} {number}" for name, number in versions().items()))
        raise SystemExit(0)
    known = parsed(words)
    given = [override_key(word) for word in known.overrides]
    for key, word in zip(given, known.overrides, strict=True):
        if given.count(key) > 1 and re.search(r"=\[?\w+:[^/\\]", word):  # as bash makes of [{filters:32,kernel:3}]
            refuse(f"{word}: the shell has taken it apart: put the whole of {key}=… in single quotes")
    for key, following in pairwise(given):
        if key == following and known.multirun:  # as bash makes of seed={1,2}: only the last would be a job
            refuse(f"{key} is given {given.count(key)} times: the values of a sweep stand together, as in seed=1,2,3")
    # argparse takes overrides in one place only; users write flags anywhere between them.
    sys.argv[1:] = [word for word in words if word not in known.overrides] + known.overrides
    # Hydra hands its errors on only in this mode; a user who asks for it gets the traceback as well.
    traceback_wanted = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if known.help:
        try:
            shown = help_text(config_name, known.overrides, known.config_dir)
        except Exception as error:  # a wrong override: Hydra has no common one
            refuse(in_one_line(error, config_name))
        Console().handle(logging.makeLogRecord({"msg": shown, "levelno": logging.INFO}))
        raise SystemExit(0)
    sys.excepthook = lambda *error: print(printable("".join(traceback.format_exception(*error))), file=sys.stderr)
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
        print("stopped by SIGINT", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        release_all()
    if Console.lost:
        refuse(f"the output could not be written: {Console.lost.strerror}", Console.lost)
    raise SystemExit(0)


def _terminated(*_: Any) -> NoReturn:
    """At SIGTERM what is half written is taken away, as at Ctrl-C."""
    raise SystemExit(128 + signal.SIGTERM)

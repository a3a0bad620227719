"""What the commands share: Hydra's entry, and its errors in one line with exit status 2."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NoReturn, TextIO

import hydra
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from mnist_cnn.config.schema import UserError, nearest
from mnist_cnn.config.settings import CONF

# Folder names come from overrides: keep them to characters that need no quoting in a shell or in Hydra.
OmegaConf.register_new_resolver(
    "folder_name", lambda text: re.sub(r"[^\w.+-]+", "-", str(text)).strip("-")[:180], replace=True
)


PATHS = {"checkpoint", "images", "initialize", "resume", "multirun.resume", "data.root"}
PATHS |= {"hydra.run.dir", "hydra.sweep.dir"}


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


NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # no fault of the user's input


def refuse(reason: object, error: Exception | None = None) -> NoReturn:
    """End the command as the contract says for wrong input: one line on stderr, status 2; 1 where a disk is full."""
    print(f"error: {' '.join(str(reason).split())}", file=sys.stderr)
    raise SystemExit(1 if isinstance(error, OSError) and error.errno in NO_ROOM else 2)


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain dicts and lists, every interpolation resolved."""
    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _leaves(config: Any, prefix: str = "") -> list[str]:
    """Every key of a composed configuration, groups included, as the command line writes it."""
    if not OmegaConf.is_dict(config):
        return []
    names = [f"{prefix}{key}" for key in config]
    return names + [
        leaf for name, key in zip(names, config, strict=True) for leaf in _leaves(config._get_node(key), f"{name}.")
    ]


def in_one_line(error: Exception, config_name: str) -> str:
    """Hydra's and OmegaConf's errors in our words, with the nearest right name."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, MissingConfigException) and (plugin := re.search(r"hydra/launcher/(joblib|submitit)_?", text)):
        name = plugin[1]
        return f"hydra/launcher needs a package that is not installed: pip install 'mnist-cnn[{name}]'"
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return (
            f"{group}={option}: no such option{nearest(option, error.options)} (there are {', '.join(error.options)})"
        )
    if isinstance(error, OverrideParseException):
        reason = next(line for line in text.splitlines() if line.strip()).removeprefix("LexerNoViableAltException: ")
        return f"{error.override}: expected key=value; quote what is special to Hydra, as in 'key=\"a b\"' ({reason})"
    if text.startswith("Config group override"):
        return f"a group takes the name of one of its options, such as architecture=conv10 ({text.splitlines()[0]})"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else text
    if match := re.match(r"Could not append to config. An item is already at '(.+)'", text):
        return f"+{match[1]} adds a key that is there already; set it with {match[1]}=…"
    if match := re.match(
        r"Could not (?:override|append to config|delete from config)[^'\n]*'([^'\n]+?)(?:@.*)?'", text
    ):
        begun = GlobalHydra.instance().is_initialized()  # within a command
        with nullcontext() if begun else hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            known = _leaves(hydra.compose(config_name))
        return f"unknown key {match[1]}{'' if match[1].startswith('hydra') else nearest(match[1], known)}"
    if match := re.match(r"(?:Missing mandatory value|Structured config of type.*): (\S+)", text):
        return f"{match[1]} is missing; give {match[1]}=…"
    first = text.strip().splitlines()
    return "; ".join(
        line.strip() for line in first if line.strip() and "full_key" not in line and "object_type" not in line
    )


def literal(key: str, value: str) -> str:
    """An override by which Hydra takes every character of `value` as it is."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"


def _literal_paths(arguments: list[str]) -> list[str]:
    """Quote values that name an existing path, so that spaces, commas and `=` in it mean themselves."""
    quoted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        odd = key in PATHS or re.search(r"[^\w./+:-]", value)
        if equals and odd and not key.startswith("-") and value and os.path.exists(value):  # noqa: PTH110
            argument = literal(key, value)
        quoted.append(argument)
    return quoted


def run_command(task: Callable[[], Any], config_name: str) -> NoReturn:
    """Run a `@hydra.main` task as a command: `task` ends by SystemExit or returns for status 0."""
    words = _literal_paths(sys.argv[1:])
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
    # argparse takes overrides in one place only; users write flags anywhere between them.
    sys.argv[1:] = [word for word in words if word not in known.overrides] + known.overrides
    # Hydra hands its errors on only in this mode; a user who asks for it gets the traceback as well.
    traceback_wanted = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if known.help:  # Hydra would copy all its sources for each group that it lists: half of the time
        ConfigRepository.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
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
    raise SystemExit(0)

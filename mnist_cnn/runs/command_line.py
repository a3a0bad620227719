"""The words of a command line: how Hydra reads and writes them, and what --help says of them."""

from __future__ import annotations

import os
import re
import signal
import threading
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.utils import get_args_parser  # Hydra's own flags: there is no public parser of them
from omegaconf import OmegaConf

from mnist_cnn.config.settings import CONF
from mnist_cnn.runs.errors import refuse

PATHS = {"checkpoint", "images", "initialize", "resume", "multirun.resume", "data.root"}
NEW_PATHS = {"output", "grid", "folder", "keras", "torch", "hydra.run.dir", "hydra.sweep.dir"}  # need not be there
NAMED_PACKAGE = re.compile(r"# @package (\S+)")
KEY_LINE = re.compile(r"(?P<indent> *)(?P<key>\w+):[^#]*(?:# (?P<comment>.*))?")
WIDTH = 46  # of a key with its value; the comments stand beside it


# --- overrides ---------------------------------------------------------------------------------------------


def override_key(override: str) -> str:
    """The key that an override sets, such as `optimizer.lr` of `+optimizer.lr=0.1`."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def typed(words: Any) -> list[str]:
    """A list of words in Hydra's configuration as they were typed: `${…}` in one is for the job to fill in."""
    as_typed: Any = OmegaConf.to_container(words, resolve=False)
    return list(as_typed)


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each key of a configuration with its value, as the command line names it; nothing of an empty group."""
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, each in value.items():
        yield from flat(each, f"{prefix}.{key}".lstrip("."))


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


def literal_paths(arguments: list[str]) -> list[str]:
    """Quote paths, so that spaces, commas, `=` and letters of any script in them mean themselves; `~` is the home."""
    quoted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        path = os.path.expanduser(value) if key in PATHS | NEW_PATHS else value  # noqa: PTH111 — `~x` may be a file
        odd = key in PATHS or re.search(r"[^A-Za-z0-9_./+:-]", path)
        there = odd and not key.startswith("-") and os.path.exists(path)  # noqa: PTH110
        plain = value[:1] not in ("'", '"', "[") and value != "null" and "${" not in value
        # Of those that must be there several may be a sweep's choices: Hydra finds them.
        new = plain and (key in NEW_PATHS or (key in PATHS and not re.search(r"[,(]", value)))
        if equals and value and (there or new):
            argument = literal(key, path)
        elif key in PATHS and (listed := re.fullmatch(r"\[(.*[^A-Za-z0-9_\s./,+:-].*)\]", value)):
            paths = [os.path.expanduser(each.strip()) for each in listed[1].split(",")]  # noqa: PTH111
            if all(map(os.path.exists, paths)):
                argument = f"{key}=[{','.join(literal('', each)[1:] for each in paths)}]"
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
            # The command's entry has left it to the system until here.
            signal.signal(number, signal.default_int_handler if handler == signal.SIG_DFL else handler)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        refuse(f"unknown flag {unknown[0]}; settings are written without dashes, such as {name}=…")
    return known


# --- --help ------------------------------------------------------------------------------------------------


def help_text(config_name: str, overrides: list[str], config_dir: str | None) -> str:
    """What a command with these overrides says of itself."""
    folders = [CONF, *([Path(config_dir)] if config_dir else [])]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        search = [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"] if config_dir else []
        config = hydra.compose(config_name, [*overrides, *search], return_hydra_config=True)
    choices = {
        group: option for group, option in config.hydra.runtime.choices.items() if not group.startswith("hydra/")
    }
    lines = [config.hydra.help.header, ""]
    if choices:
        lines.append("Groups (choose with group=option):")
        for group in sorted(choices):
            options = sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})
            lines.append(f"  {group}: {', '.join(options)}")
        lines.append("")
    about = dict(_comments(config_name, "", folders))
    for group, option in choices.items():
        about |= dict(_comments(f"{group}/{option}", group, folders))
    lines.append("Keys with their values (set with key=value):")
    job = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    for key, value in flat(OmegaConf.to_container(job)):
        if key.endswith("._partial_") or (key.endswith("._target_") and value):  # Hydra's own
            continue
        lines.append(f"  {f'{key}={text(value)}':<{WIDTH}}  {about.get(key, '')}".rstrip())
    return "\n".join([*lines, "", "Hydra's own flags (--cfg job, -m, --config-dir, tab completion …): --hydra-help."])


def _comments(name: str, package: str, folders: list[Path]) -> Iterator[tuple[str, str]]:
    """The comments of a YAML by key, those of the files that it builds on first."""
    file = next((found for folder in folders if (found := folder / f"{name}.yaml").is_file()), None)
    if file is None:
        return
    content = file.read_text(encoding="utf-8")
    if named := NAMED_PACKAGE.search(content):
        package = named[1].removeprefix("_global_")
    for default in (yaml.safe_load(content) or {}).get("defaults", []):
        if isinstance(default, str) and default != "_self_":
            yield from _comments(str(Path(name).with_name(default)), package, folders)
    path: list[str] = []
    for line in content.splitlines():
        if match := KEY_LINE.match(line):
            path[len(match["indent"]) // 2 :] = [match["key"]]
            if match["comment"]:
                yield ".".join([*([package] if package else []), *path]), match["comment"]

"""Errors of Hydra's, OmegaConf's and the system's in one line of the user's words, with the nearest right name."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import OmegaConf

from mnist_cnn.config.architecture import Block
from mnist_cnn.config.schema import UserError, nearest, printable
from mnist_cnn.config.settings import CONF, EXPERIMENT, OWNED_TRAINER_KEYS

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # no fault of the user's input
SEARCHES = "searches are mnist-sweep's, as in mnist-sweep sweep=learning_rate"
# Words that other packages have for it, also behind a dot; the first that a command has is meant.
MEANT = {
    "lr": ["optimizer.lr"],
    "learning_rate": ["optimizer.lr"],
    "dropout": ["architecture.dense=[{units:64,dropout:0.5}]"],
    "batch_size": ["data.batch_size"],
    "device": ["accelerator"],
    "devices": ["accelerator.devices"],
    "gpus": ["accelerator.devices"],
    "model": ["architecture", "checkpoint"],
    "dataset": ["data"],
    "max_epochs": ["epochs"],
    "ckpt": ["resume", "checkpoint"],
    "ckpt_path": ["resume", "checkpoint"],
    "resume": ["checkpoint"],
}
FILES = {"predict": "images", **dict.fromkeys(("evaluate", "export", "draw"), "checkpoint")}  # the key for a mere path


def refuse(reason: object, error: Exception | None = None) -> NoReturn:
    """End the command as the contract says for wrong input: one line on stderr, status 2; 1 where a disk is full."""
    print(f"error: {printable(' '.join(str(reason).split()))}", file=sys.stderr)
    raise SystemExit(1 if isinstance(error, OSError) and error.errno in NO_ROOM else 2)


def in_one_line(error: Exception, config_name: str) -> str:
    """Hydra's and OmegaConf's errors in our words, with the nearest right name."""
    text = str(error).partition("\nConfig search path:")[0]
    if isinstance(error, UserError):
        return text
    if isinstance(error, MissingConfigException) and (plugin := re.search(r"hydra/launcher/(joblib|submitit)_?", text)):
        return f"hydra/launcher needs a package that is not installed: pip install 'mnist-cnn[{plugin[1]}]'"
    if isinstance(error, MissingConfigException) and str(error.missing_cfg_file).startswith("hydra/sweeper/"):
        return f"{error.missing_cfg_file}: no such sweeper: {SEARCHES}"
    group, _, option = str(getattr(error, "missing_cfg_file", None)).rpartition("/")
    options = getattr(error, "options", None) or sorted(file.stem for file in (CONF / group).glob("*.yaml") if group)
    if isinstance(error, MissingConfigException) and options:
        if option.endswith(".yaml"):
            return f"{group}={option}: your own file is an option by --config-dir FOLDER, as FOLDER/GROUP/NAME.yaml"
        return f"{group}={option}: no such option{nearest(option, options)} (there are {', '.join(options)})"
    if "@experiment." in text:
        return EXPERIMENT
    if text.startswith("In 'experiment/"):
        return f"{text}; an experiment chooses an option by: override /optimizer: sgd"
    if isinstance(error, OverrideParseException) and str(error.override).startswith("storage="):
        # The address is not repeated: it may hold a password.
        return "storage: expected storage='\"ADDRESS\"', as it has characters that are special to Hydra"
    if isinstance(error, OverrideParseException):
        torn = str(error.override)
        if torn.count("[") != torn.count("]") or torn.count("{") != torn.count("}") or torn.endswith(","):
            return f"{torn}: the shell has taken it apart: put the whole of key=value in single quotes"
        if config_name in FILES and re.fullmatch(r"[^=]*[./][^=]*", torn):
            return f"{torn}: expected key=value; did you mean {FILES[config_name]}={torn}?"
        if not re.match(r"[+~]*[\w./@:-]+=", torn):
            return f"{torn}: expected key=value, without spaces, as in epochs=3 or architecture.blocks.0.filters=32"
        reason = next(line for line in text.splitlines() if line.strip()).removeprefix("LexerNoViableAltException: ")
        return f"{error.override}: expected key=value; quote what is special to Hydra, as in 'key=\"a b\"' ({reason})"
    if match := re.match(r"Ambiguous value for argument '(([^=]+)=.+)'", text):
        return (
            f"{match[1]}: a list stands in brackets, as in '{match[2]}=[a,b]'; mnist-train -m takes one after the other"
        )
    if text.startswith("Config group override"):
        return f"a group takes the name of one of its options, such as architecture=conv10 ({text.splitlines()[0]})"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else text
    if match := re.match(r"Error merging override (\S+?)([.][0-9]+)?([.][^.=]+)?=(\{)?", text):
        what = f"{match[1]} has no item {match[2][1:]}" if match[2] else "it does not fit what is there"
        if match[4] and not match[2]:
            what = f"a list is there: put brackets around it, as in {match[1]}{match[3]}=[{{…}}]"
        return f"{text.removeprefix('Error merging override ')}: {what}"
    if match := re.match(r"Could not append to config. An item is already at '(.+)'", text):
        return f"+{match[1]} adds a key that is there already; set it with {match[1]}=…"
    if match := re.match(
        r"Could not (?:override|append to config|delete from config)[^'\n]*'([^'\n]+?)(?:@.*)?'", text
    ):
        return _unknown_key(match[1], config_name)
    if text.startswith("Exceeds the limit"):  # Python's, of the digits of a number
        return "a number on the command line has thousands of digits"
    if match := re.match(r"invalid literal for int\(\) with base 10: '(.+)'", text):  # of OmegaConf's
        return f"{match[1]}: a list's items have numbers, as in architecture.blocks.0.filters=32"
    if match := re.match(r"(?:Missing mandatory value|Structured config of type.*): (\S+)", text):
        return f"{match[1]} is missing; give {match[1]}=…"
    lines = (line.strip() for line in text.splitlines())
    return "; ".join(line for line in lines if line and "full_key" not in line and "object_type" not in line)


def _unknown_key(key: str, config_name: str) -> str:
    if key == "hparams_search":
        return f"unknown key {key}: {SEARCHES}"
    if word := re.fullmatch(r"architecture\.blocks\.\d+\.(\w+)", key):
        add = f"; it is not given there: add it by +{key}=…"
        return f"unknown key {key}{add if word[1] in Block.model_fields else nearest(word[1], Block.model_fields)}"
    group, _, flag = key.partition(".")
    option = flag.partition(".")[0]
    if flag and (CONF / group / f"{option}.yaml").is_file():
        return f"unknown key {key}; it comes with {group}={option}: give that as well"
    if group == "trainer" and flag in OWNED_TRAINER_KEYS:
        return f"{key} is set by the run itself; {OWNED_TRAINER_KEYS[flag]}"
    if key.startswith("hydra"):
        return f"unknown key {key}"
    within_command = GlobalHydra.instance().is_initialized()
    with nullcontext() if within_command else hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        known = OmegaConf.to_container(hydra.compose(config_name))
    keys = set(_keys(known))
    if key in keys:
        return f"{key}=… names one of a group's files; to add to the group, write +{key}=…"
    for meant in MEANT.get(key.rpartition(".")[2].lower().replace("-", "_"), []):
        if meant.partition("=")[0] in keys:
            return f"unknown key {key}; did you mean {meant}?"
    flags = sorted(each.removeprefix(f"{group}.") for each in keys if re.match(rf"{re.escape(group)}\.[^_]", each))
    if flag and flags and not nearest(flag, flags):
        return f"unknown key {key}; {group} has {', '.join(flags)}"
    return f"unknown key {key}{nearest(key, keys) or f'; mnist-{config_name} --help lists them'}"


def _keys(config: Any, prefix: str = "") -> Iterable[str]:
    """Every key of a composed configuration, groups included, as the command line writes it."""
    for key, value in config.items() if isinstance(config, dict) else ():
        yield f"{prefix}{key}"
        yield from _keys(value, f"{prefix}{key}.")

"""What is taken from the folder of a run, a sweep or a study, which may be a stranger's: plain values.

A `_target_` is Python that runs, so a folder's must be one of ours, of torch's optimizers and schedulers or of
Lightning's loggers, or be named again on the command line. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mnist_cnn.config.schema import UserError
from mnist_cnn.config.settings import CONF, Train
from mnist_cnn.runs.command_line import override_key

MAXIMUM_SIZE = 16 * 2**20  # bytes of such a file
LIBRARIES = r"torch\.optim\.(lr_scheduler\.)?[A-Z]\w*|pytorch_lightning\.loggers\.[A-Z]\w*"
AGAIN = "may run anything, so it is not taken from a folder: if you know it, give it again on the command line"
# Hydra's own overrides that can do no harm; others of it start programs.
PLAIN_HYDRA = re.compile(
    r"hydra(/launcher=(basic|parallel|slurm|submitit)|\.sweep\.subdir=(?!.*\.\.)([\w.+-]|\$\{hydra\.job\.\w+\})+"
    r"|\.sweeper\.max_batch_size=\d+|\.launcher\.(n_jobs|timeout_min|cpus_per_task|gpus_per_node|mem_gb)=-?[\d.]+"
    r"|\.launcher\.(partition|qos|account)=\w+)"
)
NAMING = r"modules|accelerator\.rendezvous|data\.name"  # keys by which other code, or another machine, is named


class _PlainLoader(yaml.SafeLoader):
    """Without aliases, by which a small file can hold itself, or a thing many times over."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases")
        return super().compose_node(parent, index)


def load_yaml(text: str) -> Any:
    return yaml.load(text, _PlainLoader)


def read_mapping(file: Path, load: Callable[[str], Any] = load_yaml) -> dict[str, Any]:
    """The mapping that a small file holds.

    Raises:
        OSError, ValueError: it is not there, or is damaged; in one line.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there")
    if file.stat().st_size > MAXIMUM_SIZE:
        raise ValueError(f"{file} is too large")
    try:
        content = load(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({' '.join(str(error).split()):.200})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it is no mapping")
    return content


def require_known(stored: Train, given: Train, folder: Path) -> None:
    """Raise UserError where `stored`, of a folder, names code that is neither known nor named again in `given`."""
    ours = given.model_dump()
    again = dict(_targets(ours)).values()
    names = [node["_target_"] for node in again]
    for key, node in _targets(stored.model_dump()):
        target = node["_target_"]
        if node in again:
            continue
        if target not in names and not (isinstance(target, str) and _is_known(target)):
            raise UserError(f"{folder} has {key}._target_={target!s:.200}, which {AGAIN}")
        if mappings := [name for name, value in node.items() if not _is_plain(value)]:
            raise UserError(f"{folder} has a mapping as {key}.{mappings[0]}, which {AGAIN}")
    if "." in stored.data.name and stored.data.name != given.data.name:
        raise UserError(f"{folder} has data._target_={stored.data.name}, which {AGAIN}")
    if strange := sorted(set(stored.modules) - set(given.modules)):
        raise UserError(f"{folder} has modules=[{','.join(strange)}], which {AGAIN}")
    if stored.accelerator.rendezvous not in (None, given.accelerator.rendezvous):  # torch trusts whoever answers there
        raise UserError(f"{folder} has accelerator.rendezvous={stored.accelerator.rendezvous}, which {AGAIN}")
    if "${" in str(stored):  # Hydra would fill in what the environment holds
        raise UserError(f"{folder} has a value with ${{…}}: its config.yaml was changed")


def require_plain(words: Iterable[str], folder: Path) -> None:
    """Raise UserError where an override that a folder holds is more than a plain value for a key."""
    for word in words:
        if not plain_override(word):
            raise UserError(f"{folder} has {word:.200}, which {AGAIN}")


def require_own_files(folder: Path) -> None:
    """Raise UserError where a folder that will be written to has a link to elsewhere, or a pipe to wait for."""
    for path in folder.rglob("*"):
        inside = not path.is_symlink() or path.resolve().is_relative_to(folder.resolve())
        if not inside or not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is a link out of {folder}, or no regular file: take it away")


def plain_override(word: str) -> bool:
    """Whether an override is taken from a folder, or has to be given again."""
    key = override_key(word)
    hydra = key.startswith("hydra") and not PLAIN_HYDRA.fullmatch(word.lstrip("+"))
    return not (hydra or "_target_" in word or re.search(r"\$\{.*:", word) or re.fullmatch(NAMING, key))


def _targets(value: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping with a `_target_`, by its key."""
    if isinstance(value, dict) and "_target_" in value:
        yield key.lstrip("."), value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in items:
        yield from _targets(each, f"{key}.{name}")


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, list) else not isinstance(value, dict)


def ours_or_plain(value: Any) -> bool:
    """Whether a value of a composed YAML has no `${resolver:…}`, by which the environment is read, or only ours."""
    return not re.search(r"\$\{.*:", str(value)) or str(value) in _ours(r"\w+: (\$\{\S*\})")


@cache
def _ours(pattern: str) -> set[str]:
    """What our own YAML files have, such as the names after `_target_`."""
    return {found for file in CONF.glob("*/*.yaml") for found in re.findall(pattern, file.read_text())}


def _is_known(target: str) -> bool:
    return target in _ours(r"_target_: ([\w.]+)") or re.fullmatch(LIBRARIES, target) is not None

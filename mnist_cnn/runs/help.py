"""`--help`: a command's groups, and each key with its value and the comment that its YAML has on it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import hydra
import yaml
from omegaconf import OmegaConf

from mnist_cnn.config.settings import CONF
from mnist_cnn.runs.hydra_app import flat, text

PACKAGE = re.compile(r"# @package (\S+)")
KEY = re.compile(r"(?P<indent> *)(?P<key>\w+):[^#]*(?:# (?P<comment>.*))?")
WIDTH = 46  # of a key with its value; the comments stand beside it


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
    text = file.read_text(encoding="utf-8")
    if named := PACKAGE.search(text):
        package = named[1].removeprefix("_global_")
    for default in (yaml.safe_load(text) or {}).get("defaults", []):
        if isinstance(default, str) and default != "_self_":
            yield from _comments(str(Path(name).with_name(default)), package, folders)
    path: list[str] = []
    for line in text.splitlines():
        if match := KEY.match(line):
            path[len(match["indent"]) // 2 :] = [match["key"]]
            if match["comment"]:
                yield ".".join([*([package] if package else []), *path]), match["comment"]

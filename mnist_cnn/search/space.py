"""A search space: from a YAML in the words of Optuna's distributions to overrides of mnist-train. Imports no torch."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mnist_cnn.config.schema import UserError, nearest, validated
from mnist_cnn.config.settings import Train
from mnist_cnn.config.study_settings import Choices, FloatRange, IntRange, SweepSettings
from mnist_cnn.runs.command_line import flat, literal, override_key, text
from mnist_cnn.runs.errors import in_one_line
from mnist_cnn.runs.hydra_app import folder_name, plain_job, user_config_dir
from mnist_cnn.runs.strangers import AGAIN, ours_or_plain

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial

NOT_SEARCHED = ("test", "resume", "plots", "checkpoint", "logger")
SWEEP_KEYS = set(SweepSettings.model_fields) - set(Train.model_fields)


def training_overrides(overrides: list[str]) -> list[str]:
    """Those of mnist-sweep's overrides that are mnist-train's."""
    return [word for word in overrides if override_key(word).split(".")[0] not in SWEEP_KEYS]


def trial_overrides(overrides: list[str]) -> list[str]:
    """The same for a trial, which draws no pictures unless told to, and never looks at the test set."""
    given = [word for word in training_overrides(overrides) if override_key(word) != "test"]
    quiet = [] if any(override_key(word) == "plots" for word in given) else ["plots=false"]
    return [*given, *quiet, "test=false"]


@contextmanager
def in_words() -> Iterator[None]:
    """Hydra's errors of a wrong override, which have no common class, as a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(in_one_line(error, "train")) from None


@in_words()
def composed(overrides: list[str], config_dir: str | None) -> DictConfig:
    """mnist-train's configuration with these overrides, Hydra's own part included.

    Args:
        overrides: of mnist-train.
        config_dir: that a study was begun with, for a command that was not given it again.

    Raises:
        UserError: a YAML there takes a value from elsewhere, such as the environment: it may be a stranger's.
    """
    if config_dir is None or user_config_dir(HydraConfig.get()):
        return hydra.compose("train", overrides, return_hydra_config=True)
    search = f"hydra.searchpath=[{literal('', f'file://{config_dir}')[1:]}]"
    config = hydra.compose("train", [*overrides, search], return_hydra_config=True)
    job = OmegaConf.to_container(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
    if strange := [key for key, value in flat(job) if not ours_or_plain(value)]:
        raise UserError(f"--config-dir {config_dir} has {strange[0]} with ${{…:…}}, which {AGAIN}")
    return config


@in_words()
def compose(overrides: list[str], folder: Path = Path(), config_dir: str | None = None) -> tuple[Train, dict[str, Any]]:
    """mnist-train's configuration with these overrides, validated, and the options of its groups.

    Raises:
        UserError: it is none that mnist-train would take.
    """
    config = composed(overrides, config_dir)
    return validated(Train, plain_job(config, folder)), dict(config.hydra.runtime.choices)


def override(key: str, value: Any) -> str:
    """`key=value`; part of a list's item may be one that the item does not name yet."""
    return f"{'++' if re.search(r'[.][0-9]+([.]|$)', key) else ''}{key}={text(value)}"


def _expanded(key: str, config: Any) -> Iterator[str]:
    """The key, or with a `*` in it that of each item of the list there."""
    head, star, tail = key.partition(".*")
    if not star:
        yield key
        return
    items = OmegaConf.select(OmegaConf.create(config), head)
    if not OmegaConf.is_list(items):
        raise UserError(f"{key}: {head} is no list")
    for number in range(len(items)):
        yield from _expanded(f"{head}.{number}{tail}", config)


class Space:
    """What a study searches.

    Args:
        settings: of the command.
        overrides: of the command.

    Attributes:
        distributions: Optuna's, by key.
        fixed: the overrides that all trials share.

    Raises:
        UserError: a key is unknown, a range is none, or mnist-train would refuse a value.
    """

    def __init__(self, settings: SweepSettings, overrides: list[str]) -> None:
        assert settings.sweep is not None
        config = settings.model_dump(include=set(Train.model_fields))
        self.distributions: dict[str, BaseDistribution] = {}
        for key, parameter in settings.sweep.items():
            self._check_key(key, settings.sweep)
            for name in _expanded(key, config):
                if name in map(override_key, overrides):
                    raise UserError(f"{name} is searched: leave it out of the command, or out of the space")
                self.distributions[name] = distribution(name, parameter)
        if not self.distributions:
            raise UserError(f"nothing to search: the network has no part that {', '.join(settings.sweep)} names")
        self.fixed = trial_overrides(overrides)
        if any(key.startswith("architecture.dense.") for key in self.distributions):
            # A dense layer may stand as a number of units: only as a mapping has it parts that can be set.
            self.fixed.append(override("architecture.dense", config["architecture"]["dense"]))
        self._check_values()

    @staticmethod
    def _check_key(key: str, keys: dict[str, Any]) -> None:
        first = key.split(".")[0]
        known = [*Train.model_fields, "experiment"]
        if first not in known:
            raise UserError(f"unknown key {key}{nearest(first, known)}")
        if first in NOT_SEARCHED:
            raise UserError(f"{key} is no part of a search: leave it out of the space")
        if first != key and first == "architecture" and first in keys:
            raise UserError(f"{key} and {first}: where {first} is searched, its parts cannot be")

    def overrides(self, parameters: dict[str, Any]) -> list[str]:
        """What mnist-train takes to run a trial with these."""
        return [*self.fixed, *(override(key, value) for key, value in parameters.items())]

    def _check_values(self) -> None:
        """Compose each choice, and all numbers at both their ends."""
        ends: list[dict[str, Any]] = [{}, {}]
        others: list[dict[str, Any]] = []
        for key, found in self.distributions.items():
            choices = getattr(found, "choices", None)
            for end, value in zip(ends, (choices[0],) * 2 if choices else (found.low, found.high), strict=True):  # type: ignore[attr-defined]
                end[key] = value
            others += [{key: choice} for choice in (choices or ())[1:]]
        for chosen in (*ends, *({**ends[0], **other} for other in others)):
            if not compose(self.overrides(chosen))[0].data.validation:
                raise UserError("data.validation=0: a search needs digits held out; give data.validation=0.1")

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """A trial's parameters, by Optuna's sampler; those that it has already stay."""
        for name, found in self.distributions.items():
            settings = dict(vars(found))
            if choices := settings.get("choices"):
                trial.suggest_categorical(name, choices)
            else:
                suggest = trial.suggest_int if isinstance(found.low, int) else trial.suggest_float  # type: ignore[attr-defined]
                suggest(name, **settings)
        return trial.params

    def size(self, sampler: dict[str, Any]) -> float:
        """How many different trials there are for a sampler that tries each once; infinite for the others."""
        kind = str(sampler.get("_target_")).rpartition(".")[2]
        if kind == "GridSampler":
            return math.prod(len(values) for values in sampler.get("search_space", {}).values())
        if kind != "BruteForceSampler":
            return math.inf
        sizes = []
        for name, found in self.distributions.items():
            span: Any = found
            if not hasattr(span, "choices") and span.step is None:
                raise UserError(
                    f"{name}: BruteForceSampler needs a step, as in {{type: float, low: 0, high: 1, step: 0.1}}"
                )
            sizes.append(
                len(span.choices) if hasattr(span, "choices") else round((span.high - span.low) / span.step) + 1
            )
        return math.prod(sizes)


def distribution(key: str, parameter: FloatRange | IntRange | Choices) -> BaseDistribution:
    """Optuna's own, with its own word for a range that is none."""
    from optuna import distributions

    settings = parameter.model_dump(exclude={"type"})
    if isinstance(parameter, Choices):
        plain = [
            each if isinstance(each, bool | int | float | str | None) else text(each) for each in parameter.choices
        ]
        return distributions.CategoricalDistribution(plain)
    kind = distributions.FloatDistribution if isinstance(parameter, FloatRange) else distributions.IntDistribution
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a range that its step does not divide would end lower
            return kind(**settings)
    except (ValueError, UserWarning) as error:
        raise UserError(f"{key}: {error}".replace("`", "")) from None


def of_the_machine(key: str) -> bool:
    """Whether it is about where a trial runs, and not about what it learns."""
    return key == "accelerator" or key.startswith(("accelerator.threads", "data.root", *NOT_SEARCHED))


def study_name(sweep: str, overrides: list[str]) -> str:
    """The sweep's own name, then the overrides that make another study of it."""
    changing = sorted(word for word in trial_overrides(overrides) if not of_the_machine(override_key(word)))
    return folder_name("_".join([sweep, *changing]))

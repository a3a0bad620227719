"""The configuration of mnist-sweep and of a search space, checked before anything is begun. Imports no torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from mnist_cnn.config.schema import NonEmpty, Strict, nearest
from mnist_cnn.config.settings import Instantiable, Train


class FloatRange(Strict):
    type: Literal["float"]
    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None


class IntRange(Strict):
    type: Literal["int"]
    low: int
    high: int
    log: bool = False
    step: int = 1


class Choices(Strict):
    type: Literal["categorical"]
    choices: list[Any] = Field(min_length=1)


PARAMETERS: dict[str, type[FloatRange | IntRange | Choices]] = {
    "float": FloatRange,
    "int": IntRange,
    "categorical": Choices,
}


def _parameter(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in PARAMETERS:
        raise ValueError(
            f"type={kind!r}: must be float, int or categorical{nearest(str(kind), PARAMETERS)}, "
            "as in {type: float, low: 0.001, high: 0.1, log: true}"
        )
    return PARAMETERS[kind].model_validate(value)


Parameter = Annotated[FloatRange | IntRange | Choices, BeforeValidator(_parameter)]


def _storage(value: str | None) -> str | None:
    """Refuse what is no address of a storage, without a word of it: it may have a password."""
    if value is not None and not re.match(r"(sqlite|postgresql|mysql)(\+\w+)?://", value):
        raise ValueError("storage: must be such as postgresql://user@host/database, mysql://… or sqlite:///file.db")
    if value is not None and value.partition("?")[0].count("@") > 1:  # else parts of the password become the host
        raise ValueError("storage: write @ in a password as %40")
    return value


def _no_interpolation(value: str | None) -> str | None:
    """Refuse what Hydra would fill in, as with a secret of the environment."""
    if value is not None and "${" in value:
        raise ValueError("config_dir: must be a folder, without ${…}")
    return value


class StudyFile(Strict):
    """What study.yaml in a study's folder holds."""

    study: NonEmpty
    metric: Literal["val/accuracy", "val/loss"]
    storage: Annotated[str | None, AfterValidator(_storage)]
    retries: int = Field(ge=0, le=1000)
    config_dir: Annotated[NonEmpty | None, AfterValidator(_no_interpolation)] = None


class SweepSettings(Train):
    """The configuration of mnist-sweep; conf/sweep.yaml describes each key."""

    sweep: dict[str, Parameter] | None
    trials: int = Field(ge=1, le=100_000)
    workers: int = Field(ge=1, le=256)
    metric: Literal["val/accuracy", "val/loss"]
    study: Annotated[NonEmpty, Field(max_length=180, pattern=r"^[\w.+-]+$")] | None
    folder: NonEmpty | None
    storage: Annotated[str | None, AfterValidator(_storage)]
    retries: int = Field(ge=0, le=1000)
    heartbeat: int = Field(ge=1, le=3600)
    sampler: Instantiable
    pruner: Instantiable
    report: NonEmpty | None
    retrain: NonEmpty | None

    @model_validator(mode="after")
    def _one_thing(self) -> SweepSettings:
        if self.test:
            raise ValueError(
                "test=True: a trial never scores the test set; mnist-sweep retrain=FOLDER does, at the end"
            )
        if self.accelerator.devices * self.accelerator.num_nodes > 1:
            raise ValueError(
                f"accelerator.devices={self.accelerator.devices}: a trial has one device; workers=N trains N at once"
            )
        if self.resume is not None:
            raise ValueError("resume continues one run: the same mnist-sweep command again continues a study")
        given = [key for key in ("sweep", "report", "retrain") if getattr(self, key) is not None]
        if not given:
            raise ValueError("sweep is missing: give sweep=learning_rate, recipe, width or your own, or report=FOLDER")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: give one of them")
        return self

"""The settings of the digits: which they are, how they are split and changed. Imports no torch."""

from __future__ import annotations

import math
import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from mnist_cnn.config.architecture import DOTTED
from mnist_cnn.config.schema import NonEmpty, Strict, nearest

EMNIST = ("emnist_digits", "emnist_letters", "emnist_balanced")
DATA_NAMES = ("mnist", "fashion_mnist", "kmnist", "qmnist", *EMNIST, "usps", "digits", "folder")


def _data_name(name: str) -> str:
    if name not in DATA_NAMES and not re.fullmatch(DOTTED, name):  # module.function
        raise ValueError(f"data.name={name}: expected one of {', '.join(DATA_NAMES)}{nearest(name, DATA_NAMES)}")
    return name


def own_name(data: Any) -> Any:
    """A `_target_` of the user's own stands in place of a name."""
    if not isinstance(data, dict) or "_target_" not in data:
        return data
    own = data["_target_"]
    return {key: value for key, value in data.items() if key != "_target_"} | ({"name": own} if own else {})


def _given(root: Any) -> Any:
    if root is None:
        raise ValueError("data.root is missing; give data.root=FOLDER")
    return os.path.expanduser(root) if isinstance(root, str) else root  # noqa: PTH111 — `~x` may be a folder


def _fraction(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < (1 if isinstance(value, float) else math.inf):
        raise ValueError(f"data.validation={value!r}: must be a fraction from 0 to below 1.0, or a count of digits")
    return value


DataName = Annotated[str, Field(max_length=200), AfterValidator(_data_name)]
Root = Annotated[NonEmpty, BeforeValidator(_given)]
Fraction = Annotated[int | float, BeforeValidator(_fraction)]  # or a count


class Augmentation(Strict):
    """How training digits are changed, at most; not at all where all are 0."""

    rotation: float = Field(default=0.0, ge=0, le=180)
    shift: float = Field(default=0.0, ge=0, le=14)
    scale: float = Field(default=0.0, ge=0, lt=1)
    shear: float = Field(default=0.0, ge=0, lt=90)
    elastic: float = Field(default=0.0, ge=0, le=14)
    thickness: float = Field(default=0.0, ge=0, le=1)
    hands: float = Field(default=0.0, ge=0, le=1)
    damage: float = Field(default=0.0, ge=0, le=1)

    def changes(self) -> bool:
        return any(self.model_dump().values())


class Data(Strict):
    """The digits of a run."""

    name: DataName
    root: Root
    batch_size: int = Field(ge=1, le=60_000)
    validation: Fraction
    validation_from: Literal["last", "random"]
    normalization: Literal["unit", "standard"]
    test: float | None = Field(default=None, gt=0, lt=1)  # of a folder without a test part
    # Taken over by the run's own, which may differ.
    epochs: int | None = Field(default=None, ge=1, exclude=True)
    augmentation: Augmentation | None = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _test_of_a_folder(self) -> Data:
        if self.test and self.name != "folder":
            raise ValueError(
                f"data.test={self.test}: {self.name} has a test part of its own; only data=folder takes one"
            )
        return self


class EvaluationData(Strict):
    """The digits of an evaluation: of a data set's YAML only where it lies; batches and splits belong to training."""

    name: Annotated[str, AfterValidator(lambda name: name if name == "as_trained" else _data_name(name))]
    root: Root
    test: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_training(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = own_name(data)
        return {key: data[key] for key in data if key in cls.model_fields or key not in Data.model_fields}

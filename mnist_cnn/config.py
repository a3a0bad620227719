"""The schema of the configuration, and the errors a user sees. Imports no torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

# In a checkout conf/ stands beside the package; in a wheel it is inside it.
CONF = next(p for p in (Path(__file__).parent / "conf", Path(__file__).parents[1] / "conf") if p.is_dir())

IMAGE_SIZE = 28
MAXIMUM_PARAMETERS = 100_000_000


class UserError(Exception):
    """Something that the user can mend: one line that says what was wrong, what was expected, what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean …?"` for the known word that looks most like `word`, or nothing where none does."""
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def explain(error: ValidationError, within: str = "") -> str:
    """The first of pydantic's findings as one line in the words of the command line."""
    finding = error.errors()[0]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in finding["loc"])
    key = (within + key).lstrip(".")
    if finding["type"] == "missing":
        return f"{key} is missing"
    message = finding["msg"].removeprefix("Value error, ")
    if not finding["msg"].startswith("Input should"):
        return message if key == "" or message.startswith(("architecture", key)) else f"{key}: {message}"
    return f"{key}={finding['input']!r}: must be {message.removeprefix('Input should be ')}"


class Strict(BaseModel):
    """No unknown keys, no silent conversions, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            for key in value:
                if key not in cls.model_fields:
                    known = nearest(str(key), cls.model_fields) or f"; known here: {', '.join(cls.model_fields)}"
                    raise ValueError(f"unknown key {key}{known}")
        return value


# --- a network is data -------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A row of the summary: output is (height, width, filters) or (units,), without the batch."""

    name: str
    output: tuple[int, ...]
    parameters: int


class Block(Strict):
    """conv → (batch norm) → relu → (max pool) → (dropout)."""

    filters: int = Field(ge=1, le=4096)
    kernel: int = Field(ge=1, le=IMAGE_SIZE)
    stride: int = Field(default=1, ge=1, le=IMAGE_SIZE)
    padding: int = Field(default=0, ge=0, le=IMAGE_SIZE // 2)
    batch_norm: bool = False
    pool: int | None = Field(default=None, ge=1, le=IMAGE_SIZE)
    dropout: float = Field(default=0.0, ge=0, lt=1)

    def layers(self, number: int, shape: tuple[int, ...]) -> list[Layer]:
        """This block's rows for an input of `shape` (height, width, channels)."""
        size, _, channels = shape
        convolved = (size + 2 * self.padding - self.kernel) // self.stride + 1
        if self.kernel > size + 2 * self.padding:
            raise ValueError(f"kernel {self.kernel} is larger than its input of {size}×{size}")
        output = (convolved, convolved, self.filters)
        weights = self.kernel**2 * channels * self.filters + self.filters
        rows = [Layer(f"convolution {number}", output, weights)]
        if self.batch_norm:
            rows.append(Layer(f"batch norm {number}", output, 2 * self.filters))
        if self.pool is not None:
            if self.pool > convolved:
                raise ValueError(f"pool {self.pool} is larger than its input of {convolved}×{convolved}")
            output = (convolved // self.pool, convolved // self.pool, self.filters)
            rows.append(Layer(f"max pool {number}", output, 0))
        if self.dropout:
            rows.append(Layer(f"dropout {number}", output, 0))
        return rows


class Dense(Strict):
    """linear → relu → (dropout)."""

    units: int = Field(ge=1, le=65536)
    dropout: float = Field(default=0.0, ge=0, lt=1)


def _units(value: Any) -> Any:
    if isinstance(value, dict | Dense):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return {"units": value}
    raise ValueError(f"{value!r} must be a number of units such as 128, or {{units:128,dropout:0.5}}")


class Architecture(Strict):
    """A network's plain specification: what a command line changes and a checkpoint carries."""

    blocks: list[Block] = Field(max_length=32)
    dense: list[Annotated[Dense, BeforeValidator(_units)]] = Field(max_length=32)
    initialization: Literal["keras", "torch"] = "keras"

    @field_validator("blocks", mode="before")
    @classmethod
    def _buildable(cls, blocks: Any) -> Any:
        """Refuse what cannot be built, with the block's number and the shape at that point."""
        if not isinstance(blocks, list):
            raise ValueError(f"architecture.blocks={blocks!r}: must be a list such as [{{filters:32,kernel:3,pool:2}}]")
        shape: tuple[int, ...] = (IMAGE_SIZE, IMAGE_SIZE, 1)
        built: list[Block] = []
        for number, raw in enumerate(blocks, start=1):
            try:
                block = raw if isinstance(raw, Block) else Block.model_validate(raw)
                shape = block.layers(number, shape)[-1].output
            except ValueError as error:
                reason = explain(error) if isinstance(error, ValidationError) else str(error)
                at = "×".join(map(str, shape))
                raise ValueError(f"architecture block {number}, whose input is {at}: {reason}") from None
            built.append(block)
        return built

    @model_validator(mode="after")
    def _affordable(self) -> Architecture:
        if (count := sum(layer.parameters for layer in self.layers())) > MAXIMUM_PARAMETERS:
            raise ValueError(f"architecture has {count:,} parameters; at most {MAXIMUM_PARAMETERS:,} are allowed")
        return self

    def layers(self, classes: int = 10) -> list[Layer]:
        """The summary's rows from the first convolution to the logits."""
        rows: list[Layer] = []
        shape: tuple[int, ...] = (IMAGE_SIZE, IMAGE_SIZE, 1)
        for number, block in enumerate(self.blocks, start=1):
            rows += block.layers(number, shape)
            shape = rows[-1].output
        rows.append(Layer("flatten", (math.prod(shape),), 0))
        for number, dense in enumerate([*self.dense, Dense(units=classes)], start=1):
            features = rows[-1].output[0]
            rows.append(Layer(f"dense {number}", (dense.units,), (features + 1) * dense.units))
            if dense.dropout:
                rows.append(Layer(f"dropout, dense {number}", (dense.units,), 0))
        return rows


# --- the groups --------------------------------------------------------------------------------------------


def _finite(value: Any, key: str = "") -> Any:
    """Refuse NaN and infinite numbers at any depth; they would train to nothing."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key}={value}: must be a finite number")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        _finite(item, f"{key}.{name}".lstrip("."))
    return value


def _optimizer(value: dict[str, Any]) -> dict[str, Any]:
    rate = value.get("lr")
    if not isinstance(rate, int | float) or isinstance(rate, bool) or rate <= 0:
        raise ValueError(f"optimizer.lr={rate!r}: must be a number greater than 0")
    return value


Instantiable = Annotated[dict[str, Any], AfterValidator(lambda value: _finite(value))]


class Schedule(Strict):
    """A torch scheduler; `length` names its argument that takes the number of intervals in the run."""

    interval: Literal["step", "epoch"]
    length: str | None = None
    scheduler: Instantiable


def _share(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < (1 if isinstance(value, float) else math.inf):
        raise ValueError(f"data.validation={value!r}: must be a fraction from 0 to below 1.0, or a count of digits")
    return value


Share = Annotated[int | float, BeforeValidator(_share)]


class Data(Strict):
    name: Literal["mnist", "fashion_mnist", "kmnist", "digits"]
    root: str = Field(min_length=1)
    batch_size: int = Field(ge=1, le=60_000)
    validation: Share
    validation_from: Literal["last", "random"]
    normalization: Literal["unit", "standard"]


class Accelerator(Strict):
    name: Literal["cpu", "cuda", "auto"]
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    threads: int | None = Field(default=None, ge=1)


class Train(Strict):
    """The configuration of mnist-train; conf/train.yaml describes each key."""

    architecture: Architecture
    optimizer: Annotated[Instantiable, AfterValidator(_optimizer)]
    schedule: Schedule
    accelerator: Accelerator
    data: Data
    logger: Instantiable | None
    seed: int = Field(ge=0, lt=2**32)
    epochs: int = Field(ge=1, le=100_000)
    selection: Literal["best", "last"]
    resume: str | None
    initialize: str | None
    freeze: Literal["blocks"] | None
    plots: bool


class Evaluate(Strict):
    """The configuration of mnist-evaluate; conf/evaluate.yaml describes each key."""

    class Source(Strict):
        name: Literal["as_trained", "mnist", "fashion_mnist", "kmnist", "digits"]
        root: str = Field(min_length=1)

    checkpoint: str
    split: Literal["test", "validation"]
    data: Source
    accelerator: Accelerator
    probabilities: list[Annotated[int, Field(ge=0)]]
    plots: bool

    @field_validator("data", mode="before")
    @classmethod
    def _source(cls, data: Any) -> Any:
        """Of a data set's YAML only where it lies matters here: batches and splits belong to training."""
        if not isinstance(data, dict):
            return data
        return {key: data[key] for key in data if key in ("name", "root") or key not in Data.model_fields}


class Predict(Strict):
    """The configuration of mnist-predict; conf/predict.yaml describes each key."""

    checkpoint: str
    images: list[str]
    accelerator: Accelerator

    @field_validator("images", mode="before")
    @classmethod
    def _one_or_many(cls, images: Any) -> Any:
        return [images] if isinstance(images, str) else images


Schema = TypeVar("Schema", bound=Strict)


def validated(schema: type[Schema], config: Mapping[str, Any]) -> Schema:
    """`config` as `schema`, or a UserError that names the key, the value and what was expected."""
    try:
        return schema.model_validate(dict(config))
    except ValidationError as error:
        raise UserError(explain(error)) from None

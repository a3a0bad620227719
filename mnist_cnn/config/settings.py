"""The configuration of each command, checked before anything is begun. Imports no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from mnist_cnn.config.architecture import Architecture
from mnist_cnn.config.schema import Strict

# In a checkout conf/ stands beside the package; in a wheel it is inside it.
PACKAGE = Path(__file__).parents[1]
CONF = next(p for p in (PACKAGE / "conf", PACKAGE.parent / "conf") if p.is_dir())


NonEmpty = Annotated[str, Field(min_length=1)]


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
    root: NonEmpty
    batch_size: int = Field(ge=1, le=60_000)
    validation: Share
    validation_from: Literal["last", "random"]
    normalization: Literal["unit", "standard"]


class Augmentation(Strict):
    """What training digits are warped by, at most; nothing where all are 0."""

    rotation: float = Field(default=0.0, ge=0, le=180)
    shift: float = Field(default=0.0, ge=0, le=14)
    scale: float = Field(default=0.0, ge=0, lt=1)
    shear: float = Field(default=0.0, ge=0, lt=90)

    def warps(self) -> bool:
        return any(self.model_dump().values())


class Accelerator(Strict):
    name: Literal["cpu", "cuda", "auto"]
    precision: Literal["32-true"] = "32-true"  # of a trained network
    threads: int | None = Field(default=None, ge=1, le=1024)
    devices: Literal[1] = 1
    num_nodes: Literal[1] = 1


class TrainingAccelerator(Accelerator):
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"  # type: ignore[assignment]
    devices: int = Field(default=1, ge=1, le=1024)  # type: ignore[assignment]
    num_nodes: int = Field(default=1, ge=1, le=1024)  # type: ignore[assignment]


Views = Literal[1, 5, 9]  # of a digit that is scored


class Checkpointing(Strict):
    every_seconds: int | float = Field(gt=0)


class Multirun(Strict):
    resume: str | None = None

    @field_validator("resume")
    @classmethod
    def _of_the_command_line(cls, folder: str | None) -> None:
        """The command line is rewritten before the configuration is made; what is left of it came another way."""
        if folder is not None:
            raise ValueError(f"multirun.resume={folder}: continues a sweep on mnist-train's command line only")


class Train(Strict):
    """The configuration of mnist-train; conf/train.yaml describes each key."""

    architecture: Architecture
    optimizer: Annotated[Instantiable, AfterValidator(_optimizer)]
    schedule: Schedule
    accelerator: TrainingAccelerator
    data: Data
    logger: Instantiable | None
    seed: int = Field(ge=0, lt=2**32)
    epochs: int = Field(ge=1, le=100_000)
    selection: Literal["best", "last"]
    checkpoint: Checkpointing
    resume: NonEmpty | None
    initialize: NonEmpty | None
    freeze: Literal["blocks"] | None
    # Runs from before them have no such keys.
    augmentation: Augmentation = Augmentation()
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    averaging: float = Field(default=0.0, ge=0, lt=1)
    views: Views = 1
    test: bool = True
    plots: bool
    fail_fast: bool = False
    multirun: Multirun = Multirun()

    @model_validator(mode="after")
    def _shared_evenly(self) -> Train:
        if not self.resume and (uneven := self.uneven()):  # a resumed run has a batch size of its own
            raise ValueError(uneven)
        return self

    def uneven(self) -> str:
        """What is wrong where the ranks cannot share a batch evenly."""
        size, ranks = self.data.batch_size, self.accelerator.devices * self.accelerator.num_nodes
        nearest = max(round(size / ranks), 1) * ranks
        if size % ranks == 0:
            return ""
        return f"data.batch_size={size} cannot be shared evenly by {ranks} ranks; the nearest that can is {nearest}"


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


OneOrMany = Annotated[list[NonEmpty], BeforeValidator(_one_or_many), Field(min_length=1)]


def _ending(key: str, *endings: str) -> AfterValidator:
    def check(path: str | None) -> str | None:
        if path is not None and Path(path).suffix not in endings:
            raise ValueError(f"{key}={path}: must end in {' or '.join(endings)}")
        return path

    return AfterValidator(check)


class Evaluate(Strict):
    """The configuration of mnist-evaluate; conf/evaluate.yaml describes each key."""

    class Source(Strict):
        name: Literal["as_trained", "mnist", "fashion_mnist", "kmnist", "digits"]
        root: NonEmpty

    checkpoint: OneOrMany
    split: Literal["test", "validation"]
    calibrate: bool
    data: Source
    accelerator: Accelerator
    probabilities: list[Annotated[int, Field(ge=0)]]
    views: Views
    plots: bool

    @model_validator(mode="after")
    def _calibrated_on_validation(self) -> Evaluate:
        if self.calibrate and self.split != "validation":
            raise ValueError("calibrate=true fits on the digits held out: give split=validation")
        if self.calibrate and (
            len(self.checkpoint) > 1 or Path(self.checkpoint[0]).suffix in (".onnx", ".safetensors")
        ):
            raise ValueError("calibrate=true writes into one checkpoint: give one .ckpt file or a run's folder")
        return self

    @field_validator("data", mode="before")
    @classmethod
    def _source(cls, data: Any) -> Any:
        """Of a data set's YAML only where it lies matters here: batches and splits belong to training."""
        if not isinstance(data, dict):
            return data
        return {key: data[key] for key in data if key in ("name", "root") or key not in Data.model_fields}


class Predict(Strict):
    """The configuration of mnist-predict; conf/predict.yaml describes each key."""

    checkpoint: OneOrMany
    images: OneOrMany
    input: Literal["paths", "bytes"]
    mode: Literal["any", "exact"]
    output: Annotated[str | None, _ending("output", ".csv", ".json", ".jsonl", ".parquet")]
    views: Views
    top_k: int = Field(ge=0, le=10)
    grid: Annotated[str | None, _ending("grid", ".png")]
    skip_errors: bool
    accelerator: Accelerator

    @model_validator(mode="after")
    def _bytes_of_one(self) -> Predict:
        if self.input == "bytes" and self.images != ["-"]:
            raise ValueError("input=bytes reads one picture from standard input: give images=-")
        return self


class Export(Strict):
    """The configuration of mnist-export; conf/export.yaml describes each key."""

    checkpoint: NonEmpty
    format: Literal["onnx", "torch_export", "safetensors"]
    output: NonEmpty

    @model_validator(mode="after")
    def _named_after_its_format(self) -> Export:
        ending = {"onnx": ".onnx", "torch_export": ".pt2", "safetensors": ".safetensors"}[self.format]
        if Path(self.output).suffix != ending:
            raise ValueError(f"output={self.output}: must end in {ending} for format={self.format}")
        return self


class Import(Strict):
    """The configuration of mnist-import; conf/import.yaml describes each key."""

    keras: Annotated[str, _ending("keras", ".h5", ".hdf5", ".keras")]
    output: Annotated[str, _ending("output", ".ckpt")]
    divide_by_255: bool

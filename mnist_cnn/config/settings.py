"""The configuration of each command, checked before anything is begun. Imports no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from mnist_cnn.config.architecture import Architecture
from mnist_cnn.config.data_settings import Augmentation, Data, EvaluationData, own_name
from mnist_cnn.config.schema import NonEmpty, Strict

# In a checkout conf/ stands beside the package; in a wheel it is inside it.
PACKAGE = Path(__file__).parents[1]
CONF = next(p for p in (PACKAGE / "conf", PACKAGE.parent / "conf") if p.is_dir())


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


class Accelerator(Strict):
    name: Literal["cpu", "cuda", "mps", "auto"]
    precision: Literal["32-true"] = "32-true"  # of a trained network
    threads: int | None = Field(default=None, ge=1, le=1024)
    devices: Literal[1] = 1
    num_nodes: Literal[1] = 1
    rendezvous: str | None = None


class TrainingAccelerator(Accelerator):
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"  # type: ignore[assignment]
    devices: int = Field(default=1, ge=1, le=1024)  # type: ignore[assignment]
    num_nodes: int = Field(default=1, ge=1, le=1024)  # type: ignore[assignment]
    rendezvous: Annotated[str, Field(pattern=r"^.+:\d{1,5}$")] | None = None

    @model_validator(mode="after")
    def _meeting_point(self) -> TrainingAccelerator:
        if self.num_nodes > 1 and self.rendezvous is None:
            raise ValueError(
                f"accelerator.num_nodes={self.num_nodes}: give accelerator.rendezvous=HOST:PORT as well, an address of "
                "one of the machines, and start the same command on each"
            )
        return self


Tta = Literal[1, 5, 9]  # test-time augmentation: how many shifts of a digit are averaged


class Checkpointing(Strict):
    every_seconds: int | float = Field(gt=0)

    @model_validator(mode="before")
    @classmethod
    def _of_how_to_write(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"checkpoint={value}: start from it by initialize=, or continue its run by resume=")
        return value


class Multirun(Strict):
    resume: str | None = None

    @field_validator("resume")
    @classmethod
    def _of_the_command_line(cls, folder: str | None) -> None:
        """The command line is rewritten before the configuration is made; what is left of it came another way."""
        if folder is not None:
            raise ValueError(f"multirun.resume={folder}: continues a sweep on mnist-train's command line only")


# Flags of pl.Trainer that a run sets itself, and what to do instead.
OWNED_TRAINER_KEYS = {
    "max_epochs": "use epochs",
    "accelerator": "use accelerator=cpu, cuda or auto",
    "devices": "use accelerator.devices",
    "num_nodes": "use accelerator.num_nodes",
    "precision": "use accelerator.precision",
    "strategy": "use accelerator.devices (more than one trains data parallel)",
    "logger": "use logger",
    "callbacks": "use callbacks",
    "default_root_dir": "use hydra.run.dir",
    "enable_checkpointing": "use checkpoint.every_seconds",
    "enable_progress_bar": "a bar is drawn on a terminal only",
    "enable_model_summary": "a run prints its own summary",
    "use_distributed_sampler": "use accelerator.devices",
    "reload_dataloaders_every_n_epochs": "the digits stay in memory",
    "plugins": "a run has its own",
    "barebones": "use trainer.fast_dev_run",
    "enable_autolog_hparams": "use logger",
    "model_registry": "a run's folder has its checkpoints",
}


def _trainer(flags: dict[str, Any]) -> dict[str, Any]:
    for key in flags.keys() & OWNED_TRAINER_KEYS:
        raise ValueError(f"trainer.{key} is set by the run itself; {OWNED_TRAINER_KEYS[key]}")
    return flags


EXPERIMENT = "experiment: the first line of its file must be: # @package _global_"


class Train(Strict):
    """The configuration of mnist-train; conf/train.yaml describes each key."""

    architecture: Architecture
    optimizer: Annotated[Instantiable, AfterValidator(_optimizer)]
    schedule: Schedule
    accelerator: TrainingAccelerator
    data: Annotated[Data, BeforeValidator(own_name)]
    logger: dict[str, Instantiable] | None = None  # by their names
    # Flags of pl.Trainer; conf/trainer/default.yaml has them.
    trainer: Annotated[Instantiable, AfterValidator(_trainer)] = Field(default_factory=dict)
    callbacks: dict[str, Instantiable] = Field(default_factory=dict)
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
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    tta: Tta = 1
    test: bool = True
    plots: bool
    fail_fast: bool = False
    multirun: Multirun = Multirun()
    modules: list[NonEmpty] = Field(default_factory=list)

    @model_validator(mode="after")
    def _a_digit_for_each_device(self) -> Train:
        devices = self.accelerator.devices * self.accelerator.num_nodes
        if self.data.batch_size < devices:
            raise ValueError(
                f"data.batch_size={self.data.batch_size}: the devices share a batch, so it must be {devices} at least, "
                "as many as there are"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _experiment_is_global(cls, config: Any) -> Any:
        if isinstance(config, dict) and isinstance(config.get("experiment"), dict):
            raise ValueError(EXPERIMENT)
        return config


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

    checkpoint: OneOrMany
    split: Literal["test", "validation"]
    calibrate: bool
    corruptions: Literal["mnist_c"] | None
    data: EvaluationData
    accelerator: Accelerator
    probabilities: list[Annotated[int, Field(ge=0)]]
    tta: Tta
    plots: bool
    modules: list[NonEmpty]

    @model_validator(mode="after")
    def _calibrated_on_validation(self) -> Evaluate:
        if self.calibrate and self.split != "validation":
            raise ValueError("calibrate=true fits on the digits held out: give split=validation")
        if self.calibrate and (
            len(self.checkpoint) > 1 or Path(self.checkpoint[0]).suffix in (".onnx", ".safetensors")
        ):
            raise ValueError("calibrate=true writes into one checkpoint: give one .ckpt file or a run's folder")
        return self


class Predict(Strict):
    """The configuration of mnist-predict; conf/predict.yaml describes each key."""

    checkpoint: OneOrMany
    images: OneOrMany
    input: Literal["paths", "bytes"]
    mode: Literal["any", "exact"]
    digits: Literal["one", "several"]
    output: Annotated[str | None, _ending("output", ".csv", ".json", ".jsonl", ".parquet")]
    tta: Tta
    top_k: int = Field(ge=0, le=10)
    grid: Annotated[str | None, _ending("grid", ".png")]
    skip_errors: bool
    modules: list[NonEmpty]
    accelerator: Accelerator

    @model_validator(mode="after")
    def _keys_that_agree(self) -> Predict:
        if self.input == "bytes" and self.images != ["-"]:
            raise ValueError("input=bytes reads one picture from standard input: give images=-")
        if self.mode == "exact" and self.digits == "several":
            raise ValueError("digits=several finds digits in pictures of any size: leave mode=any")
        return self


# By a file's ending.
EXPORTS = {".onnx": "onnx", ".pt2": "torch_export", ".safetensors": "safetensors", ".html": "html"}


class Export(Strict):
    """The configuration of mnist-export; conf/export.yaml describes each key."""

    checkpoint: NonEmpty
    format: Literal["onnx", "torch_export", "safetensors", "html"]
    output: Annotated[str, _ending("output", *EXPORTS)]
    modules: list[NonEmpty]

    @model_validator(mode="before")
    @classmethod
    def _by_its_ending(cls, config: Any) -> Any:
        if isinstance(config, dict) and config.get("format") is None:
            config = {**config, "format": EXPORTS.get(Path(str(config.get("output"))).suffix, "onnx")}
        return config

    @model_validator(mode="after")
    def _named_after_its_format(self) -> Export:
        ending = next(ending for ending, name in EXPORTS.items() if name == self.format)
        if Path(self.output).suffix != ending:
            raise ValueError(f"output={self.output}: must end in {ending} for format={self.format}")
        return self


class Draw(Strict):
    """The configuration of mnist-draw; conf/draw.yaml describes each key."""

    checkpoint: NonEmpty


class Import(Strict):
    """The configuration of mnist-import; conf/import.yaml describes each key."""

    keras: Annotated[str | None, _ending("keras", ".h5", ".hdf5", ".keras")]
    torch: Annotated[str | None, _ending("torch", ".pt", ".pth")]
    architecture: Architecture | None = None
    output: Annotated[str, _ending("output", ".ckpt")]
    divide_by_255: bool | None
    mean: float | None
    std: Annotated[float, Field(gt=0)] | None

    @model_validator(mode="after")
    def _of_one_kind(self) -> Import:
        if (self.keras is None) == (self.torch is None):
            raise ValueError("give keras=FILE or torch=FILE, one of the two")
        if self.torch and self.architecture is None:
            raise ValueError(f"torch={self.torch} holds weights only: give architecture=pytorch_example, or your own")
        other = ("divide_by_255",) if self.torch else ("architecture", "mean", "std")
        if given := [key for key in other if getattr(self, key) is not None]:
            raise ValueError(f"{given[0]} goes with {'keras' if self.torch else 'torch'}= alone")
        return self

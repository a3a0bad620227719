"""mnist-train: train a convnet, test it once, leave a run's folder.

torch and Lightning take seconds to import: that is done only once the configuration is known to be right.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mnist_cnn.command import in_one_line, plain, run_command
from mnist_cnn.config import CONF, Train, UserError, validated
from mnist_cnn.runs import claim, describe_run, guarded, plain_job, resumed, versions, write_csv, write_whole

if TYPE_CHECKING:
    from mnist_cnn.architectures import ConvNet
    from mnist_cnn.checkpoint import Classifier
    from mnist_cnn.classifier import DigitClassifier, Row
    from mnist_cnn.datamodule import MNISTDataModule
    from mnist_cnn.metrics import Scores

log = logging.getLogger(__name__)

Metrics = dict[str, float | int | None]
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Stopped(BaseException):
    """SIGINT or SIGTERM came while the network trained."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def job(config: DictConfig) -> Metrics | None:
    details = HydraConfig.get()
    folder = Path(details.runtime.output_dir)

    def work() -> Metrics:
        return fit(validated(Train, plain(config)), folder, details.overrides.task, details.runtime.choices)

    return guarded(work, folder)


def main() -> None:
    run_command(job, "train")


def train(config: Sequence[str] | Mapping[str, Any] = ()) -> Metrics:
    """Train as `mnist-train` does, and return the metrics that it writes to metrics.json.

    Args:
        config: overrides as on the command line, such as `["data=digits", "epochs=3"]`, or a whole configuration.

    Raises:
        UserError: a setting, a file or a device is wrong; the message is one line.
    """
    overrides = [] if isinstance(config, Mapping) else [str(override) for override in config]
    previous = HydraConfig.instance().cfg
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra.compose("train", overrides, return_hydra_config=True)
        if isinstance(config, Mapping):
            whole = OmegaConf.merge({"hydra": composed.hydra}, dict(config))
            assert isinstance(whole, DictConfig)
            composed = whole
        settings = validated(Train, plain_job(composed))
        folder = Path(settings.resume) if settings.resume else claim(Path(composed.hydra.run.dir)).absolute()
        settings = validated(Train, plain_job(composed, folder))  # loggers write into the folder
        return fit(settings, folder, overrides, composed.hydra.runtime.choices)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(in_one_line(error, "train")) from None
    finally:
        HydraConfig.instance().cfg = previous


def fit(config: Train, folder: Path, overrides: Sequence[str] = (), choices: Mapping[str, Any] = NOTHING) -> Metrics:
    """A whole run in `folder`: data, network, epochs, one test, figures and pictures."""
    if config.resume:
        config, finished = resumed(config, folder, overrides)
        if finished:
            log.info("%s has finished already: nothing was changed", folder)
            return finished
    elif (folder / "config.yaml").exists():
        raise UserError(f"{folder} is another run's folder: choose another, or continue that run by resume={folder}")

    import pytorch_lightning as pl
    import torch
    from pytorch_lightning.callbacks import ModelCheckpoint

    from mnist_cnn.architectures import summary
    from mnist_cnn.checkpoint import find_device, load_classifier
    from mnist_cnn.datamodule import MNISTDataModule
    from mnist_cnn.metrics import score
    from mnist_cnn.progress import bars, quiet

    quiet()
    device = find_device(config.accelerator.name)
    if config.accelerator.threads:
        torch.set_num_threads(config.accelerator.threads)
    torch.manual_seed(config.seed)

    data = MNISTDataModule(**config.data.model_dump(), seed=config.seed)
    data.setup()
    network, config = first_network(config, data, overrides)
    log.info("%s", data.shapes())
    log.info("%s", summary(network.specification, len(data.classes)))
    classifier = classifier_for(config, network, data, folder)

    last = folder / "checkpoints" / "last.ckpt"
    by_validation = config.selection == "best" and len(data.validation.labels) > 0
    checkpoints = ModelCheckpoint(
        folder / "checkpoints",
        filename="best",
        monitor="val/accuracy" if by_validation else None,
        mode="max",
        save_last=True,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    trainer = pl.Trainer(
        accelerator=device.type,
        devices=1,
        precision=config.accelerator.precision,
        max_epochs=config.epochs,
        logger=made(config.logger, "logger") if config.logger else False,
        callbacks=[checkpoints, *bars(config.epochs)],
        limit_val_batches=None if len(data.validation.labels) else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    describe_run(folder, config, overrides, choices)
    earlier = sum(row["seconds"] for row in history_of(last)) if config.resume else 0.0
    start = time.perf_counter()
    with stoppable(folder):
        trainer.fit(
            classifier,
            datamodule=data,
            ckpt_path=last if config.resume and last.exists() else None,
            weights_only=True,
        )
    seconds = earlier + time.perf_counter() - start

    best = load_classifier(folder / "checkpoints" / "best.ckpt", device.type)
    logits = best.logits(data.test.images)
    scores = score(logits, data.test.labels)
    tested = best.description.history[-1]
    metrics: Metrics = {
        "parameters": best.network.parameter_count(),
        "epochs": len(classifier.history),
        "tested_epoch": int(tested["epoch"]),
        "fit_seconds": seconds,
        **{
            f"{part}/{name}": tested.get(f"{part}/{name}") for part in ("train", "val") for name in ("loss", "accuracy")
        },
        "test/loss": scores.loss,
        "test/accuracy": scores.accuracy,
    }
    for logger in trainer.loggers:
        logger.log_metrics({"test/loss": scores.loss, "test/accuracy": scores.accuracy}, trainer.global_step)
        logger.finalize("success")
    if config.plots:
        draw(folder / "plots", best, data, classifier.history, logits.argmax(1), scores, config.seed)
    write_whole(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    log.info("%s", scores.headline("test"))
    log.info("%s", folder)
    return metrics


def first_network(config: Train, data: MNISTDataModule, overrides: Sequence[str]) -> tuple[ConvNet, Train]:
    """The network before its first step, and the configuration with the architecture that it really has."""
    from mnist_cnn.architectures import ConvNet
    from mnist_cnn.checkpoint import rebuild

    if not config.initialize:
        network = ConvNet(config.architecture, len(data.classes), data.mean, data.standard_deviation)
    else:
        # The weights were trained on digits normalised by their own figures, so those stay.
        network, description = rebuild(config.initialize)
        asked = [word for word in overrides if word.lstrip("+").startswith(("architecture", "experiment"))]
        if asked and description.architecture != config.architecture:
            raise UserError(
                f"{' '.join(asked)} is not the architecture of initialize={config.initialize}; "
                "leave it out: the checkpoint brings its own"
            )
        config = config.model_copy(update={"architecture": description.architecture})
        if description.classes != data.classes:
            network.new_logits(len(data.classes))
    if config.freeze == "blocks":
        network.blocks.requires_grad_(False)
    return network, config


def classifier_for(config: Train, network: ConvNet, data: MNISTDataModule, folder: Path) -> DigitClassifier:
    """The LightningModule of a run, its optimizer and schedule tried before training starts."""
    from mnist_cnn.checkpoint import FORMAT
    from mnist_cnn.classifier import DigitClassifier
    from mnist_cnn.progress import epoch_line

    make_optimizer = made(config.optimizer, "optimizer")
    make_scheduler = made(config.schedule.scheduler, "schedule.scheduler")
    trial = tried(make_optimizer, "optimizer", [p for p in network.parameters() if p.requires_grad])
    length = config.schedule.length
    tried(make_scheduler, "schedule.scheduler", trial, **({length: 10} if length else {}))
    where = config.data.model_dump(include={"name", "validation", "validation_from", "normalization"})

    def report(history: list[Row]) -> None:
        write_csv(folder / "metrics.csv", history)
        log.info("%s", epoch_line(history[-1], config.epochs))

    return DigitClassifier(
        network,
        make_optimizer,
        make_scheduler,
        config.schedule.interval,
        config.schedule.length,
        config.seed,
        {
            "format": FORMAT,
            "architecture": config.architecture.model_dump(),
            "classes": data.classes,
            "data": {**where, "seed": config.seed},
            "versions": versions(),
        },
        report,
    )


def made(node: Mapping[str, Any], key: str) -> Any:
    """What a `_target_` of the user's own configuration names, with its errors in the user's words."""
    from hydra.errors import InstantiationException

    try:
        thing = hydra.utils.instantiate(dict(node), _convert_="all")  # a checkpoint holds plain values
        if key == "logger":
            _ = thing.experiment  # a logger connects here
        return thing
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, ModuleNotFoundError) and key == "logger":
            extra = str(node["_target_"]).rpartition(".")[2].removesuffix("Logger").lower()
            raise UserError(
                f"logger={extra} needs a package that is not installed: pip install 'mnist-cnn[{extra}]'"
            ) from None
        raise UserError(f"{key}: {node.get('_target_')} cannot be made: {cause}") from None
    except Exception as error:  # each logger has its own
        raise UserError(f"{key}: {node.get('_target_')} does not start: {error}") from None


def tried(make: Callable[..., Any], key: str, *arguments: Any, **length: int) -> Any:
    """Make an optimizer or scheduler once, so that a wrong setting is found before training."""
    import inspect

    from mnist_cnn.config import nearest

    function = getattr(make, "func", make)
    known = inspect.signature(function).parameters
    settings = {**getattr(make, "keywords", {}), **length}
    for name in settings:
        if name not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            raise UserError(f"unknown key {key}.{name} for {function.__name__}{nearest(name, known)}")
    try:
        return make(*arguments, **length)
    except Exception as error:  # each of torch's optimizers has its own
        shown = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        raise UserError(f"{key}: {function.__name__} refuses {shown}: {error}") from None


def history_of(checkpoint: Path) -> list[Row]:
    from mnist_cnn.checkpoint import read_checkpoint

    return read_checkpoint(checkpoint)[1].history if checkpoint.is_file() else []


@contextmanager
def stoppable(folder: Path) -> Iterator[None]:
    """SIGINT and SIGTERM end the run with the line that continues it, and status 130 or 143."""

    def stop(signum: int, _: Any) -> None:
        raise Stopped(signum)

    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    except Stopped as stopped:
        name = signal.Signals(stopped.signum).name
        log.error("stopped by %s; continue with: mnist-train resume=%s", name, folder)
        raise SystemExit(128 + stopped.signum) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def draw(
    folder: Path,
    best: Classifier,
    data: MNISTDataModule,
    history: list[Row],
    predicted: Any,
    scores: Scores,
    seed: int,
) -> None:
    """A run's pictures."""
    from mnist_cnn import plots

    plots.training_digits(data.train.images, data.train.labels, data.classes, seed, folder / "training_digits.png")
    plots.learning_curves(history, folder / "learning_curves.png")
    plots.first_kernels(best.network, folder / "first_kernels.png")
    label = data.classes[int(data.test.labels[0])]
    plots.feature_maps(best.network, data.test.images[0], label, folder)
    plots.results(folder, data.test.images, data.test.labels, predicted, scores, data.classes)


class _Callable(ModuleType):
    """`mnist_cnn.train` is this module and the function alike, whichever was imported first."""

    def __call__(self, config: Sequence[str] | Mapping[str, Any] = ()) -> Metrics:
        return train(config)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    main()

"""A run, from its configuration to its figures: what mnist-train does once its settings are known to be right."""

from __future__ import annotations

import ctypes
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from mnist_cnn.architectures import ConvNet, summary
from mnist_cnn.checkpoint import FORMAT, check_precision, find_device, rebuild
from mnist_cnn.classifier import DigitClassifier, Row
from mnist_cnn.config import Train
from mnist_cnn.datamodule import MNISTDataModule
from mnist_cnn.inference import Classifier, load_classifier
from mnist_cnn.metrics import Scores, score
from mnist_cnn.progress import bars, epoch_line, quiet
from mnist_cnn.resume import (
    PREVIOUS,
    Checkpoints,
    Stopped,
    WholeCheckpoints,
    failing_clearly,
    last_whole,
    stoppable,
)
from mnist_cnn.runs import alone_in, describe_run, refuse_occupied, resumed, versions, write_csv, write_whole
from mnist_cnn.schema import UserError
from mnist_cnn.targets import made, tried

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc

Metrics = dict[str, float | int | None]
NOTHING: Mapping[str, Any] = MappingProxyType({})
Watch = Callable[[list[Row]], None]


def fit(
    config: Train,
    folder: Path,
    overrides: Sequence[str] = (),
    choices: Mapping[str, Any] = NOTHING,
    watch: Watch | None = None,
) -> Metrics:
    """A whole run in `folder`: data, network, epochs, one test, figures and pictures.

    A sweep gives `watch`: it takes the place of the bars, gets the rows of all epochs so far at the end of each, and
    ends the run by raising.
    """
    if config.resume:
        config, finished = resumed(config, folder, overrides)
        if finished:
            log.info("%s has finished already: nothing was changed", folder)
            return finished
    with alone_in(folder), stoppable(folder) as training:
        if not config.resume:
            refuse_occupied(folder)
        return _fit(config, folder, overrides, choices, watch, training)


def _fit(
    config: Train,
    folder: Path,
    overrides: Sequence[str],
    choices: Mapping[str, Any],
    watch: Watch | None,
    training: list[DigitClassifier],
) -> Metrics:
    quiet()
    device = find_device(config.accelerator.name)
    check_precision(config.accelerator.precision, device)
    if config.accelerator.threads:
        torch.set_num_threads(config.accelerator.threads)
    keep_memory()
    torch.manual_seed(config.seed)

    data = MNISTDataModule(**config.data.model_dump(), seed=config.seed, stretches=True)
    data.setup()
    continued = last_whole(folder, config) if config.resume else None
    network, config = first_network(config, data, overrides, continued is not None)
    network.onednn = True
    log.info("%s", data.shapes())
    log.info("%s", summary(network.specification, len(data.classes)))
    classifier = classifier_for(config, network, data, folder, watch)
    trainer = trainer_for(config, data, folder, device, [] if watch else bars(config.epochs))
    describe_run(folder, config, overrides, choices)

    path, earlier = continued or (None, 0.0)
    start = time.perf_counter()
    training.append(classifier)  # from here on a signal lets it finish its step and save
    with failing_clearly(folder, config, network):
        (folder / "checkpoints").mkdir(exist_ok=True)
        trainer.fit(classifier, datamodule=data, ckpt_path=path, weights_only=True)
    training.clear()
    if classifier.stopping:
        raise Stopped(classifier.stopping)
    seconds = earlier + time.perf_counter() - start

    # The test set is looked at once, through the checkpoint that the user keeps.
    best = load_classifier(folder / "checkpoints" / "best.ckpt", device.type)
    logits = best.logits(data.test.images) if config.test else None
    scores = None if logits is None else score(logits, data.test.labels)
    metrics = metrics_of(best, scores, len(classifier.history), seconds)
    for logger in trainer.loggers:
        if scores:
            logger.log_metrics({"test/loss": scores.loss, "test/accuracy": scores.accuracy}, trainer.global_step)
        logger.finalize("success")
    if config.plots:
        draw(folder / "plots", best, data, classifier.history, logits, scores)
    write_whole(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    (folder / "checkpoints" / PREVIOUS).unlink(missing_ok=True)
    if scores:
        log.info("%s", scores.headline("test"))
    log.info("%s", folder)
    return metrics


def first_network(
    config: Train, data: MNISTDataModule, overrides: Sequence[str], continued: bool
) -> tuple[ConvNet, Train]:
    """The network before its first step, and the configuration with the architecture that it really has."""
    if continued or not config.initialize:  # a continued run has its weights from its own last checkpoint
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
        figures = description.data.normalization
        if config.data.normalization != figures and any("data.normalization" in word for word in overrides):
            raise UserError(
                f"data.normalization={config.data.normalization}: initialize={config.initialize} was trained with "
                f"{figures}; leave it out: the checkpoint brings its own"
            )
        seen = description.data.model_dump(exclude={"normalization"})
        wanted = {**config.data.model_dump(include=set(seen)), "seed": config.seed}
        if data.data_name == seen["name"] and config.data.validation and wanted != seen:
            log.warning("warning: %s was trained on some of these validation digits", config.initialize)
        own = {
            "architecture": description.architecture,
            "data": config.data.model_copy(update={"normalization": figures}),
        }
        config = config.model_copy(update=own)
        if description.classes != data.classes:
            network.new_logits(len(data.classes))
    if config.freeze == "blocks":
        network.blocks.requires_grad_(False)
    return network, config


def classifier_for(
    config: Train, network: ConvNet, data: MNISTDataModule, folder: Path, watch: Watch | None
) -> DigitClassifier:
    """The LightningModule of a run, its optimizer and schedule tried before training starts."""
    make_optimizer = made(config.optimizer, "optimizer")
    make_scheduler = made(config.schedule.scheduler, "schedule.scheduler")
    trial = tried(make_optimizer, "optimizer", [p for p in network.parameters() if p.requires_grad])
    length = config.schedule.length
    tried(make_scheduler, "schedule.scheduler", trial, **({length: 10} if length else {}))
    where = config.data.model_dump(include={"name", "validation", "validation_from", "normalization"})

    def report(history: list[Row]) -> None:
        write_csv(folder / "metrics.csv", history)
        log.info("%s", epoch_line(history[-1], config.epochs))
        if watch:
            watch(history)

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


def keep_memory() -> None:
    """Have glibc keep what is freed: activations are else given back and faulted in anew at every step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)


def trainer_for(
    config: Train, data: MNISTDataModule, folder: Path, device: torch.device, shown: list[pl.Callback]
) -> pl.Trainer:
    """Lightning's Trainer, with nothing in it that costs time each step."""
    validated = len(data.validation.labels) > 0
    monitor = "val/accuracy" if validated and config.selection == "best" else None
    return pl.Trainer(
        accelerator=device.type,
        devices=1,
        precision=config.accelerator.precision,
        max_epochs=config.epochs,
        logger=made(config.logger, "logger") if config.logger else False,
        callbacks=[Checkpoints(folder / "checkpoints", monitor, config.checkpoint.every_seconds), *shown],
        plugins=[WholeCheckpoints()],
        limit_val_batches=None if validated else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def metrics_of(best: Classifier, scores: Scores | None, epochs: int, seconds: float) -> Metrics:
    """What metrics.json holds: the figures of the tested epoch, as its checkpoint has them, and of the test if any."""
    tested = best.description.history[-1]
    keys = [f"{part}/{figure}" for part in ("train", "val") for figure in ("loss", "accuracy")]
    return {
        "parameters": best.network.parameter_count(),
        "epochs": epochs,
        "tested_epoch": int(tested["epoch"]),
        "fit_seconds": seconds,
        **{key: tested.get(key) for key in keys},
        "test/loss": scores.loss if scores else None,
        "test/accuracy": scores.accuracy if scores else None,
    }


def draw(
    folder: Path,
    best: Classifier,
    data: MNISTDataModule,
    history: list[Row],
    logits: Tensor | None,
    scores: Scores | None,
) -> None:
    """A run's pictures; without the test's `logits` (N, 10) and `scores`, those of the training alone."""
    from mnist_cnn import plots

    plots.training_digits(data.train.images, data.train.labels, data.classes, data.seed, folder / "training_digits.png")
    plots.learning_curves(history, folder / "learning_curves.png")
    plots.first_kernels(best.network, folder / "first_kernels.png")
    if logits is None or scores is None:
        return
    label = data.classes[int(data.test.labels[0])]
    plots.feature_maps(best.network, data.test.images[0], label, folder)
    plots.results(folder, data.test.images, data.test.labels, logits.argmax(1), scores, data.classes)

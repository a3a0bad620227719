"""A run, from its configuration to its figures: what mnist-train does once its settings are known to be right."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from mnist_cnn.config.schema import UserError
from mnist_cnn.config.settings import Train
from mnist_cnn.data.datamodule import MNISTDataModule
from mnist_cnn.inference.classifier import Classifier, load_classifier
from mnist_cnn.inference.metrics import Scores, score
from mnist_cnn.models.checkpoint import check_precision, find_device
from mnist_cnn.models.convnet import summary
from mnist_cnn.runs.folder import alone_in, describe_run, refuse_occupied, resumed, write_whole
from mnist_cnn.training.data_parallel import SharedClassifier, shared_logits
from mnist_cnn.training.gathering import gathered
from mnist_cnn.training.module import DigitClassifier, Row
from mnist_cnn.training.parts import classifier_for, first_network, trainer_for
from mnist_cnn.training.progress import quiet
from mnist_cnn.training.ranks import Group
from mnist_cnn.training.resume import PREVIOUS, Stopped, failing_clearly, last_whole, stoppable

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
    with alone_in(folder), stoppable(folder) as training, gathered(config, folder) as group:
        if not config.resume:
            refuse_occupied(folder)
        return _fit(config, folder, overrides, choices, watch, training, group)


def _fit(
    config: Train,
    folder: Path,
    overrides: Sequence[str],
    choices: Mapping[str, Any],
    watch: Watch | None,
    training: list[DigitClassifier],
    group: Group | None,
) -> Metrics:
    device = prepare(config, group)
    data = MNISTDataModule(**config.data.model_dump(), seed=config.seed, stretches=True)
    data.setup()
    continued = last_whole(folder, config) if config.resume else None
    network, config = first_network(config, data, overrides, continued is not None)
    log.info("%s", data.shapes())
    log.info("%s", summary(network.specification, len(data.classes)))
    classifier = classifier_for(config, network, data, folder, group, watch)
    trainer = trainer_for(config, data, folder, device, group, silent=watch is not None)
    path, earlier = continued or (None, 0.0)
    if group:
        log.info("%s", shares(config, device, group))
        job = {"config": config.model_dump(mode="json"), "folder": str(folder), "checkpoint": path and str(path)}
        group.hand_over(job)
    describe_run(folder, config, overrides, choices)

    start = time.perf_counter()
    training.append(classifier)  # from here on a signal lets it finish its step and save
    with failing_clearly(folder, config, network):
        (folder / "checkpoints").mkdir(exist_ok=True)
        trainer.fit(classifier, datamodule=data, ckpt_path=path, weights_only=True)
        if isinstance(classifier, SharedClassifier):
            classifier.agree()
    training.clear()
    if classifier.stopping:
        raise Stopped(classifier.stopping)
    seconds = {"fit": earlier + time.perf_counter() - start, "train": earlier + classifier.ended - classifier.begun}

    # The test set is looked at once, through the checkpoint that the user keeps.
    if config.test:
        best, logits, seconds["test"] = tested(folder / "checkpoints" / "best.ckpt", data, device, config.views, group)
        scores = score(logits, data.test.labels)
    else:
        best, logits, scores = load_classifier(folder / "checkpoints" / "best.ckpt", device.type), None, None
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


def prepare(config: Train, group: Group | None) -> torch.device:
    """Set up torch for a run, in each of its processes.

    Raises:
        UserError: there are not as many devices, or they do not do this precision.
    """
    quiet()
    device = find_device(config.accelerator.name)
    if device.type == "cuda" and (found := torch.cuda.device_count()) < config.accelerator.devices:
        asked = f"accelerator.devices={config.accelerator.devices}"
        raise UserError(f"{asked} is more than the CUDA devices that torch finds here: {found}")
    check_precision(config.accelerator.precision, device)
    if config.accelerator.threads:
        torch.set_num_threads(config.accelerator.threads)
    elif group and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // config.accelerator.devices))
    keep_memory()
    torch.manual_seed(config.seed)
    return device


def shares(config: Train, device: torch.device, group: Group) -> str:
    size, each = config.data.batch_size, config.data.batch_size // group.size
    where = f"on {config.accelerator.num_nodes} machines" if config.accelerator.num_nodes > 1 else "on this machine"
    threads = f"; threads of each: {torch.get_num_threads()}" if device.type == "cpu" else ""
    return f"{group.size} ranks {where} ({device.type}), each with {each} of a batch's {size} digits{threads}"


def tested(
    checkpoint: Path, data: MNISTDataModule, device: torch.device, views: Literal[1, 5, 9], group: Group | None
) -> tuple[Classifier, Tensor, float]:
    """A checkpoint's classifier, its logits (N, classes) of the test digits, and the seconds they took.

    Each rank does a share of the digits, and its seconds are with the reading of the checkpoint.
    """
    start = time.perf_counter()
    if group:
        best, logits = shared_logits(checkpoint, data.test.images, device.type, views, group)
    else:
        best = load_classifier(checkpoint, device.type, views)
        start = time.perf_counter()
        logits = best.logits(data.test.images)
    return best, logits, time.perf_counter() - start


def keep_memory() -> None:
    """Have glibc keep what is freed: activations are else given back and faulted in anew at every step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)


def metrics_of(best: Classifier, scores: Scores | None, epochs: int, seconds: Mapping[str, float]) -> Metrics:
    """What metrics.json holds: the figures of the tested epoch, as its checkpoint has them, and of the test if any.

    `seconds` are of the whole fit, of training from the first batch to the last step, and of the test's scoring.
    """
    tested = best.description.history[-1]
    keys = [f"{part}/{figure}" for part in ("train", "val") for figure in ("loss", "accuracy")]
    return {
        "parameters": best.network.parameter_count(),
        "epochs": epochs,
        "tested_epoch": int(tested["epoch"]),
        **{f"{part}_seconds": seconds.get(part) for part in ("fit", "train", "test")},
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
    from mnist_cnn.inference import plots

    plots.training_digits(data.train.images, data.train.labels, data.classes, data.seed, folder / "training_digits.png")
    plots.learning_curves(history, folder / "learning_curves.png")
    plots.first_kernels(best.network, folder / "first_kernels.png")
    if logits is None or scores is None:
        return
    label = data.classes[int(data.test.labels[0])]
    plots.feature_maps(best.network, data.test.images[0], label, folder)
    plots.results(folder, data.test.images, data.test.labels, logits.argmax(1), scores, data.classes)

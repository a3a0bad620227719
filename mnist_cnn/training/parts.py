"""What a run is made of, in each of its processes: the network, Lightning's module around it, and its Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch

from mnist_cnn.config.schema import UserError
from mnist_cnn.config.settings import Train
from mnist_cnn.data.augmentation import Affine
from mnist_cnn.data.datamodule import MNISTDataModule
from mnist_cnn.models.checkpoint import FORMAT, rebuild
from mnist_cnn.models.convnet import ConvNet
from mnist_cnn.runs.folder import versions, write_csv
from mnist_cnn.training.averaging import Averages
from mnist_cnn.training.data_parallel import Ranks, SharedClassifier, quiet_signals
from mnist_cnn.training.module import DigitClassifier, Row
from mnist_cnn.training.progress import bars, epoch_line
from mnist_cnn.training.ranks import Group
from mnist_cnn.training.resume import Checkpoints, WholeCheckpoints
from mnist_cnn.training.targets import made, tried

log = logging.getLogger(__name__)


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
    network.onednn = True
    if config.freeze == "blocks":
        network.blocks.requires_grad_(False)
    return network, config


def classifier_for(
    config: Train,
    network: ConvNet,
    data: MNISTDataModule,
    folder: Path,
    group: Group | None,
    watch: Callable[[list[Row]], None] | None = None,
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

    return (SharedClassifier if group else DigitClassifier)(
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
        None if group and group.rank else report,
        Affine(config.augmentation) if config.augmentation.warps() else None,
        config.label_smoothing,
    )


def trainer_for(
    config: Train, data: MNISTDataModule, folder: Path, device: torch.device, group: Group | None, silent: bool = False
) -> pl.Trainer:
    """Lightning's Trainer, nothing in it costing time each step; rank 0 alone logs, and shows bars unless `silent`."""
    validated, follows = len(data.validation.labels) > 0, group is not None and group.rank > 0
    monitor = "val/accuracy" if validated and config.selection == "best" else None
    checkpoints = Checkpoints(folder / "checkpoints", monitor, config.checkpoint.every_seconds)
    averages = [Averages(config.averaging, device)] if config.averaging else []
    trainer = pl.Trainer(
        accelerator=device.type,
        devices=config.accelerator.devices,
        num_nodes=config.accelerator.num_nodes,
        strategy=Ranks(group) if group else "auto",
        precision=config.accelerator.precision,
        max_epochs=config.epochs,
        logger=made(config.logger, "logger") if config.logger and not follows else False,
        callbacks=[*averages, checkpoints, *([] if silent or follows else bars(config.epochs))],
        plugins=[WholeCheckpoints()],
        limit_val_batches=None if validated else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if group:
        quiet_signals(trainer)
    return trainer

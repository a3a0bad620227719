"""A run as a recipe: data, network, module, callbacks, logger, trainer, fit, test, figures."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.memory import is_oom_error

from mnist_cnn.config.schema import RunError, UserError
from mnist_cnn.config.settings import Train
from mnist_cnn.data.augmentation import Augment
from mnist_cnn.data.datamodule import MNISTDataModule
from mnist_cnn.inference.classifier import Classifier, load_classifier
from mnist_cnn.inference.metrics import Scores, score
from mnist_cnn.models.checkpoint import rebuild, trust
from mnist_cnn.models.convnet import ConvNet, summary
from mnist_cnn.models.device import check_precision, find_device, keep_memory
from mnist_cnn.runs.files import write_csv, write_whole
from mnist_cnn.runs.folder import alone_in, describe_run, refuse_occupied, resumed
from mnist_cnn.runs.hydra_app import resume_command
from mnist_cnn.training.callbacks import (
    BEST,
    LAST,
    AtomicCheckpointIO,
    BestCheckpoint,
    LastCheckpoint,
    Unprofiled,
    find_last_checkpoint,
    progress_bars,
    user_callbacks,
)
from mnist_cnn.training.distributed import is_data_parallel, launch, strategy_for
from mnist_cnn.training.module import DigitClassifier
from mnist_cnn.training.optimizers import check_factory, instantiate
from mnist_cnn.training.signals import Stopped, StopRequest, stop_on_signal

log = logging.getLogger(__name__)

NOTHING: Mapping[str, Any] = MappingProxyType({})

Metrics = dict[str, float | int | None]


def fit(
    config: Train,
    folder: Path,
    overrides: Sequence[str] = (),
    choices: Mapping[str, Any] = NOTHING,
    callbacks: Sequence[pl.Callback] = (),
    silent: bool = False,
) -> Metrics:
    """A whole run in `folder`; what metrics.json then holds.

    Args:
        config: of the run; with `resume`, of what the command line says beside it.
        overrides, choices: of the command line, for the record in config.yaml.
        callbacks: of Lightning's, beside the configuration's own; in one process only.
        silent: draw no progress bar.

    Raises:
        UserError: a setting, a file or a device is wrong.
        RunError: the work failed: a full disk, too little memory, a loss that is not finite, a rank that was killed.
        SystemExit: 128 + n after signal n, with everything saved.
    """
    if config.resume:
        config, finished = resumed(config, folder, overrides)
        if finished:
            with suppress(OSError, UserError), alone_in(folder):  # a kill may have left its lock; the folder read-only
                pass
            log.info("%s has finished already: nothing was changed", folder)
            return finished
    # Of several machines only that of rank 0 has the folder, and which it is shows later.
    alone = alone_in(folder) if config.accelerator.num_nodes == 1 else nullcontext()
    command = resume_command(folder, overrides)
    with alone, stop_on_signal(folder, command) as stop:
        if not config.resume:
            refuse_occupied(folder)
        if is_data_parallel(config):
            return launch(run, config, folder, overrides, choices, command) or {}
        return run(config, folder, overrides, choices, command, stop, callbacks, silent)


def run(
    config: Train,
    folder: Path,
    overrides: Sequence[str],
    choices: Mapping[str, Any],
    command: str,
    stop: StopRequest,
    callbacks: Sequence[pl.Callback] = (),
    silent: bool = False,
) -> Metrics:
    """What each rank does, and of a single process all there is; `command` is the one that continues the run."""
    device = prepare(config)
    data = MNISTDataModule(**config.data.model_dump(), seed=config.seed)
    data.setup()
    if config.augmentation.hands and data.classes != [*"0123456789"]:
        raise UserError(
            f"augmentation.hands={config.augmentation.hands:g} draws strokes of the digits 0 to 9, and "
            f"data={config.data.name} has other classes: give augmentation.hands=0"
        )
    checkpoint = find_last_checkpoint(folder, config, data.classes) if config.resume else None
    network, config = first_network(config, data, overrides, checkpoint is not None)
    module = module_for(config, network)
    trainer = trainer_for(config, folder, device, stop, len(data.validation.labels) > 0, callbacks, silent)
    if trainer.is_global_zero:
        log.info("%s", data.shapes())
        log.info("%s", summary(network))
        if not config.trainer.get("fast_dev_run"):
            describe_run(folder, config, overrides, choices)
        for logger in trainer.loggers:
            logger.log_hyperparams(config.model_dump(mode="json"))

    start = time.perf_counter()
    stop.training = True  # from here on a signal lets it finish its step and save
    with clear_failures(folder, config, network, command):
        (folder / "checkpoints").mkdir(exist_ok=True, parents=True)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    stop.training = False
    if stop.signum:
        raise Stopped(stop.signum)
    if not trainer.is_global_zero:
        return {}
    if config.trainer.get("fast_dev_run"):
        log.info("trainer.fast_dev_run: a batch of training and of validation went well; nothing was kept")
        return {}
    if not module.history:
        raise UserError("nothing was trained: trainer.limit_train_batches leaves no batch")
    before = sum(row["seconds"] for row in module.history) - (module.last_step - module.first_step)
    earlier = max(before, 0.0) if checkpoint else 0.0  # seconds of what was trained before this start
    seconds = {"fit": earlier + time.perf_counter() - start, "train": earlier + module.last_step - module.first_step}
    with clear_failures(folder, config, network, command):
        write_csv(folder / "metrics.csv", module.history)  # where a run continued after its last epoch
        return evaluated(config, folder, data, module, trainer, device, seconds)


def evaluated(
    config: Train,
    folder: Path,
    data: MNISTDataModule,
    module: DigitClassifier,
    trainer: pl.Trainer,
    device: torch.device,
    seconds: dict[str, float],
) -> Metrics:
    """The test, looked at once and through the checkpoint that the user keeps; the run's figures and pictures."""
    path = next(path for name in (BEST, LAST) if (path := folder / "checkpoints" / name).exists())
    best = load_classifier(path, device.type, config.tta)
    logits, scores = None, None
    if config.test:
        start = time.perf_counter()
        logits = best.logits(data.test.images)  # (N, classes)
        seconds["test"] = time.perf_counter() - start
        scores = score(logits, data.test.labels)
    metrics = metrics_of(best, scores, len(module.history), seconds)
    for logger in trainer.loggers:
        if scores:
            final = {"test/loss": scores.loss, "test/accuracy": scores.accuracy, "hp_metric": scores.accuracy}
            logger.log_metrics(final, trainer.global_step)  # hp_metric: TensorBoard's beside the hyperparameters
        logger.finalize("success")
    if config.plots:
        from mnist_cnn.inference.plots import run_plots  # matplotlib takes a while to import

        smoothed = config.label_smoothing > 0
        run_plots(folder / "plots", best.network, data, module.history, logits, scores, smoothed)
    write_whole(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    if scores:
        log.info("%s", scores.headline("test"))
    log.info("%s", folder)
    return metrics


# --- parts of a run ------------------------------------------------------------------------------------------


def prepare(config: Train) -> torch.device:
    """Set up torch for a run.

    Raises:
        UserError: there are not as many devices, or they do not do this precision.
    """
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric", "mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)  # tips and warnings that a user can do nothing about
    warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|torchmetrics|torch)(\.|$)")
    device = find_device(config.accelerator.name)
    if device.type == "cuda" and (found := torch.cuda.device_count()) < config.accelerator.devices:
        asked = f"accelerator.devices={config.accelerator.devices}"
        raise UserError(f"{asked} is more than the CUDA devices that torch finds here: {found}")
    check_precision(config.accelerator.precision, device)
    if config.trainer.get("sync_batchnorm") and device.type == "cpu":
        raise UserError("trainer.sync_batchnorm=true: torch has it for CUDA only; leave it out on a CPU")
    if device.type == "cuda":  # 32-true is float32: TF32 would keep 10 bits of each factor's fraction
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    if config.accelerator.threads:
        torch.set_num_threads(config.accelerator.threads)
    trust(config.architecture.own_modules() | set(config.modules))
    keep_memory()
    torch.manual_seed(config.seed)
    return device


def first_network(
    config: Train, data: MNISTDataModule, overrides: Sequence[str], continued: bool
) -> tuple[ConvNet, Train]:
    """The network before its first step, and the configuration with the architecture that it really has.

    Raises:
        UserError: the command line asks for another architecture or normalization than those of `initialize`, or for
            frozen blocks without it.
    """
    if config.freeze and not config.initialize and not continued:
        raise UserError("freeze=blocks keeps the blocks as they are: give initialize=FOLDER, a run that trained them")
    if continued or not config.initialize:  # a continued run has its weights from its own last checkpoint
        network = ConvNet(config.architecture, len(data.classes), data.mean, data.std)
        if config.architecture.own_modules():
            try_out(network)
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
        data.normalization = figures
        if description.classes != data.classes:
            network.replace_logits(len(data.classes))
    network.onednn = True
    if config.freeze == "blocks":
        network.blocks.requires_grad_(False)
    return network, config


def try_out(network: ConvNet) -> None:
    """Have layers of the user's own see a digit before training does.

    Raises:
        UserError: they fail, or change its shape.
    """
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 1, 28, 28))
    except Exception as error:  # whatever the user's code raises
        reason = " ".join(str(error).split())
        raise UserError(
            f"architecture: a layer of your own fails, or does not keep the shape of its input ({reason:.200})"
        ) from None
    network.train()


def module_for(config: Train, network: ConvNet) -> DigitClassifier:
    """The LightningModule of a run, its optimizer and schedule tried before training starts."""
    optimizer = instantiate(config.optimizer, "optimizer")
    scheduler = instantiate(config.schedule.scheduler, "schedule.scheduler")
    length = config.schedule.length
    example = check_factory(optimizer, "optimizer", [p for p in network.parameters() if p.requires_grad])
    check_factory(scheduler, "schedule.scheduler", example, **({length: 10} if length else {}))
    augment = Augment(config.augmentation) if config.augmentation.changes() else None
    return DigitClassifier(
        network,
        optimizer,
        scheduler,
        config.schedule.interval,
        length,
        seed=config.seed,
        augment=augment,
        label_smoothing=config.label_smoothing,
    )


def trainer_for(
    config: Train,
    folder: Path,
    device: torch.device,
    stop: StopRequest,
    validated: bool,
    callbacks: Sequence[pl.Callback],
    silent: bool,
) -> pl.Trainer:
    """Lightning's Trainer with the run's checkpoints and the user's flags and callbacks."""
    strategy = strategy_for(config)
    first = strategy == "auto" or strategy.cluster_environment.global_rank() == 0
    monitor = "val/accuracy" if validated and config.selection == "best" else None
    averages = [EMAWeightAveraging(device=device, decay=config.ema_decay)] if config.ema_decay else []
    try:
        return pl.Trainer(
            **{**config.trainer, "profiler": config.trainer.get("profiler") or Unprofiled()},
            accelerator=device.type,
            devices=config.accelerator.devices,
            num_nodes=config.accelerator.num_nodes,
            strategy=strategy,
            precision=config.accelerator.precision,
            max_epochs=config.epochs,
            default_root_dir=folder,
            logger=[instantiate(each, f"logger.{name}") for name, each in (config.logger or {}).items() if first],
            callbacks=[
                *averages,
                *user_callbacks(config, validated),
                *callbacks,
                *([] if silent or not first else progress_bars(config.epochs)),
                BestCheckpoint(folder, monitor),
                LastCheckpoint(folder, config.checkpoint.every_seconds, stop, config.epochs),
            ],
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (MisconfigurationException, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"trainer: pl.Trainer refuses these flags: {error}") from None


@contextmanager
def clear_failures(folder: Path, config: Train, network: ConvNet, command: str) -> Iterator[None]:
    """What goes wrong while a network trains in the user's words.

    Raises:
        RunError: the disk is full, the folder is gone, or the memory does not suffice.
        UserError: Lightning cannot do what the configuration asks for.
    """
    try:
        yield
    except OSError as error:
        reason = f"{error.filename or folder}: {error.strerror or error}"
        kept = (folder / "checkpoints" / LAST).exists()
        remedy = f"its last checkpoint is whole; mend this, then continue with: {command}"
        raise RunError(f"{reason}; {remedy if kept else 'no checkpoint was written yet'}") from None
    except MisconfigurationException as error:
        raise UserError(f"trainer or callbacks: {error}") from None
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or is_oom_error(error)):
            raise
        layers = [f"{block.filters}@{block.kernel}×{block.kernel}" for block in config.architecture.blocks]
        layers += [str(dense.units) for dense in config.architecture.dense]
        raise RunError(
            f"out of memory with data.batch_size={config.data.batch_size} and a network of "
            f"{network.parameter_count():,} parameters ({', '.join(layers)}); make one of them smaller"
        ) from None


# --- figures -------------------------------------------------------------------------------------------------


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

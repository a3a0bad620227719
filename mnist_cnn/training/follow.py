"""What a rank other than 0 does: rank 0's jobs, one after the other, in silence, until there are no more."""

from __future__ import annotations

import logging
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mnist_cnn.config.schema import NotFiniteError, RunError, UserError, validated
from mnist_cnn.config.settings import Train
from mnist_cnn.runs.hydra_app import refuse
from mnist_cnn.training.gathering import joined, met
from mnist_cnn.training.ranks import Group, broke, outside


def take_part(command: Callable[[], NoReturn]) -> NoReturn:
    """A command as one of the ranks that torchrun or srun has started: rank 0 runs it, the others follow."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    place = outside()
    assert place is not None
    try:
        group = met(*place)
    except UserError as error:
        refuse(error)
    if group.rank:
        follow_in(group)
    status = 1
    try:
        command()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0
        raise
    finally:
        group.end(status)


def follow(port: int, rank: int, size: int) -> NoReturn:
    """The whole life of a rank that rank 0 has started."""
    try:
        group = joined(port, rank, size)
    except RuntimeError:  # rank 0 has gone already
        os._exit(1)
    follow_in(group)


def follow_in(group: Group) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 says what comes of it
    logging.disable()
    import torch

    from mnist_cnn.training.resume import Stopped

    try:
        while "status" not in (job := group.take_over()):
            try:
                _share(job, group)
            except (Stopped, NotFiniteError):
                pass  # rank 0 has come to it at the same step, and says so
            except BaseException as error:
                _fail(group, error)
            finally:
                if torch.distributed.is_initialized():
                    torch.distributed.destroy_process_group()
        group.leave()
    except RuntimeError:  # the store has gone, and rank 0 with it
        os._exit(1)
    os._exit(job["status"])


def _fail(group: Group, error: BaseException) -> NoReturn:
    """Leave rank 0 the reason, in one line as all of them."""
    if broke(error):
        group.reason(error)
    elif isinstance(error, UserError | RunError):
        group.fail(f"rank {group.rank} failed: {error}")
    else:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}, line {last.lineno}"
        group.fail(f"rank {group.rank} failed: {type(error).__name__}: {error} ({where})")
    os._exit(1)


def _share(job: dict[str, Any], group: Group) -> None:
    """This rank's part in a job: its share of every batch, and of the test digits."""
    from mnist_cnn.data.datamodule import MNISTDataModule
    from mnist_cnn.training.data_parallel import SharedClassifier, shared_logits
    from mnist_cnn.training.fit import prepare
    from mnist_cnn.training.parts import classifier_for, first_network, trainer_for
    from mnist_cnn.training.resume import failing_clearly

    config, folder = validated(Train, job["config"]), Path(job["folder"])
    device = prepare(config, group)
    data = MNISTDataModule(**config.data.model_dump(), seed=config.seed, stretches=True)
    data.setup()
    network, _ = first_network(config, data, (), continued=True)  # rank 0 brings the weights
    classifier = classifier_for(config, network, data, folder, group)
    assert isinstance(classifier, SharedClassifier)
    trainer = trainer_for(config, data, folder, device, group)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, _: setattr(classifier, "stopping", signum))
    group.ready()
    with failing_clearly(folder, config, network):
        trainer.fit(classifier, datamodule=data, ckpt_path=job["checkpoint"], weights_only=True)
        classifier.agree()
    if config.test and not classifier.stopping:
        shared_logits(folder / "checkpoints" / "best.ckpt", data.test.images, device.type, config.views, group)

"""mnist-predict: which digit is in a picture."""

from __future__ import annotations

import logging
from pathlib import Path

import hydra
from omegaconf import DictConfig

from mnist_cnn.command import plain, run_command
from mnist_cnn.config import CONF, Predict
from mnist_cnn.jobs import guarded
from mnist_cnn.schema import validated

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="predict")
def job(config: DictConfig) -> None:
    guarded(lambda: predict(validated(Predict, plain(config))), Path())


def main() -> None:
    run_command(job, "predict")


def predict(config: Predict) -> None:
    """Print the label of each picture and its probability."""
    from mnist_cnn.images import find_pictures, read_digit

    pictures = find_pictures(config.images)
    digits = [read_digit(picture) for picture in pictures]

    import numpy as np
    import torch

    from mnist_cnn.checkpoint import load_classifier

    if config.accelerator.threads:
        torch.set_num_threads(config.accelerator.threads)
    classifier = load_classifier(config.checkpoint, config.accelerator.name)
    probabilities = classifier.probabilities(np.stack(digits))
    width = max(len("picture"), *(len(str(picture)) for picture in pictures))
    log.info("%-*s  label  probability", width, "picture")
    for picture, row in zip(pictures, probabilities, strict=True):
        log.info("%-*s  %-5s  %.4f", width, picture, classifier.classes[row.argmax()], row.max())


if __name__ == "__main__":
    main()

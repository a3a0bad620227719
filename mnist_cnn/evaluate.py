"""mnist-evaluate: the figures of a checkpoint on test or validation digits, and the digits it gets wrong."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mnist_cnn.config.schema import UserError, validated
from mnist_cnn.config.settings import CONF, Evaluate
from mnist_cnn.runs.folder import write_csv, write_whole
from mnist_cnn.runs.hydra_app import plain, run_command
from mnist_cnn.runs.jobs import guarded

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")
def job(config: DictConfig) -> Any:
    folder = Path(HydraConfig.get().runtime.output_dir)
    return guarded(lambda: evaluate(validated(Evaluate, plain(config)), folder), folder)


def main() -> None:
    run_command(job, "evaluate")


def evaluate(config: Evaluate, folder: Path) -> dict[str, float]:
    """Score a checkpoint, and leave evaluation.json, incorrect.csv and plots/ in `folder`."""
    import torch

    from mnist_cnn.data.datamodule import MNISTDataModule
    from mnist_cnn.inference.classifier import load_classifier, together
    from mnist_cnn.inference.metrics import per_class_table, score

    classifier = load_classifier(config.checkpoint, config.accelerator.name, config.views)
    if config.accelerator.threads:
        torch.set_num_threads(config.accelerator.threads)
    trained_on = classifier.description.data
    name = trained_on.name if config.data.name == "as_trained" else config.data.name
    held_out = trained_on.model_dump(include={"validation", "validation_from", "seed"})
    data = MNISTDataModule(name, config.data.root, **(held_out if config.split == "validation" else {"validation": 0}))
    data.setup()
    if len(classifier.classes) != len(data.classes):
        raise UserError(f"{name} has {len(data.classes)} classes, the checkpoint {len(classifier.classes)}")
    digits = data.test if config.split == "test" else data.validation
    if not len(digits.labels):
        raise UserError("split=validation: it was trained without validation digits; use split=test")
    if outside := [index for index in config.probabilities if index >= len(digits.labels)]:
        raise UserError(f"probabilities={outside}: {config.split} has digits 0 to {len(digits.labels) - 1}")

    each = classifier.each(digits.images)
    logits = together(each)
    scores = score(logits, digits.labels)
    if config.calibrate:
        calibrate(config.checkpoint[0], each, digits.labels, scores.calibration_error)
    probabilities = torch.softmax(logits.double(), dim=1)
    predicted = logits.argmax(1)
    wrong = (predicted != digits.labels).nonzero().flatten().tolist()
    rows = [
        {
            "index": index,
            "expected": data.classes[int(digits.labels[index])],
            "predicted": data.classes[int(predicted[index])],
            **{f"probability {name}": float(p) for name, p in zip(data.classes, probabilities[index], strict=True)},
        }
        for index in wrong
    ]
    header = ["index", "expected", "predicted", *(f"probability {name}" for name in data.classes)]
    write_csv(folder / "incorrect.csv", rows, header)
    figures = {
        "loss": scores.loss,
        "accuracy": scores.accuracy,
        "accuracy_low": scores.interval[0],
        "accuracy_high": scores.interval[1],
        "calibration_error": scores.calibration_error,
    }
    write_whole(folder / "evaluation.json", json.dumps(figures, indent=2) + "\n")
    if config.plots:
        from mnist_cnn.inference import plots

        plots.results(folder / "plots", digits.images, digits.labels, predicted, scores, data.classes)

    log.info("%s", per_class_table(scores, data.classes))
    for index in config.probabilities:
        log.info("digit %d, expected %s", index, data.classes[int(digits.labels[index])])
        for label, probability in zip(data.classes, probabilities[index].tolist(), strict=True):
            log.info("%s: %.10f%%", label, 100 * probability)
    log.info("calibration error %.4f, %d incorrect digits", scores.calibration_error, len(wrong))
    log.info("%s", scores.headline(config.split))
    log.info("%s", folder)
    return figures


def calibrate(checkpoint: str, logits: Tensor, labels: Tensor, before: float) -> Path:
    """Fit one temperature to the logits (views, N, classes), and write NAME_calibrated.ckpt with it beside the old one.

    Guo et al., On Calibration of Modern Neural Networks, 2017: the accuracy stays as it is.
    """
    from mnist_cnn.inference.classifier import together
    from mnist_cnn.inference.metrics import score, temperature_of
    from mnist_cnn.models.checkpoint import find_checkpoint, read_checkpoint, save_weights

    path = find_checkpoint(checkpoint)
    content, description = read_checkpoint(path)
    found = temperature_of(logits, labels)  # of logits that the earlier temperature has divided already
    new = path.with_name(f"{path.stem}_calibrated.ckpt")
    described = description.model_copy(update={"temperature": description.temperature * found})
    save_weights(new, described, content["state_dict"])
    after = score(together(logits / found), labels).calibration_error
    log.info("temperature %.4f; calibration error before %.4f, after %.4f", described.temperature, before, after)
    log.info("%s", new)
    return new


if __name__ == "__main__":
    main()

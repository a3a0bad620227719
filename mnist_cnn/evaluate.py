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
from mnist_cnn.runs.files import write_csv, write_whole
from mnist_cnn.runs.hydra_app import guarded, plain, run_command

if TYPE_CHECKING:
    from torch import Tensor

    from mnist_cnn.data.datasets import Digits
    from mnist_cnn.inference.classifier import Classifier
    from mnist_cnn.inference.metrics import Scores
    from mnist_cnn.models.checkpoint import Description

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")
def job(config: DictConfig) -> Any:
    folder = Path(HydraConfig.get().runtime.output_dir)
    return guarded(lambda: evaluate(validated(Evaluate, plain(config)), folder), folder)


def main() -> None:
    run_command(job, "evaluate")


def evaluate(config: Evaluate, folder: Path) -> dict[str, Any]:
    """Score a checkpoint, and leave evaluation.json, incorrect.csv and plots/ in `folder`; returns evaluation.json's.

    Raises:
        UserError: the checkpoint or the data cannot be read, or they do not fit each other or the settings.
    """
    import torch

    from mnist_cnn.inference.classifier import load_classifier, mean_logits
    from mnist_cnn.inference.metrics import score

    classifier = load_classifier(config.checkpoint, config.accelerator.name, config.tta, config.modules)
    if config.accelerator.threads:
        torch.set_num_threads(config.accelerator.threads)
    digits, classes = load_digits(config, classifier.description)

    member_logits = classifier.member_logits(digits.images)  # (networks · tta, N, classes)
    logits = mean_logits(member_logits)  # (N, classes)
    scores = score(logits, digits.labels)
    if config.calibrate:
        calibrate(config, classifier, digits, member_logits, scores.calibration_error)

    probabilities = torch.softmax(logits.double(), dim=1)
    corruptions = {}
    if config.corruptions:
        from mnist_cnn.inference import robustness

        images = digits.images[:, 0].numpy()
        corruptions = robustness.score_corruptions(classifier, images, digits.labels.numpy())
        log.info("%s", robustness.corruption_table(corruptions))
        if config.plots:
            robustness.corruption_sheet(images[0], folder / "plots" / "corruptions.png")
    figures = write_results(folder, digits, classes, probabilities, scores, corruptions)
    if config.plots:
        from mnist_cnn.inference import plots

        plots.evaluation_plots(folder / "plots", digits.images, digits.labels, logits, scores, classes)
    print_results(config, digits, classes, probabilities, scores)
    log.info("%s", folder)
    return figures


def load_digits(config: Evaluate, trained_on: Description) -> tuple[Digits, list[str]]:
    """The test digits, or those that the run held out, and the names of their classes.

    Raises:
        UserError: there are none, their classes are not the checkpoint's, or `probabilities` names one beyond the last.
    """
    import torch

    from mnist_cnn.data.datamodule import MNISTDataModule
    from mnist_cnn.data.datasets import Digits

    as_trained = config.data.name == "as_trained"
    name = trained_on.data.name if as_trained else config.data.name
    test = trained_on.data.test if name == trained_on.data.name else config.data.test  # what it did not see
    if as_trained and "." in name:  # nothing that a checkpoint names is imported
        raise UserError(f"it was trained on {name}, which is not this package's: name it again by data._target_={name}")
    held_out = trained_on.data.model_dump(include={"validation", "validation_from", "seed"})
    split = held_out if config.split == "validation" else {"validation": 0}
    data = MNISTDataModule(name, config.data.root, test=test, **split)
    data.setup()
    digits, classes = data.test if config.split == "test" else data.validation, data.classes
    if name == "folder" and trained_on.data.name != "folder":  # it saw none of these pictures
        digits = Digits(*map(torch.cat, zip(data.train, data.test, strict=True)))
    if set(classes) <= set(trained_on.classes):
        labels = torch.tensor([trained_on.classes.index(each) for each in classes])[digits.labels]
        digits, classes = Digits(digits.images, labels), trained_on.classes
    elif len(classes) != len(trained_on.classes):
        raise UserError(f"{name} has {len(classes)} classes, the checkpoint {len(trained_on.classes)}")
    if not len(digits.labels):
        raise UserError("split=validation: it was trained without validation digits; use split=test")
    if outside := [index for index in config.probabilities if index >= len(digits.labels)]:
        raise UserError(f"probabilities={outside}: {config.split} has digits 0 to {len(digits.labels) - 1}")
    return digits, classes


def write_results(
    folder: Path,
    digits: Digits,
    classes: list[str],
    probabilities: Tensor,
    scores: Scores,
    corruptions: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Write incorrect.csv and evaluation.json, from probabilities (N, classes); returns what the latter holds."""
    predicted = probabilities.argmax(1)
    columns = [f"probability {name}" for name in classes]
    rows = [
        {
            "index": index,
            "expected": classes[int(digits.labels[index])],
            "predicted": classes[int(predicted[index])],
            **dict(zip(columns, probabilities[index].tolist(), strict=True)),
        }
        for index in (predicted != digits.labels).nonzero().flatten().tolist()
    ]
    write_csv(folder / "incorrect.csv", rows, ["index", "expected", "predicted", *columns])
    figures = {
        "loss": scores.loss,
        "accuracy": scores.accuracy,
        "accuracy_low": scores.interval[0],
        "accuracy_high": scores.interval[1],
        "calibration_error": scores.calibration_error,
        **({"corruptions": corruptions} if corruptions else {}),
    }
    write_whole(folder / "evaluation.json", json.dumps(figures, indent=2) + "\n")
    return figures


def print_results(config: Evaluate, digits: Digits, classes: list[str], probabilities: Tensor, scores: Scores) -> None:
    """The figures of each class, the probabilities of the digits that were asked for, and the headline."""
    from mnist_cnn.inference.metrics import per_class_table

    log.info("%s", per_class_table(scores, classes))
    for index in config.probabilities:
        log.info("digit %d, expected %s", index, classes[int(digits.labels[index])])
        for label, probability in zip(classes, probabilities[index].tolist(), strict=True):
            log.info("%s: %.10f%%", label, 100 * probability)
    incorrect = int(scores.confusion.sum() - scores.confusion.trace())
    log.info("calibration error %.4f, %d incorrect digits", scores.calibration_error, incorrect)
    log.info("%s", scores.headline(config.split))


def calibrate(
    config: Evaluate, classifier: Classifier, digits: Digits, member_logits: Tensor, error_before: float
) -> Path:
    """Fit a temperature and the probability that is sure, and write both into a new checkpoint, NAME_calibrated.ckpt.

    One temperature leaves the accuracy as it is (Guo et al., On Calibration of Modern Neural Networks, 2017). It is
    fitted on the digits, and with `corruptions` on these too. From the probability on, 99.9 % of answers are right, on
    the digits and on MNIST-C's corruptions of them.

    Args:
        digits: of the validation.
        member_logits: (tta, N, classes), of these digits, divided by the checkpoint's temperature.
        error_before: the calibration error without the new temperature, for the log.
    """
    import torch

    from mnist_cnn.data.corruptions import CORRUPTIONS
    from mnist_cnn.inference.classifier import mean_logits
    from mnist_cnn.inference.metrics import fit_temperature, score, sure_from
    from mnist_cnn.models.checkpoint import find_checkpoint, rebuild, save_weights
    from mnist_cnn.pictures.digit_image import IN_MNIST_FORM

    path = find_checkpoint(config.checkpoint[0])
    network, description = rebuild(path)
    everything = [member_logits]
    if description.data.name in IN_MNIST_FORM or config.corruptions:
        images = digits.images[:, 0].numpy()
        corrupted = (torch.from_numpy(corrupt(images))[:, None] for corrupt in CORRUPTIONS.values())
        everything += [classifier.member_logits(each) for each in corrupted]
    fitted = everything if config.corruptions else [member_logits]
    factor = fit_temperature(torch.cat(fitted, 1), digits.labels.repeat(len(fitted)))
    if factor == 1:
        log.warning("warning: none of the digits is wrong, so they tell no temperature: it stays as it is")
    error = score(mean_logits(member_logits / factor), digits.labels).calibration_error
    sure = sure_from(mean_logits(torch.cat(everything, 1) / factor), digits.labels.repeat(len(everything)))
    found = {"temperature": description.temperature * factor, "unsure_below": sure}
    new = path.with_name(f"{path.stem}_calibrated.ckpt")
    save_weights(new, description.model_copy(update=found), network)
    log.info("temperature %.4f; calibration error before %.4f, after %.4f", found["temperature"], error_before, error)
    log.info("unsure below %.4f", sure)
    log.info("%s", new)
    return new


if __name__ == "__main__":
    main()

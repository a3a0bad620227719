"""How often networks are wrong on MNIST-C's corruptions, as they are and as `mnist-predict` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from mnist_cnn.config.schema import UserError
from mnist_cnn.data.corruptions import CORRUPTIONS
from mnist_cnn.inference.classifier import Classifier
from mnist_cnn.inference.plots import INK, image_grid
from mnist_cnn.pictures.digit_image import readings_for


def score_corruptions(
    classifier: Classifier, images: NDArray[np.uint8], labels: NDArray[np.int64]
) -> dict[str, dict[str, float]]:
    """Digits uint8 (N, 28, 28) with their labels (N,) to the figures of each corruption, and last of their mean.

    `error` is the fraction of the corrupted digits that the network alone gets wrong, `form_error` that through the
    picture form, where the `refused`, a count, are wrong too. A network of data that are not in MNIST's form takes
    any 28×28 as it is, so that both are equal.
    """
    read = readings_for(classifier.description.data.name, "any")

    figures: dict[str, dict[str, float]] = {}
    for name, corrupt in tqdm(CORRUPTIONS.items(), unit=" corruptions", disable=None, leave=False):
        corrupted = corrupt(images)
        alone = classifier.logits(torch.from_numpy(corrupted)[:, None]).argmax(1).numpy()
        seen, found = np.zeros(len(labels), bool), []
        for index, digit in enumerate(corrupted):
            with suppress(UserError):
                found.append(read(digit))
                seen[index] = True
        through = np.full(len(labels), -1)  # no class
        through[seen] = classifier.surest(found)[1].argmax(1)
        figures[name] = {
            "error": float((alone != labels).mean()),
            "form_error": float((through != labels).mean()),
            "refused": int((~seen).sum()),
        }
    keys = ("error", "form_error", "refused")
    return figures | {"mean": {key: float(np.mean([row[key] for row in figures.values()])) for key in keys}}


def corruption_table(figures: Mapping[str, Mapping[str, float]]) -> str:
    """What `score_corruptions` returns, as lines for the terminal."""
    lines = [f"{'MNIST-C':<15}{'error, %':>10}{'through the form, %':>21}{'refused':>9}"]
    for name, row in figures.items():
        lines.append(
            f"{name:<15}{100 * row['error']:>10.2f}{100 * row['form_error']:>21.2f}{round(row['refused']):>9,}"
        )
    return "\n".join(lines)


def corruption_sheet(digit: NDArray[np.uint8], path: Path) -> None:
    """Draw a digit uint8 (28, 28) and what each corruption makes of it."""
    images = [digit, *(corrupt(digit[None])[0] for corrupt in CORRUPTIONS.values())]
    names = ["digit", *(name.replace("_", " ") for name in CORRUPTIONS)]
    image_grid("A digit, and what MNIST-C's corruptions make of it", images, names, 8, path, **INK)

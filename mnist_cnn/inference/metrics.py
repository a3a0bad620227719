"""What a network's logits are worth: loss, accuracy with its interval, figures of each class, calibration."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

CALIBRATION_BINS = 15


class Scores(NamedTuple):
    """`interval` is Wilson's, 95 %, of the accuracy; accuracies are fractions, 0 to 1."""

    loss: float  # mean cross entropy
    accuracy: float
    interval: tuple[float, float]
    per_class: NDArray[np.float64]  # (classes, 4): precision, recall, F1, number of images
    confusion: NDArray[np.int64]  # (classes, classes), expected × predicted
    calibration_error: float

    def headline(self, split: str) -> str:
        """One line for the terminal: loss and accuracy on `split`, such as test."""
        low, high = self.interval
        return (
            f"{split} loss {self.loss:.4f}, accuracy {self.accuracy:.2%} "
            f"(95 % interval {low:.2%} to {high:.2%}, {int(self.confusion.sum()):,} digits)"
        )


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Logits float (N, classes) and labels int64 (N,), N at least 1, to `Scores`.

    The calibration error is the expected one over 15 equal bins of the highest probability (Guo et al., 2017). A class
    that is never predicted has precision 0, one that is not among the labels has recall 0.
    """
    from torchmetrics.functional import classification

    logits, labels = logits.float().cpu(), labels.cpu()
    classes, predicted = logits.shape[1], logits.argmax(1)
    confusion = classification.multiclass_confusion_matrix(predicted, labels, classes)
    correct = int(confusion.trace())
    measures = (
        classification.multiclass_precision,
        classification.multiclass_recall,
        classification.multiclass_f1_score,
    )
    per_class = [measure(predicted, labels, classes, average="none") for measure in measures]
    calibration_error = classification.multiclass_calibration_error(
        torch.softmax(logits, 1), labels, classes, n_bins=CALIBRATION_BINS
    )
    return Scores(
        loss=F.cross_entropy(logits, labels).item(),
        accuracy=correct / len(labels),
        interval=wilson_interval(correct, len(labels)),
        per_class=torch.stack([*per_class, confusion.sum(1)], dim=1).double().numpy(),
        confusion=confusion.numpy(),
        calibration_error=calibration_error.item(),
    )


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, 1927), as low and high fractions; `total` at least 1."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    fraction, scale = correct / total, 1 + z * z / total
    centre = (fraction + z * z / (2 * total)) / scale
    half = z * math.sqrt(fraction * (1 - fraction) / total + z * z / (4 * total * total)) / scale
    return max(centre - half, 0.0), min(centre + half, 1.0)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The number, 0.05 to 20, that makes the cross entropy least when the logits are divided by it (Guo et al., 2017).

    Logits (N, classes), or (M, N, classes) of M networks or shifts whose probabilities are averaged; labels (N,). 1.0
    where no answer is wrong: the least cross entropy would be that of endless sureness.
    """
    from scipy.optimize import minimize_scalar

    each = logits.double().view(-1, *logits.shape[-2:])  # (M, N, classes)
    if (each.softmax(2).mean(0).argmax(1) == labels).all():
        return 1.0

    def loss(log_temperature: float) -> float:
        divided = torch.log_softmax(each / math.exp(log_temperature), 2)
        return F.nll_loss(divided.logsumexp(0) - math.log(len(each)), labels).item()

    return math.exp(minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded").x)


def sure_from(logits: Tensor, labels: Tensor, accuracy: float = 0.999) -> float:
    """The least probability from which on so large a fraction of answers is right, of logits (N, classes), labels (N,).

    1.0 where even the surest answers are not.
    """
    probabilities, predicted = torch.softmax(logits.double(), 1).max(1)
    order = probabilities.argsort(descending=True, stable=True)
    right = (predicted == labels)[order].double().cumsum(0) / torch.arange(1, len(labels) + 1)
    enough = (right >= accuracy).nonzero()
    return float(probabilities[order[enough[-1]]]) if len(enough) else 1.0


def per_class_table(scores: Scores, classes: list[str]) -> str:
    """Precision, recall, F1 and number of images of each class, as lines for the terminal."""
    width = max(7, *(len(name) + 2 for name in classes))
    lines = [f"{'class':<{width}}{'precision':>10}{'recall':>9}{'F1':>9}{'digits':>8}"]
    for name, (precision, recall, f1, count) in zip(classes, scores.per_class, strict=True):
        lines.append(f"{name:<{width}}{precision:>10.4f}{recall:>9.4f}{f1:>9.4f}{int(count):>8,}")
    return "\n".join(lines)

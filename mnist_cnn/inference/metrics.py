"""Figures of a classifier from its logits: loss, accuracy with its interval, per class, calibration."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F


class Scores(NamedTuple):
    """`interval` is Wilson's, 95 %; `per_class` has precision, recall, F1 and count of each class."""

    loss: float
    accuracy: float
    interval: tuple[float, float]
    per_class: NDArray[np.float64]  # (classes, 4)
    confusion: NDArray[np.int64]  # (classes, classes), expected × predicted
    calibration_error: float

    def headline(self, part: str) -> str:
        low, high = self.interval
        return (
            f"{part} loss {self.loss:.4f}, accuracy {self.accuracy:.2%} "
            f"(95 % interval {low:.2%} to {high:.2%}, {int(self.confusion.sum()):,} digits)"
        )


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion."""
    from scipy.stats import binomtest

    interval = binomtest(correct, total).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Logits float (N, classes) and labels int64 (N,) to `Scores`.

    The calibration error is the expected one over 15 bins of the highest probability (Guo et al., 2017).
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, labels = logits.float().cpu(), labels.cpu()
    classes = logits.shape[1]
    predicted = logits.argmax(1)
    correct = int((predicted == labels).sum())
    known = list(range(classes))
    per_class = precision_recall_fscore_support(labels, predicted, labels=known, zero_division=0.0)
    return Scores(
        loss=F.cross_entropy(logits, labels).item(),
        accuracy=correct / len(labels),
        interval=wilson_interval(correct, len(labels)),
        per_class=np.stack(per_class, axis=1),
        confusion=confusion_matrix(labels, predicted, labels=known),
        calibration_error=multiclass_calibration_error(torch.softmax(logits, 1), labels, classes, n_bins=15).item(),
    )


def temperature_of(logits: Tensor, labels: Tensor) -> float:
    """The number that, dividing the logits, makes the cross entropy with labels (N,) least; 0.05 to 20.

    Logits (N, classes), or (M, N, classes), of whose probabilities the mean over M is taken.
    """
    from scipy.optimize import minimize_scalar

    each = logits.double().view(-1, *logits.shape[-2:])

    def loss(logarithm: float) -> float:
        divided = torch.log_softmax(each / math.exp(logarithm), 2)
        return F.nll_loss(divided.logsumexp(0) - math.log(len(each)), labels).item()

    return math.exp(minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded").x)


def per_class_table(scores: Scores, classes: list[str]) -> str:
    width = max(7, *(len(name) + 2 for name in classes))
    lines = [f"{'class':<{width}}{'precision':>10}{'recall':>9}{'F1':>9}{'digits':>8}"]
    for name, (precision, recall, f1, count) in zip(classes, scores.per_class, strict=True):
        lines.append(f"{name:<{width}}{precision:>10.4f}{recall:>9.4f}{f1:>9.4f}{int(count):>8,}")
    return "\n".join(lines)

"""The pictures of runs, evaluations and predictions, by matplotlib's object interface: no window, no global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from torch import Tensor

from mnist_cnn.inference.metrics import Scores
from mnist_cnn.models.convnet import ConvNet

INK: dict[str, Any] = {"cmap": "gray_r", "vmin": 0, "vmax": 255}  # the style of digits, dark on white


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, pil_kwargs={"compress_level": 1})  # a sweep's jobs draw theirs in half a second


def image_grid(
    title: str, images: Any, labels: Sequence[str], columns: int, path: Path, inches: float = 1.0, **style: Any
) -> None:
    """Draw images (N, H, W) or (N, H, W, 3), each `inches` wide under its label, in one file.

    `style` goes to matplotlib's imshow. All are drawn into one axes: one for each image takes seconds to lay out.
    """
    lines = max([label.count("\n") + 1 for label in labels], default=1)
    height, width = np.shape(images[0])[:2] if len(images) else (28, 28)
    gap_x, gap_y = 0.15 * width, (0.08 + 0.17 * lines) * width / inches
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(max(columns * inches * 1.15, 5.5), rows * inches * (height + gap_y) / width + 0.6))
    figure.suptitle(title, y=1 - 0.15 / figure.get_figheight(), va="top", fontsize=11)
    axes = figure.add_axes((0.01, 0.01, 0.98, 1 - 0.5 / figure.get_figheight()))
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        left, top = (number % columns) * (width + gap_x), (number // columns) * (height + gap_y)
        axes.imshow(image, extent=(left, left + width, top + height, top), interpolation="nearest", **style)
        axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor="0.8", linewidth=0.5))
        axes.text(left + width / 2, top - 0.03 * height, label, ha="center", va="bottom", fontsize=8)
    axes.set(xlim=(-gap_x, columns * (width + gap_x)), ylim=(rows * (height + gap_y), -gap_y), aspect="equal")
    axes.set_axis_off()
    _save(figure, path)


def training_digits(images: Tensor, labels: Tensor, classes: list[str], seed: int, path: Path) -> None:
    """Draw 24 random training digits; images uint8 (N, 1, 28, 28), labels (N,)."""
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:24]
    names = [classes[int(label)] for label in labels[chosen]]
    image_grid("24 random training digits with their labels", images[chosen, 0].numpy(), names, 6, path, **INK)


def learning_curves(history: list[dict[str, float]], path: Path) -> None:
    """Draw loss and accuracy by epoch, of training and, where there is one, validation.

    `history` has a row an epoch: epoch, train/loss, train/accuracy, val/loss, val/accuracy.
    """
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(10, 4))  # with margins given: to find them, matplotlib would draw everything twice
    figure.subplots_adjust(0.08, 0.13, 0.98, 0.84, wspace=0.24)
    figure.suptitle("Learning curves")
    for axes, measure in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split, name in (("train", "training"), ("val", "validation")):
            values = [row.get(f"{split}/{measure}", np.nan) for row in history]
            if not np.all(np.isnan(values)):
                axes.plot(epochs, values, marker="o", label=name)
        axes.set(xlabel="epoch", ylabel="cross entropy" if measure == "loss" else measure, title=measure)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()
        if measure == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _save(figure, path)


def confusion_matrix(confusion: NDArray[np.int64], classes: list[str], title: str, path: Path) -> None:
    """Draw counts (classes, classes) of expected × predicted; only mistakes are coloured, so that they stand out."""
    long = max(map(len, classes)) > 3
    figure = Figure(figsize=(7.5, 7))
    axes = figure.add_axes((0.16, 0.14, 0.81, 0.8) if long else (0.08, 0.07, 0.9, 0.88))
    mistakes = confusion.copy()
    np.fill_diagonal(mistakes, 0)
    axes.imshow(mistakes, cmap="Reds", vmin=0, vmax=max(1, mistakes.max()))
    for (expected, predicted), number in np.ndenumerate(confusion):
        if number:
            dark = mistakes[expected, predicted] > 0.6 * mistakes.max()
            color = "w" if dark else "k"
            axes.text(predicted, expected, f"{number}", ha="center", va="center", color=color, fontsize=9)
    axes.set_xticks(range(len(classes)), classes, rotation=45 if long else 0, ha="right" if long else "center")
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="expected", title=title)
    _save(figure, path)


def incorrect_digits(images: Tensor, labels: Tensor, predicted: Tensor, classes: list[str], path: Path) -> None:
    """Draw the first 24 digits that were not recognised, with index, prediction (p) and expectation (e).

    Images uint8 (N, 1, 28, 28), labels and predicted (N,).
    """
    indices = (predicted != labels).nonzero().flatten()
    first = indices[:24].tolist()
    names = [f"index {i}\np: {classes[int(predicted[i])]}, e: {classes[int(labels[i])]}" for i in first]
    title = f"The first {len(first)} of {len(indices)} incorrect digits (p: predicted, e: expected)"
    image_grid(title if first else "No incorrect digit", [images[i, 0].numpy() for i in first], names, 6, path, **INK)


def evaluation_plots(
    folder: Path, images: Tensor, labels: Tensor, predicted: Tensor, scores: Scores, classes: list[str]
) -> None:
    """Draw the confusion matrix and the first incorrect digits; images uint8 (N, 1, 28, 28), the others (N,)."""
    title = f"Confusion matrix, {len(labels):,} digits, accuracy {scores.accuracy:.2%}"
    confusion_matrix(scores.confusion, classes, title, folder / "confusion_matrix.png")
    incorrect_digits(images, labels, predicted, classes, folder / "incorrect_digits.png")


def prediction_grid(pictures: Sequence[tuple[Any, Any, str]], path: Path) -> None:
    """Draw each picture uint8 (112, 112, 3) beside the digit uint8 (28, 28) that the network saw, under its text."""
    pairs = [
        np.concatenate([picture, np.repeat(np.kron(255 - digit, np.ones((4, 4), np.uint8))[..., None], 3, 2)], axis=1)
        for picture, digit, _ in pictures
    ]
    texts = [text for *_, text in pictures]
    image_grid("Pictures, and what the network saw of them", pairs, texts, 4, path, inches=1.8)


def first_kernels(network: ConvNet, path: Path) -> None:
    """Draw the kernels of the first convolution, 64 at most: blue is negative, red positive. None, no file."""
    convolution = next((m for m in network.modules() if isinstance(m, torch.nn.Conv2d)), None)
    if convolution is None:
        return
    kernels = convolution.weight.detach().float().cpu()[:64, 0].numpy()
    bound = float(np.abs(kernels).max()) or 1.0
    size = "×".join(map(str, kernels.shape[1:]))
    title = f"Kernels of the first convolution: {convolution.out_channels} of {size}, red positive, blue negative"
    names = [f"filter {number}" for number in range(len(kernels))]
    image_grid(title, kernels, names, 8, path, cmap="RdBu_r", vmin=-bound, vmax=bound)


def feature_maps(network: ConvNet, image: Tensor, label: str, folder: Path) -> None:
    """Draw the output of each block for one digit, uint8 (1, 28, 28): feature_maps_1.png and so on in `folder`."""
    device = network.mean.device
    with torch.inference_mode():
        x = (image.unsqueeze(0).to(device).float() - network.mean) / network.std
        for number, block in enumerate(network.blocks, start=1):
            x = block(x)
            maps = x[0, :64].float().cpu().numpy()
            size = "×".join(map(str, maps.shape[1:]))
            shown = f"{len(maps)} maps" if len(maps) == x.shape[1] else f"the first {len(maps)} of {x.shape[1]} maps"
            title = f"Feature maps of block {number} for a digit labelled {label} ({shown} of {size})"
            names = [f"filter {index}" for index in range(len(maps))]
            image_grid(title, list(maps), names, 8, folder / f"feature_maps_{number}.png", cmap="gray_r", vmin=0)

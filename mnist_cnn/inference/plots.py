"""The pictures of runs, evaluations and predictions, by matplotlib's object interface: no window, no global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from torch import Tensor

from mnist_cnn.inference.metrics import Scores
from mnist_cnn.models.convnet import ConvNet
from mnist_cnn.pictures.digit_image import visible_pixels

if TYPE_CHECKING:  # it brings Lightning
    from mnist_cnn.data.datamodule import MNISTDataModule

INK: dict[str, Any] = {"cmap": "gray_r", "vmin": 0, "vmax": 255}  # the style of digits, dark on white


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(figure))


def png(figure: Figure) -> bytes:
    """A figure as a PNG file's bytes."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a dollar in a name is no formula
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, pil_kwargs={"compress_level": 1})  # a sweep's jobs draw theirs in half a second
    return buffer.getvalue()


def image_grid(
    title: str,
    images: Any,
    labels: Sequence[str],
    columns: int,
    path: Path,
    inches: float = 1.0,
    bar: bool = False,
    **style: Any,
) -> None:
    """Draw images (H, W) or (H, W, 3), each `inches` wide under its label, in one file.

    `bar` adds a colour bar; `style` goes to matplotlib's imshow. All are drawn into one axes: one for each image takes
    seconds to lay out.
    """
    lines = max([label.count("\n") + 1 for label in labels], default=1)
    height, width = np.shape(images[0])[:2] if len(images) else (28, 28)
    gap_x, gap_y = 0.15 * width / inches, (0.08 + 0.17 * lines) * width / inches
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(max(columns * (inches + 0.15), 5.5), rows * inches * (height + gap_y) / width + 0.6))
    figure.suptitle(title, y=1 - 0.15 / figure.get_figheight(), va="top", fontsize=11)
    axes = figure.add_axes((0.01, 0.01, 0.86 if bar else 0.98, 1 - 0.5 / figure.get_figheight()))
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        left, top = (number % columns) * (width + gap_x), (number // columns) * (height + gap_y)
        drawn = axes.imshow(image, extent=(left, left + width, top + height, top), interpolation="auto", **style)
        axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor="0.8", linewidth=0.5))
        axes.text(left + width / 2, top - 0.03 * width / inches, label, ha="center", va="bottom", fontsize=8)
    axes.set(xlim=(-gap_x, columns * (width + gap_x)), ylim=(rows * (height + gap_y), -gap_y), aspect="equal")
    axes.set_axis_off()
    if bar:
        figure.colorbar(drawn, cax=figure.add_axes((0.89, 0.1, 0.02, 0.7)))
    save(figure, path)


def training_digits(images: Tensor, labels: Tensor, classes: list[str], seed: int, path: Path) -> None:
    """Draw 24 random training digits; images uint8 (N, 1, 28, 28), labels (N,)."""
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:24]
    names = [classes[int(label)] for label in labels[chosen]]
    image_grid("24 random training digits with their labels", images[chosen, 0].numpy(), names, 6, path, **INK)


def learning_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], smoothed: bool = False) -> Figure:
    """Loss and accuracy by epoch, of training and, where there is one, validation.

    Args:
        histories: by a run's name, its rows, one an epoch: epoch, train/loss, train/accuracy, val/loss, val/accuracy.
        smoothed: whether training's loss is that of smoothed labels.
    """
    figure = Figure(figsize=(10, 4.3))  # with margins given: to find them, matplotlib would draw everything twice
    figure.subplots_adjust(0.08, 0.19, 0.98, 0.84, wspace=0.24)
    figure.suptitle("Learning curves")
    for axes, measure in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for number, (name, rows) in enumerate(histories.items()):
            for part, label, line in (("train", "training", ":"), ("val", "validation", "-")):
                values = [row.get(f"{part}/{measure}", np.nan) for row in rows]
                if not np.all(np.isnan(values)):
                    # Of several runs each has a colour; of one, each part.
                    style = {"color": f"C{number}", "linestyle": line} if len(histories) > 1 else {}
                    epochs = [row["epoch"] for row in rows]
                    axes.plot(epochs, values, marker="o", label=f"{name} {label}".strip(), **style)
        loss = "cross entropy" + (" (training: of smoothed labels)" if smoothed else "")
        axes.set(xlabel="epoch", ylabel=loss if measure == "loss" else measure, title=measure)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8 if len(histories) > 1 else None)
        if measure == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    note = "Training: the mean over an epoch while the weights change, with dropout and augmentation; "
    figure.text(0.5, 0.02, note + "validation: of the epoch's end, without them.", ha="center", fontsize=8, color="0.4")
    return figure


def confusion_matrix(confusion: NDArray[np.int64], classes: list[str], title: str, path: Path) -> None:
    """Draw counts (classes, classes) of expected × predicted; only mistakes are coloured, so that they stand out."""
    long = max(map(len, classes)) > 3
    side = max(7.5, 0.32 * len(classes))
    figure = Figure(figsize=(side, side - 0.5))
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
    axes.set(xlabel="predicted (red: mistakes, the darker the more)", ylabel="expected", title=title)
    save(figure, path)


def incorrect_digits(images: Tensor, labels: Tensor, logits: Tensor, classes: list[str], path: Path) -> None:
    """Draw the 24 digits of which the network was most wrongly sure: prediction (p) and expectation (e), how probable.

    Images uint8 (N, 1, 28, 28), labels (N,), logits (N, classes).
    """
    probabilities = logits.softmax(1)
    sure, predicted = probabilities.max(1)
    incorrect = (predicted != labels).nonzero().flatten()
    first = incorrect[sure[incorrect].argsort(descending=True, stable=True)][:24].tolist()

    def probable(index: int, label: int) -> str:
        return f"{classes[label]} {probabilities[index, label]:.0%}"

    names = [f"index {i}\np: {probable(i, int(predicted[i]))}\ne: {probable(i, int(labels[i]))}" for i in first]
    title = f"{len(first)} of {len(incorrect)} incorrect digits, most sure first (p: predicted, e: expected)"
    image_grid(title if first else "No incorrect digit", [images[i, 0].numpy() for i in first], names, 6, path, **INK)


def evaluation_plots(
    folder: Path, images: Tensor, labels: Tensor, logits: Tensor, scores: Scores, classes: list[str]
) -> None:
    """Draw the confusion matrix and incorrect digits; images uint8 (N, 1, 28, 28), labels (N,), logits (N, classes)."""
    title = f"Confusion matrix, {len(labels):,} digits, accuracy {scores.accuracy:.2%}"
    confusion_matrix(scores.confusion, classes, title, folder / "confusion_matrix.png")
    incorrect_digits(images, labels, logits, classes, folder / "incorrect_digits.png")


def run_plots(
    folder: Path,
    network: ConvNet,
    data: MNISTDataModule,
    history: Sequence[Mapping[str, float]],
    logits: Tensor | None,
    scores: Scores | None,
    smoothed: bool,
) -> None:
    """A run's pictures; without the test's `logits` (N, 10) and `scores`, those of the training alone."""
    training_digits(data.train.images, data.train.labels, data.classes, data.seed, folder / "training_digits.png")
    save(learning_curves({"": history}, smoothed), folder / "learning_curves.png")
    first_weights(network, folder / "first_weights.png")
    if logits is None or scores is None:
        return
    feature_maps(network, data.test.images[0], data.classes[int(data.test.labels[0])], folder)
    evaluation_plots(folder, data.test.images, data.test.labels, logits, scores, data.classes)


def prediction_grid(pictures: Sequence[tuple[Any, Any, str]], left_out: int, path: Path) -> None:
    """Draw each picture uint8 (112, 112, 3) beside the digit uint8 (28, 28) that the network saw, under its text; where
    that is None, pictures uint8 (600, 800, 3) alone.

    The title says how many pictures are `left_out`.
    """
    panels = [
        picture
        if digit is None
        else np.hstack([picture, np.repeat(np.kron(255 - digit, np.ones((4, 4), np.uint8))[..., None], 3, 2)])
        for picture, digit, _ in pictures
    ]
    texts = [text for *_, text in pictures]
    more = f" ({left_out:,} more are not drawn)" if left_out else ""
    several = bool(pictures) and pictures[0][1] is None
    title = f"Pictures, and {'the digits in them' if several else 'what the network saw of them'}{more}"
    columns, inches = (min(2, len(panels)), 7.0) if several else (4, 1.8)
    image_grid(title, panels, texts, columns, path, inches=inches)


def probability_bars(picture: Any, digit: NDArray[np.uint8], probabilities: Any, classes: list[str]) -> Figure:
    """A picture, the digit uint8 (28, 28) that the network saw of it, and the probabilities (classes,) as bars."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.4))
    left.imshow(visible_pixels(picture).astype(np.uint8).squeeze(), cmap="gray", vmin=0, vmax=255)
    left.set(title="picture")
    middle.imshow(digit, **INK)
    middle.set(title="what the network saw")
    for axes in (left, middle):
        axes.set_axis_off()
    right.barh(classes, probabilities, color=["C1" if each == max(probabilities) else "C0" for each in probabilities])
    right.set(title="probability", xlim=(0, 1))
    right.invert_yaxis()
    right.xaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def first_weights(network: ConvNet, path: Path) -> None:
    """Draw the kernels of the first convolution, or else the weights of the first layer as 28×28, 64 at most."""
    layer = next(m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear))
    first = layer.weight.detach().float().cpu()[:64]
    dense = first.ndim == 2
    weights = (first.view(-1, 28, 28) if dense else first[:, 0]).numpy()
    what, each = ("Weights of the first layer", "unit") if dense else ("Kernels of the first convolution", "filter")
    bound = float(np.abs(weights).max()) or 1.0
    count, size = len(layer.weight), "×".join(map(str, weights.shape[1:]))
    shown = f"{count}" if count == len(weights) else f"the first {len(weights)} of {count}"
    names = [f"{each} {number}" for number in range(1, len(weights) + 1)]
    title = f"{what}: {shown}, of {size}"
    image_grid(title, weights, names, 8, path, bar=True, cmap="RdBu_r", vmin=-bound, vmax=bound)


def feature_maps(network: ConvNet, image: Tensor, label: str, folder: Path) -> None:
    """Draw the output of each block beside the digit, uint8 (1, 28, 28): feature_maps_1.png and so on in `folder`."""
    for number, maps in enumerate(network.feature_maps(image.unsqueeze(0)), start=1):
        shown = maps[0, :64].cpu().numpy()
        count, size = maps.shape[1], "×".join(map(str, shown.shape[1:]))
        part = f"{count} maps" if count == len(shown) else f"the first {len(shown)} of {count} maps"
        which = "after the activation, before pooling"
        title = f"Block {number}: {part} of {size}, {which}; dark is strong, each map scaled alone"
        digit = image[0].numpy().astype(np.float32)
        images = [digit, *shown]
        names = [f"digit {label}", *(f"filter {index}" for index in range(1, len(shown) + 1))]
        image_grid(title, images, names, 9, folder / f"feature_maps_{number}.png", cmap="gray_r", vmin=0)

"""`Classifier`: pictures in, labels and probabilities out, from one checkpoint or the mean of several."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mnist_cnn.config.schema import UserError
from mnist_cnn.data.datasets import ACCELERATOR_BATCH, CPU_BATCH
from mnist_cnn.inference.members import Member, load_member
from mnist_cnn.models.checkpoint import Description, trust
from mnist_cnn.models.convnet import ConvNet
from mnist_cnn.models.device import find_device
from mnist_cnn.pictures.digit_image import readings_for
from mnist_cnn.pictures.image_files import read_picture
from mnist_cnn.pictures.ink import NOISE
from mnist_cnn.pictures.several import Box, best_reading, find_candidates

Picture = str | Path | Image.Image | NDArray[np.generic] | Tensor
Pictures = Picture | Sequence[Picture]
LIKELY = 0.5  # an answer of a lower probability is none


class Digit(NamedTuple):
    """A digit that was found in a picture, its box there, and what the network saw of it, uint8 (28, 28)."""

    label: str
    probability: float
    unsure: bool
    box: Box
    image: NDArray[np.uint8]

    def __repr__(self) -> str:
        return f"Digit({self.label}, {self.probability:.4f}{', unsure' * self.unsure}, at {self.box})"


class Classifier:
    """Trained networks, ready to classify; made by `load_classifier`."""

    def __init__(self, members: Sequence[Member], device: torch.device, tta: int = 1) -> None:
        self.members, self.device, self.tta = list(members), device, tta

    @property
    def description(self) -> Description:
        """What the first checkpoint says of itself: its architecture, classes, data and history."""
        return self.members[0].description

    @property
    def classes(self) -> list[str]:
        return self.description.classes

    @property
    def unsure_below(self) -> float:
        """The probability below which an answer is no answer: `mnist-evaluate calibrate=true` finds it; else 0.5."""
        return max(member.description.unsure_below or LIKELY for member in self.members)

    @property
    def network(self) -> ConvNet:
        """The first network, for those who want its weights; an .onnx file has none."""
        assert self.members[0].network is not None
        return self.members[0].network

    def logits(self, images: Tensor) -> Tensor:
        """Images uint8 (N, 1, 28, 28) in MNIST's form to logits float32 (N, classes) on the CPU, after the temperature.

        Of several networks, or with test-time augmentation, they are the logarithms of the mean of the probabilities.
        """
        return mean_logits(self.member_logits(images))

    @torch.inference_mode()
    def member_logits(self, images: Tensor) -> Tensor:
        """The logits of each network for each shift, float32 (networks · tta, N, classes); otherwise as `logits`."""
        size = CPU_BATCH if self.device.type == "cpu" else ACCELERATOR_BATCH
        batches = [self._batch(batch.to(self.device)).float().cpu() for batch in images.split(size)]
        return torch.cat(batches, 1) if len(images) else torch.empty(1, 0, len(self.classes))

    def _batch(self, images: Tensor) -> Tensor:
        copies = shifted(images, self.tta)
        return torch.stack([member.logits(copy) for member in self.members for copy in copies])

    def probabilities(self, pictures: Pictures, mode: Literal["any", "exact"] = "any") -> NDArray[np.float32]:
        """Pictures to probabilities float32 (N, classes), one row each, each row summing to 1.

        Args:
            pictures: one or a list of paths, PIL images and arrays (H, W); or a numpy or torch array (H, W),
                (N, H, W) or (N, 1, 28, 28), numbers in 0–255, or in 0–1 where they are floats. uint8 28×28 in
                MNIST's form is taken as it is; all else is seen as the one of its `readings` that the network is
                surest of. Where the network was trained on other data than MNIST, any uint8 28×28 is taken as it is.
            mode: exact takes uint8 28×28 only, all of it as it is.

        Raises:
            UserError: a picture cannot be read, is blank or is noise; the message names it.
        """
        return self._seen(pictures, mode)[1]

    def predict(self, pictures: Pictures, mode: Literal["any", "exact"] = "any") -> list[str]:
        """The most probable class of each picture, by name; arguments and errors as for `probabilities`."""
        return [self.classes[index] for index in self.probabilities(pictures, mode).argmax(1)]

    def top_k(self, pictures: Pictures, k: int = 3) -> list[list[tuple[str, float]]]:
        """The k most probable classes of each picture with their probabilities, the most probable first."""
        return [
            [(self.classes[index], float(row[index])) for index in row.argsort()[::-1][:k]]
            for row in self.probabilities(pictures)
        ]

    def read(self, picture: Picture) -> list[Digit]:
        """The digits of a picture of several, or of one, left to right and line by line; errors as of `predict`."""
        candidates = find_candidates(_opened(picture))
        forms, boxes = zip(*((one.image, one.box) for one in candidates if one.image is not None), strict=True)
        images, probabilities = self.surest([[form] for form in forms])
        found = best_reading(candidates, probabilities)
        if self.description.unsure_below and probabilities[found].max() < LIKELY:  # the paper's grain
            raise UserError(NOISE)
        return [
            Digit(
                self.classes[row.argmax()], float(row.max()), bool(row.max() < self.unsure_below), boxes[index], image
            )
            for index, image, row in zip(found, images[found, 0], probabilities[found], strict=True)
        ]

    def feature_maps(self, picture: Picture) -> list[NDArray[np.float32]]:
        """What each block of the first network finds in a picture: (filters, height, width) a block, after relu."""
        return [maps[0].cpu().numpy() for maps in self.network.feature_maps(torch.from_numpy(self._seen(picture)[0]))]

    def show(self, picture: Picture) -> Image.Image:
        """A picture beside what the network saw of it, and the probabilities as bars; a notebook shows it."""
        from mnist_cnn.inference.plots import png, probability_bars

        digits, probabilities = self._seen(picture)
        figure = probability_bars(_opened(picture), digits[0, 0], probabilities[0].tolist(), self.classes)
        return Image.open(io.BytesIO(png(figure)))

    def surest(self, pictures: Sequence[Sequence[NDArray[np.uint8]]]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Of each picture's readings, uint8 (28, 28), the one with the greatest probability of a class.

        Returns:
            the digits seen, uint8 (N, 1, 28, 28), and their probabilities, float32 (N, classes).
        """
        forms = [form for readings in pictures for form in readings]
        digits = np.stack(forms)[:, None] if forms else np.zeros((0, 1, 28, 28), np.uint8)
        probabilities = torch.softmax(self.logits(torch.from_numpy(digits)), dim=1).numpy()
        if len(forms) == len(pictures):
            return digits, probabilities
        sure, end = probabilities.max(1), np.cumsum([len(readings) for readings in pictures])
        best = [
            last - len(each) + sure[last - len(each) : last].argmax() for each, last in zip(pictures, end, strict=True)
        ]
        return digits[best], probabilities[best]

    def _seen(
        self, pictures: Pictures, mode: Literal["any", "exact"] = "any"
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        return self.surest(picture_readings(pictures, readings_for(self.description.data.name, mode)))


def mean_logits(logits: Tensor) -> Tensor:
    """Logits (M, N, classes) to the logarithms of the mean of the M probabilities; of one, the logits as they are."""
    return logits[0] if len(logits) == 1 else torch.softmax(logits, 2).mean(0).log()


def shifted(images: Tensor, tta: int) -> list[Tensor]:
    """The copies that test-time augmentation averages over, each (N, 1, H, W) as the images.

    1: the images alone; 5: also one pixel up, left, right and down; 9: the diagonal shifts too. Zeros come in.
    """
    if tta == 1:
        return [images]
    height, width = images.shape[-2:]
    padded = F.pad(images, (1, 1, 1, 1))
    steps = sorted(((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)), key=lambda step: abs(step[0]) + abs(step[1]))
    corners = [(1 + y, 1 + x) for y, x in steps[:tta]]
    return [padded[..., top : top + height, left : left + width].contiguous() for top, left in corners]


def picture_readings(
    pictures: Pictures, read: Callable[[Any], list[NDArray[np.uint8]]]
) -> list[list[NDArray[np.uint8]]]:
    """Pictures, as `Classifier.probabilities` takes them, to the readings of each by `read`, uint8 (28, 28).

    Raises:
        UserError: an array has another number of dimensions, or a picture cannot be read; the message names it.
    """
    if isinstance(pictures, Tensor):
        pictures = pictures.detach().cpu().numpy()
    if isinstance(pictures, np.ndarray):
        if pictures.ndim == 4 and pictures.shape[1] == 1:
            pictures = pictures[:, 0]
        if pictures.ndim not in (2, 3):
            shape = pictures.shape
            raise UserError(f"pictures have shape {shape}: expected (H, W), (N, H, W) or (N, 1, 28, 28)")
        each: Sequence[Picture] = [pictures] if pictures.ndim == 2 else list(pictures)
    elif isinstance(pictures, str | Path | Image.Image):
        each = [pictures]
    else:
        each = pictures
    readings = []
    for index, picture in enumerate(each):
        try:
            readings.append(read(_opened(picture)))
        except UserError as error:
            name = str(picture) if isinstance(picture, str | Path) else f"picture {index}"
            raise UserError(f"{name}: {error}") from None
    return readings


def _opened(picture: Picture) -> Image.Image | NDArray[Any]:
    if isinstance(picture, str | Path):
        return read_picture(Path(picture))
    if isinstance(picture, Tensor):
        picture = picture.detach().cpu().numpy()
    if isinstance(picture, np.ndarray) and picture.ndim == 3 and picture.shape[0] == 1:
        picture = picture[0]
    if not isinstance(picture, Image.Image | np.ndarray):
        raise UserError(f"{type(picture).__name__} is no picture: give a path, a PIL image or an array")
    return picture


def load_classifier(
    path: str | Path | Sequence[str | Path] = "pretrained",
    device: str = "auto",
    tta: Literal[1, 5, 9] = 1,
    modules: Sequence[str] = (),
) -> Classifier:
    """A checkpoint to a `Classifier` on `device` (auto, cpu, cuda, mps).

    Args:
        path: `pretrained`, the network that comes along; a .ckpt file, a run's folder (its best), an exported .onnx
            or .safetensors file; or a list of them, whose probabilities are averaged.
        tta: test-time augmentation. 5: probabilities are averaged over a digit and its shifts by one pixel; 9: the
            diagonal ones too.
        modules: Python modules of your own that layers of the networks come from.

    Raises:
        UserError: a checkpoint cannot be read, they have different classes, or there is no such device.
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    if not paths:
        raise UserError("checkpoint=[] names no checkpoint")
    trust(modules)
    torch_device = find_device(device)
    members = [load_member(each, torch_device) for each in paths]
    for each, member in zip(paths, members, strict=True):
        if member.description.classes != members[0].description.classes:
            raise UserError(f"{each} has other classes than {paths[0]}: they cannot predict together")
    return Classifier(members, torch_device, tta)

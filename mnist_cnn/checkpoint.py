"""Checkpoints that rebuild themselves: read without running anything they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from mnist_cnn.architectures import ConvNet
from mnist_cnn.config import Share
from mnist_cnn.schema import Strict, UserError, validated
from mnist_cnn.specification import Architecture

FORMAT = 1


class TrainedOn(Strict):
    """Which data a checkpoint saw, so that its validation digits can be found again."""

    name: Literal["mnist", "fashion_mnist", "kmnist", "digits"]
    validation: Share
    validation_from: Literal["last", "random"]
    normalization: Literal["unit", "standard"]
    seed: int


class Description(Strict):
    """What a checkpoint says of itself, beside the weights: numbers, strings, lists and dicts."""

    format: int
    architecture: Architecture
    classes: list[str] = Field(min_length=2, max_length=1000)
    data: TrainedOn
    versions: dict[str, str]
    history: list[dict[str, float]] = Field(default_factory=list)


class Classifier:
    """A trained network, ready to classify; made by `load_classifier`."""

    def __init__(self, network: ConvNet, description: Description, device: torch.device) -> None:
        self.network = network.to(device).eval()
        self.description = description
        self.device = device

    @property
    def classes(self) -> list[str]:
        return self.description.classes

    @torch.inference_mode()
    def logits(self, images: Tensor, batch_size: int = 500) -> Tensor:
        """Images uint8 (N, 1, 28, 28) in MNIST's form to logits float32 (N, classes) on the CPU."""
        parts = [self.network(part.to(self.device)).float().cpu() for part in images.split(batch_size)]
        return torch.cat(parts) if parts else torch.empty(0, len(self.classes))

    def probabilities(self, images: Tensor | NDArray[np.uint8]) -> NDArray[np.float32]:
        """Images uint8 (H, W), (N, H, W) or (N, 1, H, W) of 28×28 to probabilities float32 (N, classes)."""
        digits = torch.as_tensor(np.array(images) if isinstance(images, np.ndarray) else images)
        if digits.shape[-2:] != (28, 28) or digits.dtype != torch.uint8:
            raise UserError(f"images have shape {tuple(digits.shape)}, {digits.dtype}: expected uint8 (N, 28, 28)")
        return torch.softmax(self.logits(digits.reshape(-1, 1, 28, 28)), dim=1).numpy()

    def predict(self, images: Tensor | NDArray[np.uint8]) -> list[str]:
        """The most probable class of each image, by name; images as for `probabilities`."""
        return [self.classes[index] for index in self.probabilities(images).argmax(1)]


def find_checkpoint(path: str | Path) -> Path:
    """A `.ckpt` file as it is, or the best checkpoint of a run's folder."""
    path = Path(path)
    if path.is_dir():
        best = path / "checkpoints" / "best.ckpt"
        if not best.is_file():
            raise UserError(f"{path} has no checkpoints/best.ckpt: give a run's folder or a .ckpt file")
        return best
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: give a .ckpt file or a run's folder")
    return path


def read_checkpoint(path: str | Path) -> tuple[dict[str, Any], Description]:
    """The checkpoint's content and its own description, validated; nothing in the file is executed.

    Raises:
        UserError: the file is missing, is cut short, is no checkpoint, or comes from another program.
    """
    path = find_checkpoint(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch.load has no one error for a bad file
        first = str(error).strip().splitlines()
        reason = first[0].split(".")[0] if first else type(error).__name__
        raise UserError(f"{path} is not a whole checkpoint of this package and was not loaded ({reason})") from None
    if not isinstance(content, dict) or not isinstance(content.get("mnist_cnn"), dict) or "state_dict" not in content:
        raise UserError(f"{path} comes from another program: it has no description of an mnist_cnn network")
    found = content["mnist_cnn"].get("format")
    if found != FORMAT:
        raise UserError(f"{path} has format {found!r}; this version reads format {FORMAT}: install a newer mnist-cnn")
    try:
        return content, validated(Description, content["mnist_cnn"])
    except UserError as error:
        raise UserError(f"{path} describes no network that can be built: {error}") from None


def rebuild(path: str | Path) -> tuple[ConvNet, Description]:
    """The network that a checkpoint describes, with its weights and normalisation figures, on the CPU."""
    content, description = read_checkpoint(path)
    network = ConvNet(description.architecture, len(description.classes))
    weights = {name.removeprefix("network."): value for name, value in content["state_dict"].items()}
    try:
        network.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path}: its weights do not fit the network that it describes ({reason})") from None
    return network, description


def load_classifier(path: str | Path, device: str = "auto") -> Classifier:
    """A checkpoint file or a run's folder (its best) to a `Classifier` on `device` (auto, cpu, cuda).

    Raises:
        UserError: the checkpoint cannot be read, or there is no such device.
    """
    network, description = rebuild(path)
    return Classifier(network, description, find_device(device))


def find_device(name: str) -> torch.device:
    """auto takes CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("accelerator=cuda: torch finds no CUDA device here; use accelerator=cpu or accelerator=auto")
    return torch.device(name)

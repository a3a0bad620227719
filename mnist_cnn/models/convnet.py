"""`ConvNet`: every network of this package, built from a plain specification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_cnn.config.architecture import Architecture, Block, Dense
from mnist_cnn.config.schema import UserError, validated


class ConvNet(nn.Module):
    """Raw digits in, logits out; the normalisation figures are buffers and travel with the weights.

    Args:
        specification: an `Architecture`, or a mapping with `blocks` and `dense` (see conf/architecture).
        classes: length of the logits.
        mean, std: of the pixels, in units of 0–255; (0, 255) divides by 255.

    Attributes:
        onednn: let training on a CPU keep oneDNN's own layout from layer to layer. It is the same function, rounded
            differently, and up to a third faster: oneDNN's pooling and matrix products are quicker than torch's.

    Raises:
        UserError: the specification cannot be built.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        specification: Architecture | Mapping[str, Any],
        classes: int = 10,
        mean: float = 0.0,
        std: float = 255.0,
    ) -> None:
        super().__init__()
        if not isinstance(specification, Architecture):
            specification = validated(Architecture, specification)
        self.specification = specification
        self.onednn = False
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

        channels = [1, *(block.filters for block in specification.blocks)]
        self.blocks = nn.Sequential(*map(_block, channels, specification.blocks))
        flat = next(row.output[0] for row in specification.layers() if row.name == "flatten")
        features = [flat, *(dense.units for dense in specification.dense)]
        self.dense = nn.Sequential(*map(_dense_layer, features, specification.dense))
        self.logits = nn.Linear(features[-1], classes)

        if specification.initialization == "keras":
            self.apply(_glorot_uniform)
        # Convolutions are 1.8 times faster on a CPU with the channels last, and flatten then keeps Keras's order.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 or float (N, 1, 28, 28), pixels 0–255, to logits float (N, classes)."""
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        onednn = self.onednn and self._in_onednn(x)
        x = self.blocks(x.to_mkldnn() if onednn else x.contiguous(memory_format=torch.channels_last))
        x = _dense_layout(x)  # (N, filters, height, width)
        x = x.permute(0, 2, 3, 1).flatten(1)  # (N, height·width·filters), the channels last as in Keras
        x = self.dense(x.to_mkldnn() if onednn else x)
        return self.logits(_dense_layout(x))

    def _in_onednn(self, x: Tensor) -> bool:
        """Whether oneDNN can train this network in its own layout: in float32 on a CPU, and without batch norm."""
        return (
            self.training
            and x.device.type == "cpu"
            and x.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and not torch.is_autocast_enabled("cpu")
            and not any(block.batch_norm for block in self.specification.blocks)
        )

    @torch.inference_mode()
    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """What each block's filters find, after relu and before pooling: float (N, filters, height, width).

        Images as of `forward`, of a network in evaluation mode.
        """
        x = (images.to(self.mean.device, self.mean.dtype) - self.mean) / self.std
        maps = []
        for layers, block in zip(self.blocks, self.specification.blocks, strict=True):
            convolved = 2 if block.batch_norm else 1  # layers before pooling and relu
            x = layers[:convolved](x)  # type: ignore[index]
            maps.append(torch.relu(x).float())
            x = layers[convolved:](x)  # type: ignore[index]
        return maps

    def replace_logits(self, classes: int) -> None:
        """A new last layer, for other classes."""
        self.logits = nn.Linear(self.logits.in_features, classes)
        if self.specification.initialization == "keras":
            _glorot_uniform(self.logits)

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


class Dropout(nn.Module):
    """Dropout whose masks on a CPU take 8 random bits an element, or 16: a tenth of the time of torch's.

    8 are enough where the fraction kept is a multiple of 1/256, as for 0.25 and 0.5; 16 round it to a multiple of
    1/65,536, and the scale is of that fraction. nn.Dropout makes an epoch of conv32_32_dropout longer
    (scripts/benchmark dropout).

    Args:
        p: the fraction of elements set to zero in training.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.bits = 8 if (256 * p).is_integer() else 16
        self.kept = min(max(round((1 - p) * 2**self.bits), 1), 2**self.bits - 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        x = _dense_layout(x)
        words = torch.empty(-(-x.numel() * self.bits // 64), dtype=torch.int64).random_(-(2**63), None)
        numbers = words.view(torch.int8 if self.bits == 8 else torch.int16)
        numbers = numbers[: x.numel()].as_strided(x.size(), x.stride())
        kept = numbers < self.kept - 2 ** (self.bits - 1)
        return x * kept.to(x.dtype).mul_(2**self.bits / self.kept)


def _dense_layout(x: Tensor) -> Tensor:
    return x.to_dense() if x.is_mkldnn else x


def _block(channels: int, block: Block) -> nn.Sequential:
    convolution = nn.Conv2d(channels, block.filters, block.kernel, block.stride, block.padding, bias=block.bias)
    layers: list[nn.Module] = [convolution]
    if block.batch_norm:
        layers.append(nn.BatchNorm2d(block.filters))
    # Pooling before relu is the same function, as both keep the order of numbers, and relu then has less to do.
    if block.pool is not None:
        layers.append(nn.MaxPool2d(block.pool))
    layers.append(nn.ReLU(inplace=block.pool is None))  # oneDNN's pooling wants its output again
    if block.dropout:
        layers.append(Dropout(block.dropout))
    return nn.Sequential(*layers)


def _dense_layer(features: int, dense: Dense) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(features, dense.units), nn.ReLU(inplace=True)]
    if dense.dropout:
        layers.append(Dropout(dense.dropout))
    return nn.Sequential(*layers)


def _glorot_uniform(module: nn.Module) -> None:
    """Keras's defaults: uniform in ±√(6 / (fan-in + fan-out)), biases zero (Glorot and Bengio, 2010)."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def find_device(name: str) -> torch.device:
    """The device that `name` (auto, cpu, cuda) means here; auto takes CUDA where there is one.

    Raises:
        UserError: there is no CUDA device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("accelerator=cuda: torch finds no CUDA device here; use accelerator=cpu or accelerator=auto")
    return torch.device(name)


def summary(specification: Architecture, classes: int) -> str:
    """A table of layers, output shapes (height, width, filters) and parameters, with their total."""
    rows = specification.layers(classes)
    lines = [f"{'layer':<20}{'output shape':<18}{'parameters':>11}"]
    lines += [f"{row.name:<20}{row.output!s:<18}{row.parameters:>11,}" for row in rows]
    return "\n".join([*lines, f"{'total':<38}{sum(row.parameters for row in rows):>11,}"])

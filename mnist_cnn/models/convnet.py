"""`ConvNet`: every network of this package, built from a plain specification."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_cnn.config.architecture import Architecture, Block, Dense, Layer
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
        self.blocks = nn.Sequential(*map(_block, channels, specification.whole_blocks()))
        flat = next(row.output[0] for row in specification.layers() if row.name == "flatten")
        features = [flat, *(dense.units for dense in specification.dense)]
        self.dense = nn.Sequential(*map(_dense_layer, features, specification.whole_dense()))
        self.logits = nn.Linear(features[-1], classes)

        self._plain = all(isinstance(part, PLAIN) for part in [*self.blocks.modules(), *self.dense.modules()])
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
        """Whether oneDNN can train this network in its own layout: in float32 on a CPU, with plain layers only."""
        return (
            self.training
            and x.device.type == "cpu"
            and x.dtype == torch.float32
            and not x.requires_grad  # its first layer finds no gradient of the pixels
            and torch.backends.mkldnn.is_available()
            and not torch.is_autocast_enabled("cpu")
            and self._plain
        )

    @torch.inference_mode()
    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """What each block's filters find, after the activation and before pooling: float (N, filters, height, width).

        Images as of `forward`, of a network in evaluation mode.
        """
        x = (images.to(self.mean.device, self.mean.dtype) - self.mean) / self.std
        maps = []
        for block in self.blocks.children():
            layers = list(block.children())
            pool = next((i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d)), None)
            for layer in layers[:pool]:
                x = layer(x)
            rest = [] if pool is None else layers[pool:]
            after = len(rest) > 1 and isinstance(rest[1], nn.ReLU)  # pooling stands before relu: see _block
            maps.append((torch.relu(x) if after else x).float())
            for layer in rest:
                x = layer(x)
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

    def extra_repr(self) -> str:
        return f"p={self.p}"

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


class OneChannelConv2d(nn.Conv2d):
    """A convolution of images, which in oneDNN's own layout has a weight gradient of ours: a matrix product an image.

    oneDNN's takes three to five times as long there for a single channel, a third of a training step of conv10.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_mkldnn:
            return super().forward(input)
        output: Tensor = _OneChannelConvolution.apply(input, self.weight, self.bias, self.stride[0], self.padding[0])
        return output


class _OneChannelConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kernel, ctx.stride, ctx.padding = weight.shape[-1], stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x = F.pad(ctx.saved_tensors[0].to_dense(), (ctx.padding,) * 4)
        windows = x.unfold(2, ctx.kernel, ctx.stride).unfold(3, ctx.kernel, ctx.stride)  # (N, 1, h, w, kernel, kernel)
        windows = windows.permute(0, 4, 5, 1, 2, 3).flatten(3).flatten(1, 2)  # (N, kernel², h·w)
        gradient = gradient.to_dense().flatten(2)  # (N, filters, h·w)
        weights = torch.bmm(windows, gradient.transpose(1, 2)).sum(0)  # (kernel², filters)
        bias = gradient.sum((0, 2)) if ctx.needs_input_grad[2] else None
        return None, weights.t().reshape(-1, 1, ctx.kernel, ctx.kernel), bias, None, None


def _dense_layout(x: Tensor) -> Tensor:
    return x.to_dense() if x.is_mkldnn else x


PLAIN = (nn.Conv2d, nn.MaxPool2d, nn.Linear, nn.ReLU, Dropout, nn.Sequential)  # oneDNN has them in its own layout
ACTIVATION_CLASSES: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class Residual(nn.Module):
    """Layers, and their input added to what comes out; a 1×1 convolution brings it to that shape where it differs."""

    def __init__(self, layers: nn.Sequential, channels: int, block: Block) -> None:
        super().__init__()
        self.layers = layers
        projected = block.projects(channels)
        self.shortcut = nn.Conv2d(channels, block.filters, 1, block.stride, bias=False) if projected else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.shortcut(x)


def _block(channels: int, block: Block) -> nn.Sequential:
    layers: list[nn.Module] = [_convolution(channels, block)]
    if block.batch_norm is True:
        layers.append(nn.BatchNorm2d(block.filters))
    if block.residual:
        layers = [Residual(nn.Sequential(*layers), channels, block)]
    rest: list[nn.Module] = [nn.BatchNorm2d(block.filters)] if block.batch_norm == "after" else []
    if block.layer is not None:
        rest.append(_own(block.layer, block.filters))
    pool = [(nn.AvgPool2d if block.pooling == "avg" else nn.MaxPool2d)(block.pool)] if block.pool is not None else []
    if pool and not rest and block.activation == "relu" and block.pooling != "avg":
        # Pooling before relu is the same function, as both keep the order of numbers, and relu then has less to do.
        layers += [*pool, nn.ReLU()]  # not in place: oneDNN's pooling wants its output again
    else:
        layers += [_activation(block.activation), *rest, *pool]
    if block.batch_norm == "last":
        layers.append(nn.BatchNorm2d(block.filters))
    if block.dropout:
        layers.append(Dropout(block.dropout))
    return nn.Sequential(*layers)


def _convolution(channels: int, block: Block) -> nn.Module:
    size = (block.kernel, block.stride, block.padding)
    if not block.separable:
        kind = OneChannelConv2d if channels == 1 else nn.Conv2d
        return kind(channels, block.filters, *size, bias=block.bias)
    each = nn.Conv2d(channels, channels, *size, groups=channels, bias=False)
    return nn.Sequential(each, nn.Conv2d(channels, block.filters, 1, bias=block.bias))


def _dense_layer(features: int, dense: Dense) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(features, dense.units), _activation(dense.activation)]
    if dense.dropout:
        layers.append(Dropout(dense.dropout))
    return nn.Sequential(*layers)


def _activation(activation: Any) -> nn.Module:
    return ACTIVATION_CLASSES[activation]() if isinstance(activation, str) else _own(activation)


def _own(own: Mapping[str, Any], *arguments: Any) -> nn.Module:
    """A module of the user's own, made by its `_target_`.

    Raises:
        UserError: it cannot be made.
    """
    module, _, name = own["_target_"].rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
        made: nn.Module = kind(*arguments, **{key: value for key, value in own.items() if key != "_target_"})
    except Exception as error:  # whatever the user's code raises
        raise UserError(f"{module}.{name} cannot be made ({type(error).__name__}: {error})") from None
    return made


def _glorot_uniform(module: nn.Module) -> None:
    """Keras's defaults: uniform in ±√(6 / (fan-in + fan-out)), biases zero (Glorot and Bengio, 2010)."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def summary(network: ConvNet) -> str:
    """A table of layers, output shapes (height, width, filters) and parameters, with their total."""
    rows = network.specification.layers(network.logits.out_features)
    total = network.parameter_count()
    if own := total - sum(row.parameters for row in rows):
        rows.append(Layer("layers of your own", (), own))
    lines = [f"{'layer':<26}{'output shape':<16}{'parameters':>11}"]
    lines += [f"{row.name:<26}{row.output or ''!s:<16}{row.parameters:>11,}" for row in rows]
    return "\n".join([*lines, f"{'total':<42}{total:>11,}"])

"""A network's plain specification: what a command line changes and a checkpoint carries. Imports no torch."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from mnist_cnn.config.schema import Strict, explain, nearest

IMAGE_SIZE = 28
MAXIMUM_PARAMETERS = 100_000_000


class Layer(NamedTuple):
    """A row of the summary: output is (height, width, filters) or (units,), without the batch."""

    name: str
    output: tuple[int, ...]
    parameters: int


DOTTED = r"\w+(\.\w+)+"  # module.name, of the user's own
ACTIVATIONS = ("relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid")
Own = dict[str, Any]  # a torch module of the user's own: `_target_`, and arguments by name


def _own(value: Any) -> Any:
    target = value.get("_target_") if isinstance(value, dict) else None
    if not isinstance(target, str) or not re.fullmatch(DOTTED, target):
        raise ValueError(f"{value!r:.100}: must be a mapping such as {{_target_: my_layers.MyLayer}}")
    return value


def _activation(value: Any) -> Any:
    if isinstance(value, str):
        if value not in ACTIVATIONS:
            raise ValueError(
                f"activation={value}: expected one of {', '.join(ACTIVATIONS)}{nearest(value, ACTIVATIONS)}, "
                "or one of your own as {_target_: my_layers.MyActivation}"
            )
        return value
    return _own(value)


Activation = Annotated[str | Own, BeforeValidator(_activation)]
Pooling = Literal["max", "avg"]


class Block(Strict):
    """conv → (norm) → (+ input) → activation → (norm "after") → (own layer) → (pool) → (norm "last") → (dropout)."""

    filters: int = Field(ge=1, le=4096)
    kernel: int = Field(ge=1, le=IMAGE_SIZE)
    stride: int = Field(default=1, ge=1, le=IMAGE_SIZE)
    padding: int = Field(default=0, ge=0, le=IMAGE_SIZE // 2)
    bias: bool = True  # checkpoints of formats 1 and 2 have no such key, those before 4 none of those below with "4"
    separable: bool = False  # 4: a filter for each channel, then 1×1 across the channels (Chollet, 2017)
    residual: bool = False  # 4: the block's input is added before the activation (He et al., 2015)
    batch_norm: bool | Literal["after", "last"] = False  # 4: after the activation; 5: last, after the pooling
    activation: Activation | None = None  # 4: the architecture's
    layer: Annotated[Own, BeforeValidator(_own)] | None = None  # 4
    pool: int | None = Field(default=None, ge=1, le=IMAGE_SIZE)
    pooling: Pooling | None = None  # 4: the architecture's
    dropout: float = Field(default=0.0, ge=0, lt=1)

    def layers(self, number: int, shape: tuple[int, ...]) -> list[Layer]:
        """This block's rows for an input of `shape` (height, width, channels)."""
        size, _, channels = shape
        convolved = (size + 2 * self.padding - self.kernel) // self.stride + 1
        if self.kernel > size + 2 * self.padding:
            raise ValueError(f"kernel {self.kernel} is larger than its input of {size}×{size}")
        output = (convolved, convolved, self.filters)
        across = channels * self.filters + self.filters * self.bias
        if self.separable:
            rows = [Layer(f"separable convolution {number}", output, self.kernel**2 * channels + across)]
        else:
            weights = self.kernel**2 * channels * self.filters + self.filters * self.bias
            rows = [Layer(f"convolution {number}", output, weights)]
        if self.batch_norm in (True, "after"):
            rows.append(Layer(f"batch norm {number}", output, 2 * self.filters))
        if self.residual:
            if 2 * self.padding != self.kernel - 1:
                raise ValueError(
                    "residual needs an odd kernel, and padding that keeps the size: {kernel: 3, padding: 1}"
                )
            if self.projects(channels):
                rows.append(Layer(f"shortcut {number}", output, channels * self.filters))
        if self.pool is not None:
            if self.pool > convolved:
                raise ValueError(f"pool {self.pool} is larger than its input of {convolved}×{convolved}")
            output = (convolved // self.pool, convolved // self.pool, self.filters)
            rows.append(Layer(f"{'average' if self.pooling == 'avg' else 'max'} pool {number}", output, 0))
        if self.batch_norm == "last":
            rows.append(Layer(f"batch norm {number}", output, 2 * self.filters))
        if self.dropout:
            rows.append(Layer(f"dropout {number}", output, 0))
        return rows

    def projects(self, channels: int) -> bool:
        """Whether a residual block's input of so many channels needs a 1×1 convolution to have its output's shape."""
        return self.stride > 1 or channels != self.filters


class Dense(Strict):
    """linear → activation → (dropout)."""

    units: int = Field(ge=1, le=65536)
    activation: Activation | None = None  # the architecture's
    dropout: float = Field(default=0.0, ge=0, lt=1)


def _units(value: Any) -> Any:
    if isinstance(value, dict | Dense):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return {"units": value}
    raise ValueError(f"{value!r} must be a number of units such as 128, or {{units:128,dropout:0.5}}")


def _listed(value: Any) -> Any:
    """One dense layer needs no brackets."""
    return value if isinstance(value, list) else [value]


class Architecture(Strict):
    """A network's plain specification; `activation` and `pooling` are those of blocks and layers that name none."""

    blocks: list[Block] = Field(max_length=32)
    dense: Annotated[list[Annotated[Dense, BeforeValidator(_units)]], BeforeValidator(_listed)] = Field(max_length=32)
    activation: Activation = "relu"
    pooling: Pooling = "max"
    initialization: Literal["keras", "torch"] = "keras"

    @field_validator("blocks", mode="before")
    @classmethod
    def _buildable(cls, blocks: Any) -> Any:
        """Refuse what cannot be built, with the block's number and the shape at that point."""
        if not isinstance(blocks, list):
            raise ValueError(f"architecture.blocks={blocks!r}: must be a list such as [{{filters:32,kernel:3,pool:2}}]")
        shape: tuple[int, ...] = (IMAGE_SIZE, IMAGE_SIZE, 1)
        built: list[Block] = []
        for number, raw in enumerate(blocks, start=1):
            try:
                block = raw if isinstance(raw, Block) else Block.model_validate(raw)
                shape = block.layers(number, shape)[-1].output
            except ValueError as error:
                reason = explain(error) if isinstance(error, ValidationError) else str(error)
                at = "×".join(map(str, shape))
                raise ValueError(f"architecture block {number}, whose input is {at}: {reason}") from None
            built.append(block)
        return built

    @model_validator(mode="after")
    def _affordable(self) -> Architecture:
        if (count := sum(layer.parameters for layer in self.layers())) > MAXIMUM_PARAMETERS:
            raise ValueError(f"architecture has {count:,} parameters; at most {MAXIMUM_PARAMETERS:,} are allowed")
        return self

    def whole_blocks(self) -> list[Block]:
        """The blocks, each with the activation and the pooling that it has from the architecture."""
        whole = {"activation": self.activation, "pooling": self.pooling}
        return [
            block.model_copy(update={key: value for key, value in whole.items() if getattr(block, key) is None})
            for block in self.blocks
        ]

    def whole_dense(self) -> list[Dense]:
        """The dense layers, each with its activation."""
        return [each.model_copy(update={"activation": each.activation or self.activation}) for each in self.dense]

    def own_modules(self) -> set[str]:
        """The Python modules of the user's own that the network's layers come from."""
        parts = [*self.whole_blocks(), *self.whole_dense()]
        found = [getattr(part, key, None) for part in parts for key in ("activation", "layer")]
        return {own["_target_"].rpartition(".")[0] for own in found if isinstance(own, dict)}

    def layers(self, classes: int = 10) -> list[Layer]:
        """The summary's rows from the first convolution to the logits, without layers of the user's own."""
        rows: list[Layer] = []
        shape: tuple[int, ...] = (IMAGE_SIZE, IMAGE_SIZE, 1)
        for number, block in enumerate(self.whole_blocks(), start=1):
            rows += block.layers(number, shape)
            shape = rows[-1].output
        rows.append(Layer("flatten", (math.prod(shape),), 0))
        for number, dense in enumerate([*self.dense, Dense(units=classes)], start=1):
            features = rows[-1].output[0]
            rows.append(Layer(f"dense {number}", (dense.units,), (features + 1) * dense.units))
            if dense.dropout:
                rows.append(Layer(f"dropout, dense {number}", (dense.units,), 0))
        return rows

"""A network's plain specification: what a command line changes and a checkpoint carries. Imports no torch."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from mnist_cnn.config.schema import Strict, explain

IMAGE_SIZE = 28
MAXIMUM_PARAMETERS = 100_000_000


class Layer(NamedTuple):
    """A row of the summary: output is (height, width, filters) or (units,), without the batch."""

    name: str
    output: tuple[int, ...]
    parameters: int


class Block(Strict):
    """conv → (batch norm) → relu → (max pool) → (dropout)."""

    filters: int = Field(ge=1, le=4096)
    kernel: int = Field(ge=1, le=IMAGE_SIZE)
    stride: int = Field(default=1, ge=1, le=IMAGE_SIZE)
    padding: int = Field(default=0, ge=0, le=IMAGE_SIZE // 2)
    bias: bool = True  # checkpoints of formats 1 and 2 have no such key
    batch_norm: bool = False
    pool: int | None = Field(default=None, ge=1, le=IMAGE_SIZE)
    dropout: float = Field(default=0.0, ge=0, lt=1)

    def layers(self, number: int, shape: tuple[int, ...]) -> list[Layer]:
        """This block's rows for an input of `shape` (height, width, channels)."""
        size, _, channels = shape
        convolved = (size + 2 * self.padding - self.kernel) // self.stride + 1
        if self.kernel > size + 2 * self.padding:
            raise ValueError(f"kernel {self.kernel} is larger than its input of {size}×{size}")
        output = (convolved, convolved, self.filters)
        weights = self.kernel**2 * channels * self.filters + self.filters * self.bias
        rows = [Layer(f"convolution {number}", output, weights)]
        if self.batch_norm:
            rows.append(Layer(f"batch norm {number}", output, 2 * self.filters))
        if self.pool is not None:
            if self.pool > convolved:
                raise ValueError(f"pool {self.pool} is larger than its input of {convolved}×{convolved}")
            output = (convolved // self.pool, convolved // self.pool, self.filters)
            rows.append(Layer(f"max pool {number}", output, 0))
        if self.dropout:
            rows.append(Layer(f"dropout {number}", output, 0))
        return rows


class Dense(Strict):
    """linear → relu → (dropout)."""

    units: int = Field(ge=1, le=65536)
    dropout: float = Field(default=0.0, ge=0, lt=1)


def _units(value: Any) -> Any:
    if isinstance(value, dict | Dense):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return {"units": value}
    raise ValueError(f"{value!r} must be a number of units such as 128, or {{units:128,dropout:0.5}}")


class Architecture(Strict):
    """A network's plain specification: what a command line changes and a checkpoint carries."""

    blocks: list[Block] = Field(max_length=32)
    dense: list[Annotated[Dense, BeforeValidator(_units)]] = Field(max_length=32)
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

    def layers(self, classes: int = 10) -> list[Layer]:
        """The summary's rows from the first convolution to the logits."""
        rows: list[Layer] = []
        shape: tuple[int, ...] = (IMAGE_SIZE, IMAGE_SIZE, 1)
        for number, block in enumerate(self.blocks, start=1):
            rows += block.layers(number, shape)
            shape = rows[-1].output
        rows.append(Layer("flatten", (math.prod(shape),), 0))
        for number, dense in enumerate([*self.dense, Dense(units=classes)], start=1):
            features = rows[-1].output[0]
            rows.append(Layer(f"dense {number}", (dense.units,), (features + 1) * dense.units))
            if dense.dropout:
                rows.append(Layer(f"dropout, dense {number}", (dense.units,), 0))
        return rows

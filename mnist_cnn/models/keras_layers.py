"""Keras's layers and weights in terms of `ConvNet`. Imports neither Keras nor torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mnist_cnn.config.architecture import IMAGE_SIZE, Architecture
from mnist_cnn.config.schema import UserError, validated
from mnist_cnn.models.keras_file import Array, Layer, Weights, layers_of

EPSILON = 1e-5  # of torch's batch norm


class Converted(NamedTuple):
    specification: Architecture
    classes: int
    mean: float
    standard_deviation: float
    weights: dict[str, Array]  # by ConvNet's names, in torch's shapes


def converted(model: dict[str, Any], weights: Any, divide_by_255: bool) -> Converted:
    """A model's JSON and its h5 weights to a network.

    Raises:
        UserError: a layer is none of ConvNet's, or stands where ConvNet has none; the message names it.
    """
    reader = Reader(weights, divide_by_255)
    for layer in layers_of(model):
        reader.take(layer)
    return reader.finish()


class Reader:
    """Takes the layers in order; `stage` says what may follow: blocks, dense, then the end."""

    def __init__(self, weights: Any, divide_by_255: bool) -> None:
        self.file = Weights(weights)
        self.blocks: list[dict[str, Any]] = []
        self.dense: list[dict[str, Any]] = []
        self.weights: dict[str, Array] = {}
        self.mean, self.standard_deviation = 0.0, 255.0 if divide_by_255 else 1.0
        self.stage, self.channels = "blocks", 1
        self.linear = False  # the last convolution or dense layer waits for its relu

    def take(self, layer: Layer) -> None:
        handler = getattr(self, f"_take_{layer.kind}", None)
        if handler is None:
            raise UserError(f"layer {layer.name} is a {layer.kind:.60}, which ConvNet cannot express; it was not run")
        if self.stage == "end" and layer.kind not in ("Activation", "Softmax"):
            self._refuse(layer, "stands after the output")
        if layer.settings.get("data_format") == "channels_first":
            self._refuse(layer, "has data_format channels_first")
        handler(layer)

    def _refuse(self, layer: Layer, reason: str) -> None:
        raise UserError(f"layer {layer.name} ({layer.kind}) {reason}, which ConvNet cannot express")

    def _only(self, layer: Layer, **expected: Any) -> None:
        for key, value in expected.items():
            found = layer.settings.get(key, value)
            if (list(found) if isinstance(found, list | tuple) else found) != value:
                self._refuse(layer, f"has {key}={found!r:.60}")

    def _square(self, layer: Layer, key: str) -> int:
        value = layer.settings[key]
        sizes = [value] * 2 if isinstance(value, int) else list(value)
        if len(sizes) != 2 or sizes[0] != sizes[1] or type(sizes[0]) is not int:
            self._refuse(layer, f"has {key}={value!r:.60}")
        return int(sizes[0])

    def _take_InputLayer(self, layer: Layer) -> None:  # noqa: N802 — Keras's name
        shape = layer.settings.get("batch_shape") or layer.settings.get("batch_input_shape")
        if shape and list(shape)[1:] not in ([IMAGE_SIZE, IMAGE_SIZE, 1], [IMAGE_SIZE, IMAGE_SIZE], [IMAGE_SIZE**2]):
            self._refuse(layer, f"has the shape {shape!r:.60}")

    def _take_Reshape(self, layer: Layer) -> None:  # noqa: N802
        if self.blocks or self.stage != "blocks":
            self._refuse(layer, "stands after the first layer")
        self._only(layer, target_shape=[IMAGE_SIZE, IMAGE_SIZE, 1])

    def _take_Rescaling(self, layer: Layer) -> None:  # noqa: N802
        scale, offset = layer.settings["scale"], layer.settings["offset"]
        if self.blocks or self.stage != "blocks" or not all(type(v) in (int, float) for v in (scale, offset)):
            self._refuse(layer, "is no single scale and offset before the first layer")
        self.mean, self.standard_deviation = -offset / scale, 1 / scale

    def _take_Conv2D(self, layer: Layer) -> None:  # noqa: N802
        if self.stage != "blocks":
            self._refuse(layer, "stands after Flatten")
        self._settled(layer)
        self._only(layer, dilation_rate=[1, 1], groups=1, use_bias=True)
        kernel, stride = self._square(layer, "kernel_size"), self._square(layer, "strides")
        padding = 0
        if layer.settings.get("padding") == "same":
            if stride != 1 or kernel % 2 == 0:
                self._refuse(layer, "has padding same with an even kernel or a stride")
            padding = kernel // 2
        filters = layer.settings["filters"]
        self.blocks.append({"filters": filters, "kernel": kernel, "stride": stride, "padding": padding})
        self.linear = self._activation(layer)
        self._specification()  # refused before its weights are read
        values, bias = self.file.read(layer, (kernel, kernel, self.channels, filters), (filters,))
        name = f"blocks.{len(self.blocks) - 1}.0"
        self.weights |= {f"{name}.weight": values.transpose(3, 2, 0, 1).copy(), f"{name}.bias": bias}
        self.channels = filters

    def _take_BatchNormalization(self, layer: Layer) -> None:  # noqa: N802
        if not self.linear or self.stage != "blocks" or self.blocks[-1].keys() & {"pool", "dropout", "batch_norm"}:
            self._refuse(layer, "does not stand between a convolution and its relu")
        self._only(layer, center=True, scale=True)
        self.blocks[-1]["batch_norm"] = True
        gamma, beta, mean, variance = self.file.read(layer, *[(self.channels,)] * 4)
        name = f"blocks.{len(self.blocks) - 1}.1"
        variance = (variance + (layer.settings["epsilon"] - EPSILON)).astype(np.float32)
        parts = {"weight": gamma, "bias": beta, "running_mean": mean, "running_var": variance}
        self.weights |= {f"{name}.{key}": value for key, value in parts.items()}

    def _take_MaxPooling2D(self, layer: Layer) -> None:  # noqa: N802
        if self.stage != "blocks" or not self.blocks or self.blocks[-1].keys() & {"pool", "dropout"}:
            self._refuse(layer, "does not follow a convolution")
        self._only(layer, padding="valid")
        pool = self._square(layer, "pool_size")
        if layer.settings.get("strides") is not None and self._square(layer, "strides") != pool:
            self._refuse(layer, "has strides that are not its pool_size")
        self.blocks[-1]["pool"] = pool

    def _take_Dropout(self, layer: Layer) -> None:  # noqa: N802
        last = self.blocks[-1:] if self.stage == "blocks" or not self.dense else self.dense[-1:]
        if not last or self.linear or "dropout" in last[0]:
            self._refuse(layer, "does not follow a block or a dense layer")
        last[0]["dropout"] = float(layer.settings["rate"])

    def _take_Flatten(self, layer: Layer) -> None:  # noqa: N802
        self._settled(layer)
        self.stage = "dense"

    def _take_Dense(self, layer: Layer) -> None:  # noqa: N802
        if self.stage == "blocks" and self.blocks:
            self._refuse(layer, "stands before Flatten")
        self._settled(layer)
        self._only(layer, use_bias=True)
        units = layer.settings["units"]
        self.dense.append({"units": units})
        self.linear = self._activation(layer)
        self.stage = "end" if layer.settings.get("activation") == "softmax" else "dense"
        rows = self._specification().layers()
        features = (
            self.dense[-2]["units"] if len(self.dense) > 1 else next(r for r in rows if r.name == "flatten").output[0]
        )
        values, bias = self.file.read(layer, (features, units), (units,))
        name = f"dense.{len(self.dense) - 1}.0"
        self.weights |= {f"{name}.weight": values.T.copy(), f"{name}.bias": bias}

    def _take_Activation(self, layer: Layer) -> None:  # noqa: N802
        if layer.settings.get("activation") == "softmax" and self.dense and self.linear:
            self.stage, self.linear = "end", True
        elif layer.settings.get("activation") == "relu" and self.linear:
            self.linear = False
        else:
            self._refuse(layer, f"is {layer.settings.get('activation')!r:.60} there")

    def _take_ReLU(self, layer: Layer) -> None:  # noqa: N802
        self._only(layer, max_value=None, negative_slope=0.0, threshold=0.0)
        self._take_Activation(layer._replace(settings={"activation": "relu"}))

    def _take_Softmax(self, layer: Layer) -> None:  # noqa: N802
        self._only(layer, axis=-1)
        self._take_Activation(layer._replace(settings={"activation": "softmax"}))

    def _activation(self, layer: Layer) -> bool:
        """Whether the layer's own activation leaves it linear, so that its relu may still come."""
        activation = layer.settings.get("activation")
        if activation not in ("relu", "linear", "softmax") or (activation == "softmax" and layer.kind != "Dense"):
            self._refuse(layer, f"has activation {activation!r:.60}")
        return activation != "relu"

    def _settled(self, layer: Layer) -> None:
        if self.linear:
            self._refuse(layer, "follows a layer without relu")

    def _specification(self) -> Architecture:
        return validated(Architecture, {"blocks": list(self.blocks), "dense": list(self.dense)})

    def finish(self) -> Converted:
        if not self.dense or not self.linear:
            raise UserError("the model does not end in a Dense layer of softmax or without an activation")
        last = self.dense.pop()
        if "dropout" in last:
            raise UserError("the model ends in Dropout, which ConvNet cannot express")
        name = f"dense.{len(self.dense)}.0"
        for part in ("weight", "bias"):
            self.weights[f"logits.{part}"] = self.weights.pop(f"{name}.{part}")
        return Converted(self._specification(), last["units"], self.mean, self.standard_deviation, self.weights)

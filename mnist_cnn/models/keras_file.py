"""A convnet from the .h5 or .keras file that Keras saved, read as JSON and numbers: nothing in the file is run.

Imports neither Keras nor torch.
"""

from __future__ import annotations

import importlib.util
import json
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mnist_cnn.config.architecture import IMAGE_SIZE, MAXIMUM_PARAMETERS, Architecture
from mnist_cnn.config.schema import UserError, validated
from mnist_cnn.models.hdf5_file import read_hdf5

Array = NDArray[np.float32]
MAXIMUM_CONFIG, MAXIMUM_WEIGHTS = 2**24, 8 * MAXIMUM_PARAMETERS  # bytes
TORCH_EPSILON = 1e-5  # of torch's batch norm
# By Keras's names; relu is what an architecture has where a layer names none.
ACTIVATIONS = {"relu": None, "tanh": "tanh", "sigmoid": "sigmoid", "gelu": "gelu", "silu": "silu", "swish": "silu"}


class ImportedNetwork(NamedTuple):
    """What `ConvNet` is made of; `weights` are by its own names and in torch's shapes.

    `std` is None where the model has no Rescaling layer: it was trained on pixels / 255 or on pixels of 0–255.
    """

    architecture: Architecture
    classes: int
    mean: float
    std: float | None
    weights: dict[str, Array]


def read_keras(path: Path) -> ImportedNetwork:
    """Read a Sequential model, or a Functional one in a single line, from a .h5 or .keras file.

    Raises:
        UserError: the file is damaged, or has a layer that `ConvNet` cannot express; the message names it.
    """
    if importlib.util.find_spec("h5py") is None:
        raise UserError(f"keras={path} needs a package that is not installed: pip install 'mnist-cnn[keras]'")
    try:
        if zipfile.is_zipfile(path):
            config, content = _unzip(path)
            return convert(json.loads(config), read_hdf5(content).arrays)
        if path.stat().st_size > MAXIMUM_WEIGHTS:
            raise UserError("it is larger than any network of this package")
        config, weights = read_hdf5(path.read_bytes())
        if not config:
            raise UserError("it holds weights only; save the network with them, by model.save(...) in Keras")
        return convert(json.loads(config), weights)
    except (OSError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a whole Keras model with its architecture ({reason:.200})") from None
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error!s:.200})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _unzip(path: Path) -> tuple[str, bytes]:
    """config.json and the weights of a .keras file; nothing larger than any network is unpacked."""
    with zipfile.ZipFile(path) as archive:
        config, weights = (archive.getinfo(name) for name in ("config.json", "model.weights.h5"))
        if config.file_size > MAXIMUM_CONFIG or weights.file_size > MAXIMUM_WEIGHTS:
            raise UserError("its records are larger than any network of this package")
        if weights.file_size > 100 * max(weights.compress_size, 1):
            raise UserError("it is compressed beyond what weights can be")
        return archive.read(config).decode(), archive.read(weights)


class KerasLayer(NamedTuple):
    """A layer as the model's JSON has it; its weights are at one of `places`."""

    kind: str  # such as Conv2D
    name: str
    places: list[str]
    config: dict[str, Any]


def keras_layers(model: dict[str, Any]) -> list[KerasLayer]:
    """The layers of a model's JSON, in their order.

    Raises:
        UserError: the model is not a plain sequence of layers.
    """
    if model.get("class_name") not in ("Sequential", "Functional", "Model"):
        raise UserError(f"a {model.get('class_name')!r:.60} model: expected Sequential, or Functional in one line")
    counts: dict[str, int] = {}
    layers: list[KerasLayer] = []
    config = model["config"]
    for raw in config if isinstance(config, list) else config["layers"]:  # a list: Sequential before Keras 2.2.3
        kind, config = str(raw["class_name"]), raw["config"]
        name = str(config.get("name", kind))
        if (inbound := raw.get("inbound_nodes")) and layers:
            # The first of [name, node, tensor] is the layer before, in Keras 2 and 3.
            before = set(re.findall(r'\["([^"]+)", \d+, \d+', json.dumps(inbound)))
            if before != {layers[-1].name}:
                raise UserError(f"layer {name} ({kind}) does not follow the layer before it alone")
        # Keras names a group by the class in snake case, with a number from the second of a kind on.
        snake = re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", kind)).lower()
        number = counts[snake] = counts.get(snake, -1) + 1
        # Keras 2.13 counts each layer with weights twice.
        groups = {"layers": number, "_layer_checkpoint_dependencies": 2 * number}
        places = [f"{place}/{snake}" + (f"_{count}" if count else "") for place, count in groups.items()]
        layers.append(KerasLayer(kind, name, [*places, f"layers/{name}", name], config))
    return layers


def find_weights(weights: dict[str, list[Array]], layer: KerasLayer, *shapes: tuple[int, ...]) -> list[Array]:
    """A layer's arrays, of these shapes.

    Raises:
        UserError: an array is missing, or has another shape.
    """
    arrays = next((weights[place] for place in layer.places if place in weights), [])
    if (found := [array.shape for array in arrays]) != list(shapes):
        raise UserError(f"layer {layer.name} has weights of {found!s:.100}, expected {list(shapes)}")
    return arrays


def convert(model: dict[str, Any], weights: dict[str, list[Array]]) -> ImportedNetwork:
    """A model's JSON and the arrays of its file, by place, to a network.

    Raises:
        UserError: a layer is none of ConvNet's, or stands where ConvNet has none; the message names it.
    """
    converter = KerasConverter(weights)
    for layer in keras_layers(model):
        converter.add(layer)
    return converter.finish()


class KerasConverter:
    """Takes Keras's layers in order; `stage` says what may follow: blocks, dense, then the end."""

    def __init__(self, arrays: dict[str, list[Array]]) -> None:
        self.arrays = arrays
        self.blocks: list[dict[str, Any]] = []
        self.dense: list[dict[str, Any]] = []
        self.weights: dict[str, Array] = {}
        self.mean = 0.0
        self.std: float | None = None
        self.stage, self.channels = "blocks", 1
        self.linear = False  # the last convolution or dense layer has no activation yet
        self.norm: tuple[Array, Array] | None = None  # factor and shift of a norm, for the next dense layer to take in

    def add(self, layer: KerasLayer) -> None:
        handlers = {
            "InputLayer": self._input,
            "Reshape": self._reshape,
            "Rescaling": self._rescaling,
            "Conv2D": self._convolution,
            "BatchNormalization": self._batch_norm,
            "MaxPooling2D": self._pooling,
            "AveragePooling2D": self._pooling,
            "GlobalAveragePooling2D": self._pooling,
            "Dropout": self._dropout,
            "Flatten": self._flatten,
            "Dense": self._dense,
            "Activation": self._activation,
            "ReLU": self._relu,
            "Softmax": self._softmax,
        }
        if layer.kind not in handlers:
            raise UserError(f"layer {layer.name} is a {layer.kind:.60}, which ConvNet cannot express; it was not run")
        if self.stage == "end" and layer.kind not in ("Activation", "Softmax"):
            self._refuse(layer, "stands after the output")
        if layer.config.get("data_format") == "channels_first":
            self._refuse(layer, "has data_format channels_first")
        handlers[layer.kind](layer)

    def finish(self) -> ImportedNetwork:
        if not self.dense or not self.linear:
            raise UserError("the model does not end in a Dense layer of softmax or without an activation")
        last = self.dense.pop()
        if "dropout" in last:
            raise UserError("the model ends in Dropout, which ConvNet cannot express")
        for part in ("weight", "bias"):
            self.weights[f"logits.{part}"] = self.weights.pop(f"dense.{len(self.dense)}.0.{part}")
        return ImportedNetwork(self._architecture(), last["units"], self.mean, self.std, self.weights)

    def _architecture(self) -> Architecture:
        return validated(Architecture, {"blocks": list(self.blocks), "dense": list(self.dense)})

    # --- the layers ---

    def _input(self, layer: KerasLayer) -> None:
        shape = layer.config.get("batch_shape") or layer.config.get("batch_input_shape")
        if shape and list(shape)[1:] not in ([IMAGE_SIZE, IMAGE_SIZE, 1], [IMAGE_SIZE, IMAGE_SIZE], [IMAGE_SIZE**2]):
            self._refuse(layer, f"has the shape {shape!r:.60}")

    def _reshape(self, layer: KerasLayer) -> None:
        if self.blocks or self.stage != "blocks":
            self._refuse(layer, "stands after the first layer")
        self._require(layer, target_shape=[IMAGE_SIZE, IMAGE_SIZE, 1])

    def _rescaling(self, layer: KerasLayer) -> None:
        scale, offset = layer.config["scale"], layer.config["offset"]
        if self.blocks or self.stage != "blocks" or not all(type(v) in (int, float) for v in (scale, offset)):
            self._refuse(layer, "is no single scale and offset before the first layer")
        self.mean, self.std = -offset / scale, 1 / scale

    def _convolution(self, layer: KerasLayer) -> None:
        if self.stage != "blocks":
            self._refuse(layer, "stands after Flatten")
        self._require_activation(layer)
        self._require(layer, dilation_rate=[1, 1], groups=1)
        kernel, stride = self._square(layer, "kernel_size"), self._square(layer, "strides")
        padding = odd = 0
        if layer.config.get("padding") == "same":
            size = self._output()[0]
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            # Keras pads one more on the right and below; a row and a column of zeros in the kernel are the same.
            padding, odd = (total + 1) // 2, total % 2
        kernel += odd
        filters, biased = layer.config["filters"], layer.config.get("use_bias", True)
        block = {"filters": filters, "kernel": kernel, "stride": stride, "padding": padding, "bias": biased}
        self.blocks.append(block)
        self._set_activation(layer, block)
        self._architecture()  # refused before its weights are read
        shapes = [(kernel - odd, kernel - odd, self.channels, filters), *([(filters,)] if biased else [])]
        values, *bias = find_weights(self.arrays, layer, *shapes)
        values = np.pad(values, [(odd, 0), (odd, 0), (0, 0), (0, 0)])
        name = f"blocks.{len(self.blocks) - 1}.0"
        self.weights[f"{name}.weight"] = values.transpose(3, 2, 0, 1).copy()
        self.weights |= {f"{name}.bias": each for each in bias}
        self.channels = filters

    def _batch_norm(self, layer: KerasLayer) -> None:
        if self.stage == "dense":
            return self._dense_norm(layer)
        block: dict[str, Any] = self.blocks[-1] if self.blocks else {"batch_norm": True}
        if "batch_norm" in block or (self.linear and "pool" in block):
            self._refuse(layer, "does not follow a convolution, its activation or its pooling")
        gamma, beta, mean, variance = self._norm_weights(layer, self.channels)
        block["batch_norm"] = True if self.linear else "last" if "pool" in block else "after"
        variance = (variance + (layer.config["epsilon"] - TORCH_EPSILON)).astype(np.float32)
        parts = {"weight": gamma, "bias": beta, "running_mean": mean, "running_var": variance}
        place = {True: 1, "after": 2, "last": 3}[block["batch_norm"]]
        self.weights |= {f"blocks.{len(self.blocks) - 1}.{place}.{key}": value for key, value in parts.items()}

    def _dense_norm(self, layer: KerasLayer) -> None:
        """ConvNet's dense layers have no norm: it becomes part of the dense layer before it, or of the one after."""
        if self.norm:
            self._refuse(layer, "follows another")
        gamma, beta, mean, variance = self._norm_weights(layer, self._features())
        factor = gamma / np.sqrt(variance + layer.config["epsilon"])
        shift = beta - mean * factor
        if self.linear:
            name = f"dense.{len(self.dense) - 1}.0"
            self.weights[f"{name}.weight"] *= factor[:, None]
            self.weights[f"{name}.bias"] = self.weights[f"{name}.bias"] * factor + shift
        else:
            self.norm = factor, shift

    def _norm_weights(self, layer: KerasLayer, size: int) -> tuple[Array, ...]:
        """gamma, beta, mean and variance, each (size,)."""
        if layer.config.get("axis", -1) not in (-1, [-1], *((3, [3]) if self.stage == "blocks" else (1, [1]))):
            self._refuse(layer, f"has axis={layer.config['axis']!r:.60}")
        scale, center = (bool(layer.config.get(key, True)) for key in ("scale", "center"))
        found = find_weights(self.arrays, layer, *[(size,)] * (2 + scale + center))
        gamma = found.pop(0) if scale else np.ones(size, np.float32)
        beta = found.pop(0) if center else np.zeros(size, np.float32)
        return gamma, beta, *found

    def _pooling(self, layer: KerasLayer) -> None:
        if self.stage != "blocks" or not self.blocks or self.blocks[-1].keys() & {"pool", "dropout"}:
            self._refuse(layer, "does not follow a convolution")
        whole = layer.kind == "GlobalAveragePooling2D"
        if whole:
            pool = self._output()[0]
        else:
            self._require(layer, padding="valid")
            pool = self._square(layer, "pool_size")
            if layer.config.get("strides") is not None and self._square(layer, "strides") != pool:
                self._refuse(layer, "has strides that are not its pool_size")
        self.blocks[-1]["pool"] = pool
        if layer.kind != "MaxPooling2D":
            self.blocks[-1]["pooling"] = "avg"
            self._require_activation(layer)
        if whole:
            self._flatten(layer)

    def _dropout(self, layer: KerasLayer) -> None:
        last = self.blocks[-1:] if self.stage == "blocks" or not self.dense else self.dense[-1:]
        if not last or self.linear or "dropout" in last[0]:
            self._refuse(layer, "does not follow a block or a dense layer")
        last[0]["dropout"] = float(layer.config["rate"])

    def _flatten(self, layer: KerasLayer) -> None:
        self._require_activation(layer)
        self.stage = "dense"

    def _dense(self, layer: KerasLayer) -> None:
        if self.stage == "blocks" and self.blocks:
            self._refuse(layer, "stands before Flatten")
        self._require_activation(layer)
        units, biased, features = layer.config["units"], layer.config.get("use_bias", True), self._features()
        self.dense.append({"units": units})
        self._set_activation(layer, self.dense[-1])
        self.stage = "end" if layer.config.get("activation") == "softmax" else "dense"
        self._architecture()  # refused before its weights are read
        values, *bias = find_weights(self.arrays, layer, (features, units), *([(units,)] if biased else []))
        bias = bias or [np.zeros(units, np.float32)]
        if self.norm:
            factor, shift = self.norm
            values, bias = values * factor[:, None], [bias[0] + shift @ values]
            self.norm = None
        name = f"dense.{len(self.dense) - 1}.0"
        self.weights |= {f"{name}.weight": values.T.copy(), f"{name}.bias": bias[0]}

    def _activation(self, layer: KerasLayer) -> None:
        activation = layer.config.get("activation")
        if activation == "softmax" and self.dense and self.linear:
            self.stage = "end"
        elif activation in ACTIVATIONS and self.linear:
            last = self.blocks[-1] if self.stage == "blocks" else self.dense[-1]
            if "pool" in last and activation not in ("relu", "tanh", "sigmoid"):  # those keep the order of numbers
                self._refuse(layer, "follows its pooling")
            last["activation"] = ACTIVATIONS[activation]
            self.linear = False
        else:
            self._refuse(layer, f"is {activation!r:.60} there")

    def _relu(self, layer: KerasLayer) -> None:
        self._require(layer, max_value=None, negative_slope=0.0, threshold=0.0)
        self._activation(layer._replace(config={"activation": "relu"}))

    def _softmax(self, layer: KerasLayer) -> None:
        self._require(layer, axis=-1)
        self._activation(layer._replace(config={"activation": "softmax"}))

    # --- the shape so far ---

    def _output(self) -> tuple[int, ...]:
        """(height, width, filters) of the last block."""
        rows = [row.output for row in self._architecture().layers() if len(row.output) == 3]
        return rows[-1] if rows else (IMAGE_SIZE, IMAGE_SIZE, 1)

    def _features(self) -> int:
        """The numbers that come into the next dense layer."""
        return int(self.dense[-1]["units"] if self.dense else np.prod(self._output()))

    # --- what ConvNet cannot express ---

    def _refuse(self, layer: KerasLayer, reason: str) -> None:
        raise UserError(f"layer {layer.name} ({layer.kind}) {reason}, which ConvNet cannot express")

    def _require(self, layer: KerasLayer, **expected: Any) -> None:
        for key, value in expected.items():
            found = layer.config.get(key, value)
            if (list(found) if isinstance(found, list | tuple) else found) != value:
                self._refuse(layer, f"has {key}={found!r:.60}")

    def _require_activation(self, layer: KerasLayer) -> None:
        if self.linear:
            self._refuse(layer, "follows a layer without an activation")

    def _square(self, layer: KerasLayer, key: str) -> int:
        value = layer.config[key]
        sizes = [value] * 2 if isinstance(value, int) else list(value)
        if len(sizes) != 2 or sizes[0] != sizes[1] or type(sizes[0]) is not int:
            self._refuse(layer, f"has {key}={value!r:.60}")
        return int(sizes[0])

    def _set_activation(self, layer: KerasLayer, part: dict[str, Any]) -> None:
        """Take over a layer's own activation; where it has none, one may follow."""
        activation = layer.config.get("activation")
        if activation in ACTIVATIONS:
            part["activation"] = ACTIVATIONS[activation]
        elif activation != "linear" and not (activation == "softmax" and layer.kind == "Dense"):
            self._refuse(layer, f"has activation {activation!r:.60}")
        self.linear = activation not in ACTIVATIONS

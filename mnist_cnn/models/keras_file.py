"""A convnet from the .h5 or .keras file that Keras saved, read as JSON and numbers: nothing in the file is run.

Imports neither Keras nor torch.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mnist_cnn.config.architecture import IMAGE_SIZE, MAXIMUM_PARAMETERS, Architecture
from mnist_cnn.config.schema import UserError, validated

Array = NDArray[np.float32]
MAXIMUM_CONFIG = 2**24  # bytes
TORCH_EPSILON = 1e-5  # of torch's batch norm
# By Keras's names; relu is what an architecture has where a layer names none.
ACTIVATIONS = {"relu": None, "tanh": "tanh", "sigmoid": "sigmoid", "gelu": "gelu", "silu": "silu", "swish": "silu"}


class ImportedNetwork(NamedTuple):
    """What `ConvNet` is made of; `weights` are by its own names and in torch's shapes."""

    architecture: Architecture
    classes: int
    mean: float
    std: float
    weights: dict[str, Array]


def read_keras(path: Path, divide_by_255: bool) -> ImportedNetwork:
    """Read a Sequential model, or a Functional one in a single line, from a .h5 or .keras file.

    Args:
        divide_by_255: the model was trained on pixels / 255; a Rescaling layer in it is used instead of this.

    Raises:
        UserError: the file is damaged, or has a layer that `ConvNet` cannot express; the message names it.
    """
    try:
        import h5py
    except ImportError:
        raise UserError(f"keras={path} needs a package that is not installed: pip install 'mnist-cnn[keras]'") from None
    try:
        if zipfile.is_zipfile(path):
            config, weights = _unzip(path)
            with h5py.File(weights, "r") as file:
                return convert(json.loads(config), file, divide_by_255)
        with h5py.File(path, "r") as file:
            return convert(json.loads(file.attrs["model_config"]), file["model_weights"], divide_by_255)
    except (OSError, KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a whole Keras model with its architecture ({reason:.200})") from None
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error!s:.200})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _unzip(path: Path) -> tuple[str, io.BytesIO]:
    """config.json and the weights of a .keras file; nothing larger than any network is unpacked."""
    with zipfile.ZipFile(path) as archive:
        config, weights = (archive.getinfo(name) for name in ("config.json", "model.weights.h5"))
        if config.file_size > MAXIMUM_CONFIG or weights.file_size > 8 * MAXIMUM_PARAMETERS:
            raise UserError("its records are larger than any network of this package")
        if weights.file_size > 100 * max(weights.compress_size, 1):
            raise UserError("it is compressed beyond what weights can be")
        return archive.read(config).decode(), io.BytesIO(archive.read(weights))


class KerasLayer(NamedTuple):
    """A layer as the model's JSON has it; `group` is the place of its weights in a .keras file."""

    kind: str  # such as Conv2D
    name: str
    group: str
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
    for raw in model["config"]["layers"]:
        kind, config = str(raw["class_name"]), raw["config"]
        name = str(config.get("name", kind))
        if (inbound := raw.get("inbound_nodes")) and layers:
            # The first of [name, node, tensor] is the layer before, in Keras 2 and 3.
            before = set(re.findall(r'\["([^"]+)", \d+, \d+', json.dumps(inbound)))
            if before != {layers[-1].name}:
                raise UserError(f"layer {name} ({kind}) does not follow the layer before it alone")
        # Keras names a group by the class in snake case, with a number from the second of a kind on.
        snake = re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", kind)).lower()
        counts[snake] = counts.get(snake, -1) + 1
        group = f"layers/{snake}" + (f"_{counts[snake]}" if counts[snake] else "")
        layers.append(KerasLayer(kind, name, group, config))
    return layers


def read_weights(file: Any, layer: KerasLayer, *shapes: tuple[int, ...]) -> list[Array]:
    """A layer's arrays in Keras's order from an h5 group, their shapes checked before they are read.

    Raises:
        UserError: an array is missing, has another shape, or is in another file, which is not followed.
    """
    if "layer_names" in file.attrs:  # .h5
        group = _own_member(file, layer.name)
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in group.attrs["weight_names"]]
        datasets = [_own_member(group, name) for name in names]
    else:  # .keras
        place = layer.group if layer.group in file else f"layers/{layer.name}"
        variables = _own_member(file, f"{place}/vars")
        datasets = [_own_member(variables, str(number)) for number in range(len(variables))]
    if any(not hasattr(dataset, "shape") or dataset.is_virtual or dataset.external for dataset in datasets):
        raise UserError(f"layer {layer.name} has weights outside this file")
    found = [tuple(dataset.shape) for dataset in datasets]
    if found != list(shapes):
        raise UserError(f"layer {layer.name} has weights of {found!s:.100}, expected {list(shapes)}")
    return [np.asarray(dataset[()], np.float32) for dataset in datasets]


def _own_member(group: Any, path: str) -> Any:
    """What an h5 group has at a path; links, which may lead to other files, are refused."""
    import h5py

    for part in path.split("/"):
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise UserError(f"{path:.100} is missing or is a link")
        group = group[part]
    return group


def convert(model: dict[str, Any], weights: Any, divide_by_255: bool) -> ImportedNetwork:
    """A model's JSON and the h5 group of its weights to a network.

    Raises:
        UserError: a layer is none of ConvNet's, or stands where ConvNet has none; the message names it.
    """
    converter = KerasConverter(weights, divide_by_255)
    for layer in keras_layers(model):
        converter.add(layer)
    return converter.finish()


class KerasConverter:
    """Takes Keras's layers in order; `stage` says what may follow: blocks, dense, then the end."""

    def __init__(self, file: Any, divide_by_255: bool) -> None:
        self.file = file
        self.blocks: list[dict[str, Any]] = []
        self.dense: list[dict[str, Any]] = []
        self.weights: dict[str, Array] = {}
        self.mean, self.std = 0.0, 255.0 if divide_by_255 else 1.0
        self.stage, self.channels = "blocks", 1
        self.linear = False  # the last convolution or dense layer has no activation yet

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
        padding = 0
        if layer.config.get("padding") == "same":
            if stride != 1 or kernel % 2 == 0:
                self._refuse(layer, "has padding same with an even kernel or a stride")
            padding = kernel // 2
        filters, biased = layer.config["filters"], layer.config.get("use_bias", True)
        block = {"filters": filters, "kernel": kernel, "stride": stride, "padding": padding, "bias": biased}
        self.blocks.append(block)
        self._set_activation(layer, block)
        self._architecture()  # refused before its weights are read
        shapes = [(kernel, kernel, self.channels, filters), *([(filters,)] if biased else [])]
        values, *bias = read_weights(self.file, layer, *shapes)
        name = f"blocks.{len(self.blocks) - 1}.0"
        self.weights[f"{name}.weight"] = values.transpose(3, 2, 0, 1).copy()
        self.weights |= {f"{name}.bias": each for each in bias}
        self.channels = filters

    def _batch_norm(self, layer: KerasLayer) -> None:
        taken = {"pool", "dropout", "batch_norm"}
        if self.stage != "blocks" or not self.blocks or self.blocks[-1].keys() & taken:
            self._refuse(layer, "does not follow a convolution or its activation")
        self._require(layer, center=True, scale=True)
        self.blocks[-1]["batch_norm"] = True if self.linear else "after"
        gamma, beta, mean, variance = read_weights(self.file, layer, *[(self.channels,)] * 4)
        variance = (variance + (layer.config["epsilon"] - TORCH_EPSILON)).astype(np.float32)
        parts = {"weight": gamma, "bias": beta, "running_mean": mean, "running_var": variance}
        place = f"blocks.{len(self.blocks) - 1}.{1 if self.linear else 2}"
        self.weights |= {f"{place}.{key}": value for key, value in parts.items()}

    def _pooling(self, layer: KerasLayer) -> None:
        if self.stage != "blocks" or not self.blocks or self.blocks[-1].keys() & {"pool", "dropout"}:
            self._refuse(layer, "does not follow a convolution")
        whole = layer.kind == "GlobalAveragePooling2D"
        if whole:
            rows = {row.name: row for row in self._architecture().layers()}
            pool = rows[f"convolution {len(self.blocks)}"].output[0]
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
        self._require(layer, use_bias=True)
        units = layer.config["units"]
        self.dense.append({"units": units})
        self._set_activation(layer, self.dense[-1])
        self.stage = "end" if layer.config.get("activation") == "softmax" else "dense"
        flat = next(row.output[0] for row in self._architecture().layers() if row.name == "flatten")
        features = self.dense[-2]["units"] if len(self.dense) > 1 else flat
        values, bias = read_weights(self.file, layer, (features, units), (units,))
        name = f"dense.{len(self.dense) - 1}.0"
        self.weights |= {f"{name}.weight": values.T.copy(), f"{name}.bias": bias}

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

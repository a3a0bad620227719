"""What a Keras file says: its layers, and their arrays. Imports neither Keras nor torch."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mnist_cnn.config.schema import UserError

Array = NDArray[np.float32]


class Layer(NamedTuple):
    """`group` is where its weights are in a .keras file: the class in snake case and a number."""

    kind: str
    name: str
    group: str
    settings: dict[str, Any]


def layers_of(model: dict[str, Any]) -> list[Layer]:
    """The layers of a model's JSON, in their order.

    Raises:
        UserError: the model is no plain line of layers.
    """
    if model.get("class_name") not in ("Sequential", "Functional", "Model"):
        raise UserError(f"a {model.get('class_name')!r:.60} model: expected Sequential, or Functional in one line")
    counts: dict[str, int] = {}
    found: list[Layer] = []
    for raw in model["config"]["layers"]:
        kind, settings = str(raw["class_name"]), raw["config"]
        name = str(settings.get("name", kind))
        if (inbound := raw.get("inbound_nodes")) and found:
            # The first of [name, node, tensor] is the layer before, in Keras 2 and 3.
            before = set(re.findall(r'\["([^"]+)", \d+, \d+', json.dumps(inbound)))
            if before != {found[-1].name}:
                raise UserError(f"layer {name} ({kind}) does not follow the layer before it alone")
        snake = re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", kind)).lower()
        counts[snake] = counts.get(snake, -1) + 1
        group = f"layers/{snake}" + (f"_{counts[snake]}" if counts[snake] else "")
        found.append(Layer(kind, name, group, settings))
    return found


class Weights:
    """The arrays of a .h5 or .keras file; `file` is the HDF5 group that holds them."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def read(self, layer: Layer, *shapes: tuple[int, ...]) -> list[Array]:
        """The layer's arrays in Keras's order, their shapes checked before they are read."""
        datasets = self._datasets(layer)
        if [tuple(dataset.shape) for dataset in datasets] != list(shapes):
            found = [tuple(dataset.shape) for dataset in datasets]
            raise UserError(f"layer {layer.name} has weights of {found!s:.100}, expected {list(shapes)}")
        return [np.asarray(dataset[()], np.float32) for dataset in datasets]

    def _datasets(self, layer: Layer) -> list[Any]:
        if "layer_names" in self.file.attrs:  # .h5
            group = self._inside(self.file, layer.name)
            names = [name.decode() if isinstance(name, bytes) else str(name) for name in group.attrs["weight_names"]]
            found = [self._inside(group, name) for name in names]
        else:  # .keras
            place = layer.group if layer.group in self.file else f"layers/{layer.name}"
            variables = self._inside(self.file, f"{place}/vars")
            found = [self._inside(variables, str(number)) for number in range(len(variables))]
        for dataset in found:
            # What lies in other files is not followed.
            if not hasattr(dataset, "shape") or dataset.is_virtual or dataset.external:
                raise UserError(f"layer {layer.name} has weights outside this file")
        return found

    def _inside(self, group: Any, path: str) -> Any:
        """An object of this file: links to other files are not followed."""
        import h5py

        for part in path.split("/"):
            if not isinstance(group.get(part, getlink=True), h5py.HardLink):
                raise UserError(f"{path:.100} is missing or is a link")
            group = group[part]
        return group

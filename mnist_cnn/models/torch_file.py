"""The weights of a plain PyTorch network, its state_dict in a file, as a `ConvNet` of the same layers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from mnist_cnn.config.architecture import IMAGE_SIZE
from mnist_cnn.config.schema import UserError
from mnist_cnn.models.checkpoint import Description, load_plain, network_of
from mnist_cnn.models.convnet import ConvNet


def read_state_dict(path: Path, description: Description, mean: float, std: float) -> ConvNet:
    """Weights in the order of the description's layers, whatever their names are.

    Args:
        mean, std: of pixels / 255, as the network was trained (torchvision's Normalize).

    Raises:
        UserError: the file is damaged, holds other things than weights, or they do not fit the architecture.
    """
    content = load_plain(path, "state_dict, as torch.save(model.state_dict(), ...) writes it,")
    for key in ("state_dict", "model_state_dict"):  # beside an optimizer's, say
        content = content.get(key, content) if isinstance(content, dict) else content
    with torch.device("meta"):  # names only
        _, _, *names = ConvNet(description.architecture, len(description.classes)).state_dict()
    if not isinstance(content, dict) or len(content) != len(names):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} has {found:.300}; the architecture has {len(names)} weights: {', '.join(names)}")
    figures = {"mean": torch.tensor(255.0 * mean), "std": torch.tensor(255.0 * std)}
    network = network_of(path, description, figures | dict(zip(names, content.values(), strict=True)))
    # Flattened, torch has the channels first, and ConvNet has them last.
    shapes = [row.output for row in description.architecture.layers() if len(row.output) == 3]
    height, width, filters = shapes[-1] if shapes else (IMAGE_SIZE, IMAGE_SIZE, 1)
    first = next(layer for layer in [*network.dense.modules(), network.logits] if isinstance(layer, nn.Linear))
    first.weight.data = first.weight.data.unflatten(1, (filters, height, width)).permute(0, 2, 3, 1).flatten(1)
    return network

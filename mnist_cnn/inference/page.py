"""A network as one HTML file to draw on, made of the files in mnist_cnn/web; it needs no network connection."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mnist_cnn.models.checkpoint import Description
from mnist_cnn.models.convnet import ACTIVATION_CLASSES, ConvNet, Dropout, Residual
from mnist_cnn.pictures.digit_image import IN_MNIST_FORM

WEB = Path(__file__).parents[1] / "web"
ACTIVATION_NAMES = {type(make()): name for name, make in ACTIVATION_CLASSES.items()}


def folded(network: ConvNet, half: bool) -> ConvNet:
    """A copy of the network, each batch norm within the convolution before it, its weights rounded to float16 if `half`.

    A batch norm that stands after an activation stays.
    """
    network = copy.deepcopy(network).eval()
    for module in list(network.modules()):
        if isinstance(module, nn.Sequential):
            _fold(module)
    if half:
        for parameter in network.parameters():
            parameter.data = parameter.half().float()
    return network


def _fold(layers: nn.Sequential) -> None:
    for index in range(1, len(layers)):
        norm, before = layers[index], layers[index - 1]
        # Of a separable convolution, the second half.
        place, at = (before, 1) if isinstance(before, nn.Sequential) else (layers, index - 1)
        convolution = place[at]
        if isinstance(norm, nn.BatchNorm2d) and isinstance(convolution, nn.Conv2d):
            place[at] = fuse_conv_bn_eval(convolution, norm)
            layers[index] = nn.Identity()


def page(network: ConvNet, description: Description, half: bool) -> str:
    """The text of the file.

    Args:
        network: as `folded` has made it, without layers of the user's own.
        description: the checkpoint's.
        half: write float16 weights, else float32.
    """
    arrays: list[Tensor] = []
    parts = [
        *({"title": f"Block {i}", "steps": list(_block(part, arrays))} for i, part in enumerate(network.blocks, 1)),
        *({"title": f"Dense {i}", "steps": list(_steps(part, arrays))} for i, part in enumerate(network.dense, 1)),
    ]
    output = list(_steps(network.logits, arrays))
    first = next((part["steps"] for part in parts if part["title"] == "Dense 1"), output)
    first.insert(0, {"kind": "flatten"})
    weights = torch.cat(arrays).numpy().astype("<f2" if half else "<f4")
    content = {
        "classes": description.classes,
        "mean": network.mean.item(),
        "std": network.std.item(),
        "temperature": description.temperature,
        "unsureBelow": description.unsure_below,
        "anyPicture": description.data.name not in IN_MNIST_FORM,
        "parts": parts,
        "output": output,
        "half": half,
        "weights": base64.b64encode(weights.tobytes()).decode(),
    }
    html = (WEB / "page.html").read_text(encoding="utf-8")
    hashes: dict[str, list[str]] = {"css": [], "js": []}
    for name in ("style.css", "network.js", "form.js", "page.js"):
        text = (WEB / name).read_text(encoding="utf-8")
        html = html.replace(f"[{name}]", text)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[name.rpartition(".")[2]].append(f"'sha256-{digest}'")
    for kind, found in hashes.items():
        html = html.replace(f"[{kind} hashes]", " ".join(found))
    # Within a script element, no text of a class's name may look like a tag.
    return html.replace("[network]", json.dumps(content).replace("<", "\\u003c"))


def _block(block: nn.Module, arrays: list[Tensor]) -> Iterator[dict[str, Any]]:
    """A block's steps, pooling after the activation also where ConvNet has it before."""
    steps = list(_steps(block, arrays))
    return iter(sorted(steps, key=lambda step: step["kind"] == "pool"))


def _steps(module: nn.Module, arrays: list[Tensor]) -> Iterator[dict[str, Any]]:
    """What network.js does for a module; the numbers that it needs are added to `arrays`, in its order."""

    def kept(**values: Tensor | None) -> dict[str, Any]:
        given = {name: value.detach().flatten() for name, value in values.items() if value is not None}
        arrays.extend(given.values())
        return {"arrays": {name: len(value) for name, value in given.items()}}

    match module:
        case nn.Sequential():
            for each in module:
                yield from _steps(each, arrays)
        case Residual():
            layers = list(_steps(module.layers, arrays))
            yield {"kind": "residual", "layers": layers, "shortcut": list(_steps(module.shortcut, arrays))}
        case nn.Conv2d():
            size = {"kernel": module.kernel_size[0], "stride": module.stride[0], "padding": module.padding[0]}
            size |= {"filters": module.out_channels, "depthwise": module.groups > 1}
            yield {"kind": "convolution", **size, **kept(weight=module.weight, bias=module.bias)}
        case nn.BatchNorm2d():
            scale = module.weight / torch.sqrt(module.running_var + module.eps)
            yield {"kind": "norm", **kept(scale=scale, shift=module.bias - scale * module.running_mean)}
        case nn.MaxPool2d() | nn.AvgPool2d():
            yield {"kind": "pool", "name": "max" if isinstance(module, nn.MaxPool2d) else "avg", "size": module.kernel_size}
        case nn.Linear():
            yield {"kind": "dense", "units": module.out_features, **kept(weight=module.weight, bias=module.bias)}
        case Dropout() | nn.Identity():
            pass
        case _:
            yield {"kind": "activation", "name": ACTIVATION_NAMES[type(module)]}

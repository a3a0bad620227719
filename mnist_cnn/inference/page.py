"""A network as one HTML file to draw on, made of the files in mnist_cnn/web; it needs no network connection."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mnist_cnn.config.schema import UserError
from mnist_cnn.data.datasets import load
from mnist_cnn.models.checkpoint import Description, network_of, read_checkpoint
from mnist_cnn.models.convnet import ACTIVATION_CLASSES, ConvNet, Dropout, Residual
from mnist_cnn.pictures.digit_image import IN_MNIST_FORM
from mnist_cnn.runs.files import write_whole

log = logging.getLogger(__name__)

WEB = Path(__file__).parents[1] / "web"
ACTIVATION_NAMES = {type(make()): name for name, make in ACTIVATION_CLASSES.items()}
TOLERANCE = 1e-3  # of a probability


def write_page(checkpoint: str, output: Path) -> None:
    """Write the page of a checkpoint's network.

    Its weights are float16 if the probabilities of scikit-learn's 1,797 digits then differ from the checkpoint's by
    less than 1e-3, else float32.

    Raises:
        UserError: the checkpoint cannot be read, or its network has layers of the user's own.
    """
    content, description = read_checkpoint(checkpoint)
    if own := description.architecture.own_modules():
        raise UserError(
            f"checkpoint={checkpoint} has layers of your own ({', '.join(sorted(own))}), which no page can compute: "
            "give a network of this package's layers"
        )
    network = network_of(checkpoint, description, content["state_dict"])
    digits = torch.cat([part.images for part in load("digits", "")[:2]])

    @torch.inference_mode()
    def probabilities(network: nn.Module) -> Tensor:
        return torch.softmax(network(digits) / description.temperature, dim=1)

    shown, half = folded(network, half=True), True
    difference = float((probabilities(shown) - probabilities(network.eval())).abs().max())
    if not difference < TOLERANCE:
        shown, half = folded(network, half=False), False
    write_whole(output, page(shown, description, half))
    log.info("%s, with weights of %s", output, "float16" if half else "float32")


def folded(network: ConvNet, half: bool) -> ConvNet:
    """A copy of the network for prediction, its weights rounded to float16 if `half`.

    Each batch norm is within the convolution before it, or is only a scale and a shift after an activation.
    """
    network = copy.deepcopy(network).eval()
    for module in list(network.modules()):
        if isinstance(module, nn.Sequential):
            _fold(module)
        if isinstance(module, nn.BatchNorm2d):
            _simplify(module)
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


def _simplify(norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.data / torch.sqrt(norm.running_var + norm.eps)
    norm.weight.data, norm.bias.data = scale, norm.bias.data - scale * norm.running_mean
    norm.running_mean, norm.running_var, norm.eps = torch.zeros_like(scale), torch.ones_like(scale), 0.0


def page(network: ConvNet, description: Description, half: bool) -> str:
    """The text of the file.

    Args:
        network: as `folded` has made it, without layers of the user's own.
        description: the checkpoint's.
        half: write float16 weights, else float32.
    """
    arrays: list[Tensor] = []
    blocks: list[dict[str, Any]] = [
        {"title": f"Block {i}", "steps": _block(block, arrays)} for i, block in enumerate(network.blocks, 1)
    ]
    dense: list[dict[str, Any]] = [
        {"title": f"Dense {i}", "steps": list(_steps(layer, arrays))} for i, layer in enumerate(network.dense, 1)
    ]
    output = list(_steps(network.logits, arrays))
    (dense[0]["steps"] if dense else output).insert(0, {"kind": "flatten"})
    weights = torch.cat(arrays).numpy().astype("<f2" if half else "<f4")
    content = {
        "classes": description.classes,
        "mean": network.mean.item(),
        "std": network.std.item(),
        "temperature": description.temperature,
        "unsureBelow": description.unsure_below,
        "anyPicture": description.data.name not in IN_MNIST_FORM,
        "parts": blocks + dense,
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


def _block(block: nn.Module, arrays: list[Tensor]) -> list[dict[str, Any]]:
    """A block's steps, pooling after the activation also where ConvNet has it before."""
    return sorted(_steps(block, arrays), key=lambda step: step["kind"] == "pool")


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
            yield {"kind": "norm", **kept(scale=module.weight, shift=module.bias)}
        case nn.MaxPool2d() | nn.AvgPool2d():
            name = "max" if isinstance(module, nn.MaxPool2d) else "avg"
            yield {"kind": "pool", "name": name, "size": module.kernel_size}
        case nn.Linear():
            size = {"kernel": 1, "stride": 1, "filters": module.out_features}  # over an input of one pixel
            yield {"kind": "dense", **size, **kept(weight=module.weight, bias=module.bias)}
        case Dropout() | nn.Identity():
            pass
        case _:
            yield {"kind": "activation", "name": ACTIVATION_NAMES[type(module)]}

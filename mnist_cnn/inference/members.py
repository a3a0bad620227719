"""`Member`: one network of a classifier, from a checkpoint or from a file that mnist-export wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mnist_cnn.config.schema import UserError
from mnist_cnn.models.checkpoint import Description, find_checkpoint, network_of, read_description, rebuild
from mnist_cnn.models.convnet import ConvNet
from mnist_cnn.models.onnx_file import checked

MAXIMUM_FILE = 2**29  # bytes of an .onnx or .safetensors file


class Member(NamedTuple):
    """One network of a classifier: digits uint8 (N, 1, 28, 28) on its device to calibrated logits (N, classes)."""

    logits: Callable[[Tensor], Tensor]
    description: Description
    network: ConvNet | None  # None of an .onnx file


def load_member(path: str | Path, device: torch.device) -> Member:
    """The network of a .ckpt, .onnx or .safetensors file, or of a run's folder, on `device`.

    Raises:
        UserError: it cannot be read, or is not of this package.
    """
    path = find_checkpoint(path)
    readers = {".onnx": _load_onnx, ".safetensors": _load_safetensors}
    if path.suffix in readers:
        if path.stat().st_size > MAXIMUM_FILE:
            raise UserError(f"{path} is larger than {MAXIMUM_FILE:,} bytes and was not loaded")
        return readers[path.suffix](path, device)
    return _network_member(*rebuild(path), device)


def _network_member(network: ConvNet, description: Description, device: torch.device) -> Member:
    network = network.to(device).eval()
    return Member(lambda images: network(images) / description.temperature, description, network)


def _load_safetensors(path: Path, device: torch.device) -> Member:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f"{path} needs a package that is not installed: pip install 'mnist-cnn[export]'") from None
    try:
        with safe_open(path, "pt") as file:
            description = _description_of(path, (file.metadata() or {}).get("mnist_cnn"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error!s:.200})") from None
    return _network_member(network_of(path, description, weights), description, device)


def _load_onnx(path: Path, device: torch.device) -> Member:
    try:
        import onnx  # noqa: F401 - the file is checked with it
        import onnxruntime
    except ImportError:
        raise UserError(f"{path} needs a package that is not installed: pip install 'mnist-cnn[export]'") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        model, content = checked(path.read_bytes())
        description = _description_of(path, content)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names, (output,) = [each.name for each in session.get_inputs()], session.get_outputs()
        if output.shape[1:] != [len(description.classes)]:
            raise UserError(f"it gives {output.shape[1:]} probabilities of {len(description.classes)} classes")
    except Exception as error:  # onnx and onnxruntime have no common one
        raise UserError(f"{path} is not an ONNX file of mnist-export ({' '.join(str(error).split())[:200]})") from None

    def logits(images: Tensor) -> Tensor:
        try:
            (probabilities,) = session.run([output.name], {names[0]: images.cpu().numpy()})
        except Exception as error:  # of a file that was changed
            raise UserError(f"{path} does not run ({' '.join(str(error).split())[:200]})") from None
        if np.isnan(probabilities).any() or probabilities.shape != (len(images), len(description.classes)):
            raise UserError(f"{path} gives no probabilities: it is damaged")
        return torch.from_numpy(probabilities).log()

    return Member(logits, description, None)


def _description_of(path: Path, text: str | None) -> Description:
    """The description that mnist-export wrote into a file, as JSON."""
    if text is None:
        raise UserError(f"{path} comes from another program: it has no description of an mnist_cnn network")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path} has a damaged description") from None
    return read_description(path, content)

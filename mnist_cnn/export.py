"""mnist-export: a checkpoint as a file for other runtimes, or as a page to draw on."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from mnist_cnn.config.schema import UserError, validated
from mnist_cnn.config.settings import CONF, Export
from mnist_cnn.runs.files import whole, writable
from mnist_cnn.runs.hydra_app import guarded, plain, run_command

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from mnist_cnn.models.checkpoint import Description

log = logging.getLogger(__name__)
BATCHES = (1, 7, 256)
TOLERANCE = 1e-5  # of a probability


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="export")
def job(config: DictConfig) -> None:
    guarded(lambda: export(validated(Export, plain(config))), Path())


def main() -> None:
    run_command(job, "export")


def export(config: Export) -> Path:
    """Write the file that `config.output` names, if its probabilities are the checkpoint's to 1e-5; returns its path.

    A page, .html, may differ by 1e-3: see `write_page`.

    Raises:
        UserError: the checkpoint cannot be read, a package is missing, or the probabilities differ.
    """
    from mnist_cnn.inference.classifier import load_classifier
    from mnist_cnn.models.checkpoint import rebuild, trust

    output = writable(config.output)
    if config.format == "html":
        from mnist_cnn.inference.page import write_page

        write_page(config.checkpoint, output)
        return output
    trust(config.modules)
    network, description = rebuild(config.checkpoint)
    writers = {"onnx": write_onnx, "torch_export": write_torch_export, "safetensors": write_safetensors}
    with whole(output) as temporary:
        try:
            probabilities = writers[config.format](network.eval(), description, temporary)
        except ImportError as error:
            raise UserError(
                f"format={config.format} needs the package {error.name}: pip install 'mnist-cnn[export]'"
            ) from None
        except Exception as error:  # torch's exporters have no common one
            if not description.architecture.own_modules():
                raise
            reason = " ".join(str(error).split())
            raise UserError(
                f"format={config.format}: torch cannot export a layer of your own ({reason:.200})"
            ) from None
        checkpoint = load_classifier(config.checkpoint, "cpu")
        difference = largest_difference(probabilities, lambda digits: checkpoint.logits(digits).softmax(1))
        if not difference <= TOLERANCE:
            raise UserError(f"{output} was not written: probabilities differ from the checkpoint's by {difference:.1e}")
    log.info("probabilities equal to %.1e at batches of %s", difference, ", ".join(map(str, BATCHES)))
    log.info("%s", output)
    return output


def largest_difference(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> float:
    """Between the probabilities (N, classes) that two functions give the same random digits uint8 (N, 1, 28, 28).

    Each size of `BATCHES` is tried. NaN where a probability is NaN, infinite where the shapes differ.
    """
    import torch

    generator = torch.Generator().manual_seed(1)
    differences = []
    for count in BATCHES:
        digits = torch.randint(0, 256, (count, 1, 28, 28), generator=generator, dtype=torch.uint8)
        # Half of the pixels are dark, as in digits.
        digits = digits * (torch.rand(digits.shape, generator=generator) < 0.5)
        ours, theirs = first(digits).detach(), second(digits)
        if ours.shape != theirs.shape:
            return float("inf")
        differences.append((ours - theirs).abs().max())
    return float(torch.stack(differences).max())


def _probability_module(network: nn.Module, description: Description) -> nn.Module:
    """Digits uint8 (N, 1, 28, 28) to probabilities float32 (N, classes): normalisation and temperature inside."""
    import torch

    class Probabilities(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, digits: Tensor) -> Tensor:
            return torch.softmax(self.network(digits) / description.temperature, dim=1)

    return Probabilities().eval()


def _exported_program(network: nn.Module, description: Description) -> ExportedProgram:
    import torch

    digits = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    any_batch = {"digits": {0: torch.export.Dim("batch", min=1)}}
    return torch.export.export(_probability_module(network, description), (digits,), dynamic_shapes=any_batch)


def write_onnx(network: nn.Module, description: Description, path: Path) -> Callable[[Tensor], Tensor]:
    """Write an ONNX file; as the other writers, returns what gives the probabilities of the file just written."""
    import onnx
    import onnxruntime  # noqa: F401 — the comparison runs on it
    import onnxscript  # noqa: F401 — torch writes the file with it
    import torch

    from mnist_cnn.inference.classifier import load_classifier

    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # its optimizer prints what it removed
        program = torch.onnx.export(
            _exported_program(network, description),
            input_names=["digits"],
            output_names=["probabilities"],
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    model.metadata_props.append(onnx.StringStringEntryProto(key="mnist_cnn", value=description_json(description)))
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    exported = load_classifier(path, "cpu")
    return lambda digits: exported.logits(digits).softmax(1)


def write_torch_export(network: nn.Module, description: Description, path: Path) -> Callable[[Tensor], Tensor]:
    import torch

    torch.export.save(_exported_program(network, description), path)
    return torch.export.load(path).module()


def write_safetensors(network: nn.Module, description: Description, path: Path) -> Callable[[Tensor], Tensor]:
    from safetensors.torch import save_file

    from mnist_cnn.inference.classifier import load_classifier

    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(weights, path, metadata={"mnist_cnn": description_json(description)})
    exported = load_classifier(path, "cpu")
    return lambda digits: exported.logits(digits).softmax(1)


def description_json(description: Description) -> str:
    """What the file says of its network, so that `load_classifier` can read it."""
    from mnist_cnn.models.checkpoint import FORMAT

    return json.dumps({**description.model_dump(), "format": FORMAT})


if __name__ == "__main__":
    main()

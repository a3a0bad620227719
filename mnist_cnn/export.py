"""mnist-export: a checkpoint as a file for other runtimes, uint8 digits in, probabilities out."""

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
from mnist_cnn.runs.folder import whole
from mnist_cnn.runs.hydra_app import plain, run_command
from mnist_cnn.runs.jobs import guarded

if TYPE_CHECKING:
    from torch import Tensor, nn

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
    """Write the file, compare its probabilities with the checkpoint's, and leave it only where they are equal.

    Raises:
        UserError: the checkpoint cannot be read, a package is missing, or the probabilities differ.
    """
    from mnist_cnn.inference.classifier import load_classifier
    from mnist_cnn.models.checkpoint import rebuild

    network, description = rebuild(config.checkpoint)
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    writers = {"onnx": write_onnx, "torch_export": write_torch_export, "safetensors": write_safetensors}
    with whole(output) as temporary:
        try:
            probabilities = writers[config.format](network.eval(), description, temporary)
        except ImportError as error:
            raise UserError(
                f"format={config.format} needs the package {error.name}: pip install 'mnist-cnn[export]'"
            ) from None
        checkpoint = load_classifier(config.checkpoint, "cpu")
        difference = largest_difference(probabilities, lambda digits: checkpoint.logits(digits).softmax(1))
        if not difference <= TOLERANCE:
            raise UserError(f"{output} was not written: probabilities differ from the checkpoint's by {difference:.1e}")
    log.info("probabilities equal to %.1e at batches of %s", difference, ", ".join(map(str, BATCHES)))
    log.info("%s", output)
    return output


def largest_difference(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> float:
    """Of the probabilities of the same random digits uint8 (N, 1, 28, 28), at each size of batch; NaN where one is."""
    import torch

    generator = torch.Generator().manual_seed(1)
    differences = []
    for count in BATCHES:
        digits = torch.randint(0, 256, (count, 1, 28, 28), generator=generator, dtype=torch.uint8)
        # Half of the pixels dark, as in digits.
        digits = digits * (torch.rand(digits.shape, generator=generator) < 0.5)
        one, other = first(digits).detach(), second(digits)
        if one.shape != other.shape:
            return float("inf")
        differences.append((one - other).abs().max())
    return float(torch.stack(differences).max())


def _whole(network: nn.Module, description: Description) -> nn.Module:
    """Digits uint8 (N, 1, 28, 28) to probabilities float32 (N, classes): normalisation and temperature inside."""
    import torch

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, digits: Tensor) -> Tensor:
            return torch.softmax(self.network(digits) / description.temperature, dim=1)

    return Whole().eval()


def _traced(network: nn.Module, description: Description) -> object:
    import torch

    digits = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    return torch.export.export(
        _whole(network, description), (digits,), dynamic_shapes={"digits": {0: torch.export.Dim("batch", min=1)}}
    )


def write_onnx(network: nn.Module, description: Description, path: Path) -> Callable[[Tensor], Tensor]:
    import onnx
    import onnxruntime  # noqa: F401 — what the comparison runs on
    import onnxscript  # noqa: F401 — what torch writes the file with
    import torch

    from mnist_cnn.inference.classifier import load_classifier

    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # its optimizer prints what it removed
        program = torch.onnx.export(
            _traced(network, description),  # type: ignore[arg-type]
            input_names=["digits"],
            output_names=["probabilities"],
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    model.metadata_props.append(onnx.StringStringEntryProto(key="mnist_cnn", value=described_in_json(description)))
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    exported = load_classifier(path, "cpu")
    return lambda digits: exported.logits(digits).softmax(1)


def write_torch_export(network: nn.Module, description: Description, path: Path) -> Callable[[Tensor], Tensor]:
    import torch

    torch.export.save(_traced(network, description), path)  # type: ignore[arg-type]
    return torch.export.load(path).module()


def write_safetensors(network: nn.Module, description: Description, path: Path) -> Callable[[Tensor], Tensor]:
    from safetensors.torch import save_file

    from mnist_cnn.inference.classifier import load_classifier

    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(weights, path, metadata={"mnist_cnn": described_in_json(description)})
    exported = load_classifier(path, "cpu")
    return lambda digits: exported.logits(digits).softmax(1)


def described_in_json(description: Description) -> str:
    from mnist_cnn.models.checkpoint import FORMAT

    return json.dumps({**description.model_dump(), "format": FORMAT})


if __name__ == "__main__":
    main()

"""mnist-import: the file of a Keras model or of a PyTorch network's weights to a checkpoint of this package.

The module's name is a keyword of Python: `python -m mnist_cnn.import` runs it, importlib.import_module imports it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from mnist_cnn.config.schema import UserError, validated
from mnist_cnn.config.settings import CONF, Import
from mnist_cnn.runs.files import writable
from mnist_cnn.runs.hydra_app import guarded, plain, run_command

if TYPE_CHECKING:
    from mnist_cnn.config.architecture import Architecture
    from mnist_cnn.models.checkpoint import Description
    from mnist_cnn.models.convnet import ConvNet

log = logging.getLogger(__name__)
LEAST_RIGHT = 0.3  # of scikit-learn's digits; less says that the network does not see digits


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="import")
def job(config: DictConfig) -> None:
    guarded(lambda: import_network(validated(Import, plain(config))), Path())


def main() -> None:
    run_command(job, "import")


def import_network(config: Import) -> Path:
    """Read a file of Keras or PyTorch, and write its network as a checkpoint; returns the latter's path.

    Raises:
        UserError: the file is missing or damaged, or has what `ConvNet` cannot express.
    """
    from mnist_cnn.models.checkpoint import save_weights, trust
    from mnist_cnn.models.torch_file import read_state_dict

    path, output = Path(config.keras or config.torch or ""), writable(config.output)
    if not path.is_file():
        key, kind = ("keras", ".h5 or .keras") if config.keras else ("torch", ".pt or .pth")
        raise UserError(f"{key}={path} does not exist: give a {kind} file")
    if config.architecture is None:
        network, description = from_keras(path, config.divide_by_255)
    else:
        trust(config.architecture.own_modules())  # named on the command line
        description = described(config.architecture, 10)
        mean, std = 0.1307 if config.mean is None else config.mean, config.std or 0.3081
        network = read_state_dict(path, description, mean, std)
        if (right := scores(network)[0]) < LEAST_RIGHT:
            log.warning(
                "warning: only %.0f %% of scikit-learn's digits are right: look at mean, std, activations and pooling",
                100 * right,
            )
    save_weights(output, description, network)
    log.info("%s", output)
    return output


def from_keras(path: Path, divide_by_255: bool | None) -> tuple[ConvNet, Description]:
    """The network of a Keras file; a Rescaling layer in it goes before `divide_by_255`, and null is found out."""
    import torch

    from mnist_cnn.models.checkpoint import require_numbers
    from mnist_cnn.models.convnet import ConvNet
    from mnist_cnn.models.keras_file import read_keras

    imported = read_keras(path)
    network = ConvNet(
        imported.architecture, imported.classes, imported.mean, 255.0 if imported.std is None else imported.std
    )
    weights = network.state_dict()
    for name, value in imported.weights.items():
        weights[name].copy_(torch.from_numpy(value))
    try:
        require_numbers(weights)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if imported.std is None:
        network.std.fill_(255.0 if (divides_by_255(network) if divide_by_255 is None else divide_by_255) else 1.0)
    return network, described(imported.architecture, imported.classes)


def divides_by_255(network: ConvNet) -> bool:
    """Whether a network was trained on pixels / 255 or on 0–255, as scikit-learn's digits show.

    Networks without a bias hardly see the scale of their input, so accuracy alone does not tell. But numbers 255 times
    smaller than those that a network was trained on leave it unsure.
    """
    found = {}
    for divided, std in ((True, 255.0), (False, 1.0)):
        network.std.fill_(std)
        found[divided] = scores(network)
    (right, sure), (other_right, _) = found[True], found[False]
    if max(right, other_right) < LEAST_RIGHT:
        log.warning(
            "warning: divide_by_255=true and divide_by_255=false are both possible, and scikit-learn's digits do not "
            "tell: true was taken; give false for a model trained on pixels of 0–255"
        )
        return True
    chosen = sure > 0.2 and right > other_right - 0.1
    log.info(
        "divide_by_255=%s was found out: of scikit-learn's digits, %.1f %% are right with true, the mean probability "
        "being %.2f, and %.1f %% with false",
        str(chosen).lower(),
        100 * right,
        sure,
        100 * other_right,
    )
    return chosen


def scores(network: ConvNet) -> tuple[float, float]:
    """The fraction of scikit-learn's training digits that are right, and the mean of their largest probabilities."""
    import torch

    from mnist_cnn.data.datasets import load

    digits = load("digits", "unused").train
    network.eval()
    with torch.inference_mode():
        sure, labels = network(digits.images).softmax(1).max(1)
    return (labels == digits.labels).float().mean().item(), sure.mean().item()


def described(architecture: Architecture, classes: int) -> Description:
    """Of the data it says that it was MNIST, as a foreign file says nothing of it."""
    from mnist_cnn.models.checkpoint import FORMAT, Description
    from mnist_cnn.runs.folder import versions

    description: dict[str, Any] = {
        "format": FORMAT,
        "architecture": architecture.model_dump(),
        "classes": [str(number) for number in range(classes)],
        "data": {"name": "mnist", "validation": 0, "validation_from": "last", "normalization": "unit", "seed": 0},
        "versions": versions(),
    }
    return validated(Description, description)


if __name__ == "__main__":
    main()

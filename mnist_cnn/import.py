"""mnist-import: a Keras model's file to a checkpoint of this package.

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
from mnist_cnn.runs.folder import writable
from mnist_cnn.runs.hydra_app import guarded, plain, run_command

if TYPE_CHECKING:
    from mnist_cnn.models.keras_file import ImportedNetwork

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="import")
def job(config: DictConfig) -> None:
    guarded(lambda: import_keras(validated(Import, plain(config))), Path())


def main() -> None:
    run_command(job, "import")


def import_keras(config: Import) -> Path:
    """Read a .h5 or .keras file, and write the network that it describes as a checkpoint; returns the latter's path.

    Raises:
        UserError: the file is missing or damaged, or has a layer that `ConvNet` cannot express.
    """
    from mnist_cnn.models.keras_file import read_keras

    path, output = Path(config.keras), writable(config.output)
    if not path.is_file():
        raise UserError(f"keras={path} does not exist: give a .h5 or .keras file")
    write_checkpoint(read_keras(path, config.divide_by_255), output)
    log.info("%s", output)
    return output


def write_checkpoint(imported: ImportedNetwork, output: Path) -> None:
    """Write the checkpoint; of the data it says that it was MNIST, as a Keras file says nothing of it."""
    import torch

    from mnist_cnn.models.checkpoint import FORMAT, Description, save_weights
    from mnist_cnn.models.convnet import ConvNet
    from mnist_cnn.runs.folder import versions

    network = ConvNet(imported.architecture, imported.classes, imported.mean, imported.std)
    weights = network.state_dict()
    for name, value in imported.weights.items():
        weights[name].copy_(torch.from_numpy(value))
    description: dict[str, Any] = {
        "format": FORMAT,
        "architecture": network.specification.model_dump(),
        "classes": [str(number) for number in range(imported.classes)],
        "data": {"name": "mnist", "validation": 0, "validation_from": "last", "normalization": "unit", "seed": 0},
        "versions": versions(),
    }
    save_weights(output, validated(Description, description), network)


if __name__ == "__main__":
    main()

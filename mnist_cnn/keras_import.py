"""mnist-import: a Keras model's file to a checkpoint, read as numbers and JSON: nothing in it is run."""

from __future__ import annotations

import io
import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from mnist_cnn.config.architecture import MAXIMUM_PARAMETERS
from mnist_cnn.config.schema import UserError, validated
from mnist_cnn.config.settings import CONF, Import
from mnist_cnn.models.keras_layers import Converted, converted
from mnist_cnn.runs.hydra_app import plain, run_command
from mnist_cnn.runs.jobs import guarded

log = logging.getLogger(__name__)
MAXIMUM_CONFIG = 2**24  # bytes


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="import")
def job(config: DictConfig) -> None:
    guarded(lambda: import_keras(validated(Import, plain(config))), Path())


def main() -> None:
    run_command(job, "import")


def import_keras(config: Import) -> Path:
    """Read a .h5 or .keras file, and write the network that it describes as a checkpoint.

    Raises:
        UserError: the file is damaged, or has a layer that `ConvNet` cannot express.
    """
    path, output = Path(config.keras), Path(config.output)
    if not path.is_file():
        raise UserError(f"keras={path} does not exist: give a .h5 or .keras file")
    try:
        import h5py
    except ImportError:
        raise UserError(f"keras={path} needs a package that is not installed: pip install 'mnist-cnn[keras]'") from None
    try:
        if zipfile.is_zipfile(path):
            model, weights = _of_zip(path)
            with h5py.File(weights, "r") as file:
                network = converted(json.loads(model), file, config.divide_by_255)
        else:
            with h5py.File(path, "r") as file:
                model = file.attrs["model_config"]
                network = converted(json.loads(model), file["model_weights"], config.divide_by_255)
    except (OSError, KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a whole Keras model with its architecture ({reason:.200})") from None
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error!s:.200})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    write(network, output)
    log.info("%s", output)
    return output


def _of_zip(path: Path) -> tuple[str, io.BytesIO]:
    """config.json and the weights of a .keras file; nothing is read that would swell beyond the largest network."""
    with zipfile.ZipFile(path) as archive:
        config, weights = (archive.getinfo(name) for name in ("config.json", "model.weights.h5"))
        if config.file_size > MAXIMUM_CONFIG or weights.file_size > 8 * MAXIMUM_PARAMETERS:
            raise UserError("its records are larger than any network of this package")
        if weights.file_size > 100 * max(weights.compress_size, 1):
            raise UserError("it is compressed beyond what weights can be")
        return archive.read(config).decode(), io.BytesIO(archive.read(weights))


def write(network: Converted, output: Path) -> None:
    """The checkpoint; it says nothing of the data but that it was MNIST's."""
    import torch

    from mnist_cnn.models.checkpoint import FORMAT, Description, save_weights
    from mnist_cnn.models.convnet import ConvNet
    from mnist_cnn.runs.folder import versions

    net = ConvNet(network.specification, network.classes, network.mean, network.standard_deviation)
    state = net.state_dict()
    for name, value in network.weights.items():
        state[name].copy_(torch.from_numpy(value))
    about: dict[str, Any] = {
        "format": FORMAT,
        "architecture": net.specification.model_dump(),
        "classes": [str(number) for number in range(network.classes)],
        "data": {"name": "mnist", "validation": 0, "validation_from": "last", "normalization": "unit", "seed": 0},
        "versions": versions(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    save_weights(output, validated(Description, about), {f"network.{name}": value for name, value in state.items()})


if __name__ == "__main__":
    main()

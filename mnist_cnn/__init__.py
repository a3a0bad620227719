"""PyTorch Lightning and Hydra for MNIST convnets.

`train` and `load_classifier` do what the commands do. `DigitClassifier`, `MNISTDataModule` and `ConvNet` are a
LightningModule, a LightningDataModule and a network, for a `pl.Trainer` of your own.
"""

import importlib
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnist_cnn.data.datamodule import MNISTDataModule
    from mnist_cnn.inference.classifier import load_classifier
    from mnist_cnn.models.convnet import ConvNet
    from mnist_cnn.train import train
    from mnist_cnn.training.module import DigitClassifier

__all__ = ["ConvNet", "DigitClassifier", "MNISTDataModule", "load_classifier", "train"]

_PLACES = {
    "ConvNet": "mnist_cnn.models.convnet",
    "DigitClassifier": "mnist_cnn.training.module",
    "MNISTDataModule": "mnist_cnn.data.datamodule",
    "load_classifier": "mnist_cnn.inference.classifier",
    "train": "mnist_cnn.train",
}


def __getattr__(name: str) -> Any:
    """Import torch only when something needs it: `--help` and refused settings answer at once."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def main() -> None:
    """Each command, by the name that it was started by; no entry point can name the module `import`."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # else Ctrl-C would show what was being imported
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    importlib.import_module(f"mnist_cnn.{Path(sys.argv[0]).stem.removeprefix('mnist-')}").main()

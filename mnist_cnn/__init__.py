"""PyTorch Lightning and Hydra for MNIST convnets: `train` and `load_classifier` are the Python interface."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnist_cnn.inference.classifier import load_classifier
    from mnist_cnn.train import train

__all__ = ["load_classifier", "train"]


def __getattr__(name: str) -> Any:
    """Import torch only when something needs it: `--help` and refused settings answer at once."""
    if name == "load_classifier":
        from mnist_cnn.inference.classifier import load_classifier

        return load_classifier
    if name == "train":
        from mnist_cnn.train import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What the tests share: the shipped configurations, real MNIST where it is, and commands run as a user does."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
CONF = REPOSITORY / "conf"
TUTORIALS = ["conv30_70", "conv32_32_dropout", "conv64_128", "conv10", "conv32_64_64"]
ARCHITECTURES = {
    "conv30_70": 195_860,
    "conv32_32_dropout": 600_810,
    "conv64_128": 485_514,
    "conv10": 145_370,
    "conv32_64_64": 93_322,
    "mlp": 407_050,
}


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """The folder of the real MNIST; the test is skipped where there is none."""
    root = Path(os.environ.get("MNIST_CNN_DATA") or REPOSITORY.parent / "shared" / "data")
    if not (root / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file():
        pytest.skip(f"no MNIST in {root}; set MNIST_CNN_DATA to a folder that has it")
    return root

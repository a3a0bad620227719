"""What the tests share: the shipped configurations, real MNIST where it is, and commands run as a user does."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

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


class Ended(NamedTuple):
    status: int
    out: str
    err: str

    def folder(self) -> Path:
        """The run's folder, which a command names last."""
        return Path(self.out.strip().splitlines()[-1])


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a command in this process as a user types it, in an empty folder; a process of its own takes seconds more."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def command(name: str, *words: str) -> Ended:
        module = importlib.import_module(f"mnist_cnn.{name.removeprefix('mnist-')}")
        monkeypatch.setattr(sys, "argv", [name, *words])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            module.main()
        return Ended(ended.value.code, *capsys.readouterr())

    return command


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A finished run on scikit-learn's digits, for the tests that only read one."""
    from mnist_cnn import train

    before = Path.cwd()
    folder = tmp_path_factory.mktemp("trained")
    os.chdir(folder)
    try:
        train(["data=digits", "epochs=3", "architecture=conv10"])
    finally:
        os.chdir(before)
    return next((folder / "outputs" / "train").iterdir())


@pytest.fixture(scope="session")
def swept(tmp_path_factory) -> Path:
    """A finished study of two trials on scikit-learn's digits, from a process of its own."""
    folder = tmp_path_factory.mktemp("swept") / "study"
    words = ("sweep=learning_rate", "trials=2", "data=digits", "epochs=1", "architecture=conv10", f"folder={folder}")
    subprocess.run([sys.executable, "-m", "mnist_cnn.sweep", *words], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def digit(tmp_path_factory) -> Path:
    """A picture of 28×28 of the first of scikit-learn's test digits."""
    from PIL import Image

    from mnist_cnn.datasets import load

    path = tmp_path_factory.mktemp("pictures") / "digit 0 (first).png"
    Image.fromarray(load("digits", "unused")[1].images[0, 0].numpy()).save(path)
    return path

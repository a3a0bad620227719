"""MNIST's family from torchvision and scikit-learn's digits, as uint8 tensors checked by checksum."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import logging
import socket
import sys
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from torch import Tensor

from mnist_cnn.schema import UserError

log = logging.getLogger(__name__)

# md5 of the uncompressed files. MNIST's are the widely published ones; Fashion-MNIST's are those of the files
# at github.com/zalandoresearch/fashion-mnist. KMNIST's are published for the .gz only: those are checked instead.
MD5 = {
    "MNIST": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
    "KMNIST": {},
}
TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
CLASSES = {  # as torchvision has them, without importing it
    "mnist": [str(digit) for digit in range(10)],
    "digits": [str(digit) for digit in range(10)],
    "fashion_mnist": [
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ],
    "kmnist": ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"],
}
SECONDS_TO_WAIT_FOR_A_MIRROR = 20


class Digits(NamedTuple):
    """Images are uint8 (N, 1, 28, 28), ink bright; labels are int64 (N,)."""

    images: Tensor
    labels: Tensor


def load(name: str, root: str | Path) -> tuple[Digits, Digits]:
    """The training digits and the test digits of `name`, from `root` or downloaded there.

    MNIST, Fashion-MNIST and KMNIST have 60,000 and 10,000; scikit-learn's digits 1,437 and 360.

    Raises:
        UserError: a file is missing and cannot be fetched, is cut short, or is not the published one.
    """
    if name == "digits":
        return _scikit_learn_digits()
    import torchvision

    dataset_class = getattr(torchvision.datasets, TORCHVISION[name])
    folder = Path(root) / TORCHVISION[name] / "raw"
    if not all((folder / _raw(file)).is_file() for file, _ in dataset_class.resources):
        _download(dataset_class, Path(root), folder)
    for file, md5 in dataset_class.resources:
        _verify(folder / _raw(file), MD5[TORCHVISION[name]].get(_raw(file)), md5)
    parts = [dataset_class(str(root), train=train) for train in (True, False)]
    train, test = (Digits(part.data.unsqueeze(1), part.targets.to(torch.int64)) for part in parts)
    return train, test


def _raw(file: str) -> str:
    return file.removesuffix(".gz")


def _verify(file: Path, md5: str | None, gz_md5: str) -> None:
    """Compare with the published md5; where only the .gz has one, with the .gz beside it."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    if md5 is not None:
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != md5:
            raise UserError(
                f"{file} is not the published file: it has {len(content):,} bytes and md5 {found}, expected md5 {md5}; "
                "remove it and run the command again to download it"
            )
        return
    archive = file.with_name(file.name + ".gz")
    if not archive.is_file():
        raise UserError(f"{file} cannot be checked: put {archive.name} (md5 {gz_md5}) beside it")
    packed = archive.read_bytes()
    # A gzip file ends with the checksum and the length of what it holds (RFC 1952).
    expected = zlib.crc32(content).to_bytes(4, "little") + (len(content) % 2**32).to_bytes(4, "little")
    if hashlib.md5(packed, usedforsecurity=False).hexdigest() != gz_md5 or packed[-8:] != expected:
        raise UserError(
            f"{file} and {archive.name} are not the published files (expected md5 {gz_md5} for the .gz); "
            "remove both and run the command again to download them"
        )


def _download(dataset_class: type, root: Path, folder: Path) -> None:
    """Fetch by torchvision into a temporary folder, then move whole files: one process at a time."""
    name = dataset_class.__name__
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / ".download.lock"):
            files = [_raw(file) for file, _ in dataset_class.resources]  # type: ignore[attr-defined]
            if all((folder / file).is_file() for file in files):
                return  # another process was faster
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as temporary:
                _fetch(dataset_class, temporary)
                for file in sorted(Path(temporary, name, "raw").iterdir()):
                    file.replace(folder / file.name)
    except OSError as error:
        raise UserError(
            f"{name} is not in {root} and cannot be written there: {error.strerror or error}; "
            "set data.root or MNIST_CNN_DATA to another folder, or use data=digits"
        ) from None


def _fetch(dataset_class: type, temporary: str) -> None:
    log.info("downloading %s", dataset_class.__name__)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS_TO_WAIT_FOR_A_MIRROR)  # torchvision sets none and would wait for ever
    bars = sys.stderr if sys.stderr.isatty() else io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(bars):
            dataset_class(temporary, download=True)
    except (RuntimeError, OSError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        mirrors = ", ".join(dataset_class.mirrors)  # type: ignore[attr-defined]
        reason = " ".join(str(error).split())
        raise UserError(
            f"{dataset_class.__name__} could not be downloaded; tried {mirrors} ({reason}). Put the files into "
            f"ROOT/{dataset_class.__name__}/raw and set data.root=ROOT, or set MNIST_CNN_DATA to a folder that has "
            "them, or use data=digits, which needs no download"
        ) from None
    finally:
        socket.setdefaulttimeout(before)


def _scikit_learn_digits() -> tuple[Digits, Digits]:
    """scikit-learn's 1,797 digits of 8×8 in MNIST's form: 0–255, 20×20, centred in 28×28; stratified split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float().unsqueeze(1) * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=(20, 20), mode="bilinear", align_corners=False)
    images = torch.nn.functional.pad(large.round().to(torch.uint8), (4, 4, 4, 4))
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=360, stratify=bunch.target, random_state=0)
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])

"""MNIST's family from torchvision and scikit-learn's digits, as uint8 tensors checked by checksum."""

from __future__ import annotations

import functools
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mnist_cnn.config.schema import UserError
from mnist_cnn.data.download import alone, download, md5_of

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
    files = [file for file in sorted((Path(root) / TORCHVISION[name] / "raw").glob("*-ubyte")) if file.is_file()]
    if len(files) < 4:
        return _load(name, root)
    return _load_once(name, str(root), tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@functools.lru_cache(maxsize=1)
def _load_once(name: str, root: str, _: tuple[tuple[int, int], ...]) -> tuple[Digits, Digits]:
    """Read once for all jobs of a sweep, for as long as the files keep their sizes and times."""
    return _load(name, root)


def _load(name: str, root: str | Path) -> tuple[Digits, Digits]:
    import torchvision

    dataset = getattr(torchvision.datasets, TORCHVISION[name])
    folder = Path(root) / TORCHVISION[name] / "raw"
    found, faults = _read(folder, dataset)
    if faults:
        try:
            with alone(folder):
                found, faults = _read(folder, dataset)  # another process may have been faster
                for archive, fault in faults.items():
                    found[archive] = download(folder, archive, fault, dataset)
        except OSError as error:
            raise UserError(
                f"{next(iter(faults.values()))}, and {root} cannot be written: {error.strerror or error}; "
                "set data.root or MNIST_CNN_DATA to another folder, or use data=digits"
            ) from None
    # idx: images have a header of 16 bytes, labels of 8. The checksum has said that all else is as it should be.
    images, labels, test_images, test_labels = (
        torch.frombuffer(bytearray(found[archive]), dtype=torch.uint8, offset=offset)
        for (archive, _), offset in zip(dataset.resources, (16, 8, 16, 8), strict=True)
    )
    train = Digits(images.view(-1, 1, 28, 28), labels.to(torch.int64))
    return train, Digits(test_images.view(-1, 1, 28, 28), test_labels.to(torch.int64))


def _read(folder: Path, dataset: Any) -> tuple[dict[str, bytes], dict[str, str]]:
    """The files of a data set that are as published, and what is wrong with the others, by their archive's name."""
    found, faults = {}, {}
    for archive, md5 in dataset.resources:
        try:
            found[archive] = _checked(folder, archive, md5, MD5[dataset.__name__].get(_raw(archive)))
        except UserError as fault:
            faults[archive] = str(fault)
    return found, faults


def _raw(file: str) -> str:
    return file.removesuffix(".gz")


def _checked(folder: Path, archive: str, gz_md5: str, md5: str | None) -> bytes:
    """A file's content, compared with the published md5; where only the .gz has one, with the .gz beside it."""
    file = folder / _raw(archive)
    try:
        content = file.read_bytes()
        if md5 is not None:
            if (found := md5_of(content)) != md5:
                it_has = f"it has {len(content):,} bytes and md5 {found}, expected md5 {md5}"
                raise UserError(f"{file} is not the published file ({it_has})")
            return content
        packed = (folder / archive).read_bytes()
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    # A gzip file ends with the checksum and the length of what it holds (RFC 1952).
    expected = zlib.crc32(content).to_bytes(4, "little") + (len(content) % 2**32).to_bytes(4, "little")
    if md5_of(packed) != gz_md5 or packed[-8:] != expected:
        raise UserError(f"{file} and {archive} are not the published files (expected md5 {gz_md5} for the .gz)")
    return content


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

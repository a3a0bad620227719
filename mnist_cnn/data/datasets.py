"""Every data set by name, as uint8 tensors: read, checked, downloaded where it is missing."""

from __future__ import annotations

import functools
import importlib
import string
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mnist_cnn.config.architecture import IMAGE_SIZE
from mnist_cnn.config.schema import UserError
from mnist_cnn.data.download import download, md5_of, only_downloader, through_torchvision
from mnist_cnn.data.image_folder import read_folder

# Digits at once without gradients: more would leave a CPU's caches, and be half as fast.
CPU_BATCH, ACCELERATOR_BATCH = 100, 2000

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
DIGITS = list(string.digits)
CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


class Digits(NamedTuple):
    """Images are uint8 (N, 1, 28, 28), ink bright; labels are int64 (N,)."""

    images: Tensor
    labels: Tensor


class DataSet(NamedTuple):
    """What a loader gives; labels are indices of `classes`, by their names."""

    train: Digits
    test: Digits
    classes: list[str]


def load(name: str, root: str | Path, test: float | None = None) -> DataSet:
    """A data set by its name, from `root` or downloaded there.

    Args:
        name: a key of `LOADERS`; or `module.function` of the user's own, which is called without arguments and returns
            train, test and classes: pairs of images uint8 (N, 28, 28) or (N, 1, 28, 28) with labels (N,), and names.
        root: a folder.
        test: of a folder of pictures without a test part: the fraction that becomes one.

    Raises:
        UserError: a file is missing and cannot be fetched, is cut short, or is not the published one; or the user's
            own function is not there, or fails.
    """
    if name in LOADERS:
        return LOADERS[name](Path(root))
    if name == "folder":
        (train, test_part), classes = read_folder(Path(root), test or 0.2)
        return DataSet(_digits(*train), _digits(*test_part), classes)
    return _load_own(name)


def _load_own(name: str) -> DataSet:
    module, _, function = name.rpartition(".")
    try:
        train, test, classes = getattr(importlib.import_module(module), function)()
        own = DataSet(_digits(*train), _digits(*test), [str(each) for each in classes])
        if len(set(own.classes)) < len(own.classes):
            raise ValueError("two classes have one name")
        for images, labels in own[:2]:
            fit = len(images) == len(labels) > 0 and labels.min() >= 0 and labels.max() < len(classes)
            if images.dtype != torch.uint8 or not fit:
                raise ValueError(f"expected images uint8 with as many labels, each from 0 to {len(classes) - 1}")
    except (Exception, SystemExit) as error:  # whatever the user's function raises
        raise UserError(f"data._target_={name} gives no data ({type(error).__name__}: {error})") from None
    return own


def _digits(images: Any, labels: Any) -> Digits:
    """Arrays or tensors (N, 28, 28) or (N, 1, 28, 28) and (N,)."""
    if torch.as_tensor(labels).is_floating_point():
        raise ValueError("labels are no whole numbers")
    return Digits(torch.as_tensor(images).reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE), torch.as_tensor(labels).long())


def _mnist(name: str, classes: list[str], root: Path) -> DataSet:
    """MNIST or a data set in its files: 60,000 and 10,000 images."""
    files = [file for file in sorted((root / name / "raw").glob("*-ubyte")) if file.is_file()]
    if len(files) < 4:
        return DataSet(*_read_mnist(name, root), classes)
    found = _read_once(name, root, tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files))
    return DataSet(*found, classes)


@functools.lru_cache(maxsize=1)
def _read_once(name: str, root: Path, _: tuple[tuple[int, int], ...]) -> tuple[Digits, Digits]:
    """Read once for all jobs of a sweep, for as long as the files keep their sizes and times."""
    return _read_mnist(name, root)


def _read_mnist(name: str, root: Path) -> tuple[Digits, Digits]:
    import torchvision

    dataset = getattr(torchvision.datasets, name)
    folder = root / name / "raw"
    found, faults = _read(folder, dataset)
    if faults:
        try:
            with only_downloader(folder):
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


def _emnist(split: str, classes: list[str], root: Path) -> DataSet:
    """EMNIST's digits and letters (Cohen et al., 2017), whose files have rows and columns exchanged."""
    first = 1 if split == "letters" else 0  # its letters are counted from 1
    parts = [through_torchvision("EMNIST", root, split=split, train=train) for train in (True, False)]
    train, test = (_digits(part.data.mT.contiguous(), part.targets - first) for part in parts)
    return DataSet(train, test, classes)


def _qmnist(root: Path) -> DataSet:
    """MNIST made anew from NIST's files (Yadav and Bottou, 2019), with all 60,000 test digits."""
    parts = [through_torchvision("QMNIST", root, what=what) for what in ("train", "test")]
    train, test = (_digits(part.data, part.targets[:, 0]) for part in parts)
    return DataSet(train, test, DIGITS)


def _usps(root: Path) -> DataSet:
    """7,291 and 2,007 digits of 16×16 from envelopes (Hull, 1994), in MNIST's form."""
    parts = [through_torchvision("USPS", root, train=train) for train in (True, False)]
    train, test = (_digits(_enlarged(torch.from_numpy(part.data)), part.targets) for part in parts)
    return DataSet(train, test, DIGITS)


def _scikit_learn_digits(_: Path) -> DataSet:
    """scikit-learn's 1,797 digits of 8×8 in MNIST's form, a stratified part of 360 as the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = _enlarged(torch.from_numpy(bunch.images) * (255 / 16))
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=360, stratify=bunch.target, random_state=0)
    return DataSet(Digits(images[train], labels[train]), Digits(images[test], labels[test]), DIGITS)


def _enlarged(images: Tensor) -> Tensor:
    """Small square images (N, h, h) of 0–255 to uint8 (N, 1, 28, 28), scaled to 20×20 as MNIST's are."""
    small = images.float().unsqueeze(1)
    large = torch.nn.functional.interpolate(small, size=(20, 20), mode="bilinear", align_corners=False)
    return torch.nn.functional.pad(large.round().to(torch.uint8), (4, 4, 4, 4))


LOADERS: dict[str, Callable[[Path], DataSet]] = {
    "mnist": functools.partial(_mnist, "MNIST", DIGITS),
    "fashion_mnist": functools.partial(_mnist, "FashionMNIST", CLOTHES),
    "kmnist": functools.partial(_mnist, "KMNIST", ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]),
    "qmnist": _qmnist,
    "emnist_digits": functools.partial(_emnist, "digits", DIGITS),
    "emnist_letters": functools.partial(_emnist, "letters", list(string.ascii_lowercase)),
    "emnist_balanced": functools.partial(_emnist, "balanced", [*DIGITS, *string.ascii_uppercase, *"abdefghnqrt"]),
    "usps": _usps,
    "digits": _scikit_learn_digits,
}

"""MNIST's family and scikit-learn's digits as uint8 tensors: read, checked by md5, downloaded where missing."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import logging
import os
import time
import zlib
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from mnist_cnn.config.schema import UserError
from mnist_cnn.runs.folder import write_whole

log = logging.getLogger(__name__)

# Digits at once without gradients: more would leave a CPU's caches, and be half as fast.
CPU_BATCH, ACCELERATOR_BATCH = 100, 2000
SECONDS_TO_WAIT_FOR_A_MIRROR = 20
SECONDS_BETWEEN_ROUNDS = (1, 3)  # a mirror that was busy or cut the connection is asked again after these
MAXIMUM_ARCHIVE = 2**28  # bytes; the largest published one has 30 MB

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


# --- fetching ---------------------------------------------------------------------------------------------


def md5_of(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def only_downloader(folder: Path) -> Iterator[None]:
    """One process at a time downloads into `folder`; one that fails takes its lock and empty folders away."""
    own = [path for path in (folder.parent, folder.parent.parent) if not path.exists()]
    lock = FileLock(folder.parent / ".download.lock")
    while not lock.is_locked:
        folder.parent.mkdir(parents=True, exist_ok=True)  # one that failed may just have taken it away
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=1)
    try:
        folder.mkdir(exist_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):  # files are in it
            folder.rmdir()
        Path(lock.lock_file).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # or another process waits
            for path in own:
                path.rmdir()
        lock.release()


def download(folder: Path, archive: str, fault: str, dataset: Any) -> bytes:
    """A file fetched from the first mirror that has the published one; it and its archive are left in `folder`.

    Raises:
        UserError: no mirror has it; the message has what each said.
    """
    own = os.environ.get("MNIST_CNN_MIRRORS", "").split()  # laid out as data.root is
    mirrors = [f"{mirror.rstrip('/')}/{dataset.__name__}/raw/" for mirror in own] or dataset.mirrors
    md5 = dict(dataset.resources)[archive]
    said: dict[str, str] = {}
    asked = list(mirrors)
    for wait in (*SECONDS_BETWEEN_ROUNDS, 0):
        for mirror in list(asked):
            log.info("downloading %s%s", mirror, archive)
            try:
                packed = _fetched(mirror + archive, md5)
            except (OSError, HTTPException, ValueError) as error:
                said[mirror] = _reason(error)
                if not _may_pass(error):
                    asked.remove(mirror)
                continue
            content = gzip.decompress(packed)
            write_whole(folder / archive, packed)
            write_whole(folder / archive.removesuffix(".gz"), content)
            return content
        if not asked:
            break
        time.sleep(wait)
    answers = "; ".join(f"{mirror}: {reason}" for mirror, reason in said.items())
    raise UserError(
        f"{fault}, and {archive} could not be downloaded ({answers}). "
        f"Put the files into ROOT/{dataset.__name__}/raw and set data.root=ROOT, or set MNIST_CNN_DATA to a folder "
        "that has them, or MNIST_CNN_MIRRORS to the address of one, or use data=digits, which needs no download"
    )


def _fetched(address: str, md5: str) -> bytes:
    request = Request(address, headers={"User-Agent": "mnist_cnn"})
    with urlopen(request, timeout=SECONDS_TO_WAIT_FOR_A_MIRROR) as response:
        content: bytes = response.read(MAXIMUM_ARCHIVE)
        if missing := getattr(response, "length", None):
            raise ConnectionError(f"broke off, {missing:,} bytes are missing")
    if md5_of(content) != md5:
        raise ConnectionError(f"sent {len(content):,} bytes that are not the published file")
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"{error.code} {error.reason}"
    cause = error.reason if isinstance(error, URLError) else error
    return " ".join(str(getattr(cause, "strerror", None) or cause or type(cause).__name__).split())


def _may_pass(error: Exception) -> bool:
    """Whether to ask the mirror again: not where it is not reached, or has said that it has no such file for us."""
    if isinstance(error, HTTPError):
        return error.code >= 500 or error.code == 429
    if isinstance(error, URLError):
        return isinstance(error.reason, TimeoutError)
    return not isinstance(error, ValueError)

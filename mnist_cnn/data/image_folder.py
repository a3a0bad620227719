"""A folder of labelled pictures as arrays in MNIST's form; each picture is read once, then kept beside them."""

from __future__ import annotations

import re
import zipfile
import zlib
from contextlib import suppress
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mnist_cnn.config.architecture import IMAGE_SIZE
from mnist_cnn.config.schema import ONE_LINE, UserError
from mnist_cnn.pictures.digit_image import mnist_form
from mnist_cnn.pictures.image_files import pictures_below, read_picture
from mnist_cnn.runs.files import write_whole

KEPT = ".mnist_cnn.npz"  # in the folder: each picture's 28×28, for as long as its size and time are the same

Part = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images (N, 28, 28) and labels (N,)


def read_folder(root: Path, test: float) -> tuple[tuple[Part, Part], list[str]]:
    """Pictures in `root/<class>/`, or in `root/train/<class>/` and `root/test/<class>/` (torchvision's ImageFolder).

    Args:
        root: the folder.
        test: the fraction of each class that is the test part, where there is no folder test.

    Returns:
        The training part, the test part, and the classes: the names of the folders, in order.

    Raises:
        UserError: there are no classes, a class has too few pictures, or a picture cannot be read; it is named.
    """
    if not root.is_dir():
        raise UserError(f"data.root={root} is no folder: give one with a folder of pictures for each class")
    train = root / "train" if (root / "train").is_dir() else root
    if train == root and (root / "test").is_dir():
        raise UserError(f"{root} has a folder test and none called train: give both, or a folder for each class")
    classes = class_folders(train)
    if len(classes) < 2:
        raise UserError(
            f"{train} has {len(classes)} folders of classes: expected two or more, as {train}/<class>/*.png"
        )
    if odd := [name for name in classes if not re.search(ONE_LINE, name)]:
        raise UserError(f"{train} has a folder {odd[0]!r}: the name of a class is one line")
    files, labels = labelled(train, classes)
    counts = np.bincount(labels, minlength=len(classes))
    own_test = train != root and (root / "test").is_dir()
    if counts.min() < (1 if own_test else 2):
        remedy = "one" if own_test else "two, one of them to test"
        few = train / classes[counts.argmin()]
        raise UserError(f"{few} has {counts.min()} pictures: a class needs {remedy}")
    if own_test:
        if unknown := sorted(set(class_folders(root / "test")) - set(classes)):
            raise UserError(f"{root}/test has the class {unknown[0]}, which {train} has not")
        test_files, test_labels = labelled(root / "test", classes)
        if not test_files:
            raise UserError(f"{root}/test has no pictures")
        images = in_mnist_form(root, files + test_files)
        return ((images[: len(files)], labels), (images[len(files) :], test_labels)), classes
    # By their names' checksums: a picture's part does not depend on what else is there, but for the counts.
    order = np.argsort([zlib.crc32(file.relative_to(root).as_posix().encode(errors="replace")) for file in files])
    held_out = np.zeros(len(files), np.bool_)
    for label, count in enumerate(counts):
        held_out[order[labels[order] == label][: min(max(round(test * count), 1), count - 1)]] = True
    images = in_mnist_form(root, files)
    return ((images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])), classes


def class_folders(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))


def labelled(folder: Path, classes: list[str]) -> tuple[list[Path], NDArray[np.int64]]:
    """The pictures of each class, in order of name, and their labels (N,)."""
    files, labels = list[Path](), list[int]()
    for label, name in enumerate(classes):
        found = [Path(file) for file in pictures_below(folder / name)]
        if gone := [file for file in found if not file.is_file()]:
            raise UserError(f"{gone[0]} cannot be read: mend it, or take it out of the folder")
        files += found
        labels += [label] * len(found)
    return files, np.array(labels, np.int64)


def in_mnist_form(root: Path, files: list[Path]) -> NDArray[np.uint8]:
    """Pictures to uint8 (N, 28, 28)."""
    keys = [f"{file.relative_to(root)} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(root / KEPT, allow_pickle=False) as kept:
        if str(kept["version"]) == version("mnist-cnn"):
            known = dict(zip(kept["keys"].tolist(), kept["images"], strict=True))
    new = [(key, file) for key, file in zip(keys, files, strict=True) if key not in known]
    for key, file in new:
        try:
            known[key] = mnist_form(read_picture(file))
        except UserError as error:
            raise UserError(f"{file}: {error}; mend it, or take it out of the folder") from None
    images = np.array([known[key] for key in keys], np.uint8).reshape(-1, IMAGE_SIZE, IMAGE_SIZE)
    if new:
        content = BytesIO()
        np.savez_compressed(content, version=version("mnist-cnn"), keys=np.array(keys), images=images)
        with suppress(OSError):  # a folder that may only be read is read anew each time
            write_whole(root / KEPT, content.getvalue())
    return images

"""Pictures of digits as MNIST has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mnist_cnn.schema import UserError
from mnist_cnn.specification import IMAGE_SIZE

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


def find_pictures(paths: list[str]) -> list[Path]:
    """Files as they are; of folders, every picture below them, in order of name.

    Raises:
        UserError: a path does not exist, or a folder holds no picture.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            pictures = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            if not pictures:
                raise UserError(f"{path} holds no picture: expected files such as *.png")
            found += pictures
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path} does not exist: give a picture or a folder of pictures")
    return found


def read_digit(path: Path) -> NDArray[np.uint8]:
    """A picture in MNIST's form, ink bright on dark, to uint8 (28, 28).

    Raises:
        UserError: the file is not a picture, or has another size.
    """
    try:
        with Image.open(path) as picture:
            if picture.size != (IMAGE_SIZE, IMAGE_SIZE):
                size = "×".join(map(str, picture.size))
                raise UserError(f"{path} is {size}: expected a picture of 28×28 in MNIST's form")
            return np.asarray(picture.convert("L"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a picture that can be read ({str(error).splitlines()[0]})") from None

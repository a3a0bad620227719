"""Pictures from files, folders, globs, lists, arrays and standard input, one after the other. Imports no torch."""

from __future__ import annotations

import glob
import io
import logging
import math
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from mnist_cnn.config.schema import UserError
from mnist_cnn.pictures.digit_image import MAXIMUM_PIXELS, first_line

log = logging.getLogger(__name__)

# Of Pillow's formats those that people have pictures in; EPS and PDF would start other programs.
FORMATS = ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"]
FORMATS += [name for name, codec in (("AVIF", "avif"), ("JPEG2000", "jpg_2000")) if features.check(codec)]
ENDINGS = {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif"}
ENDINGS |= {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k"}
ARRAY_ENDINGS = {".npy", ".npz"}
# Larger pictures are averaged down, so that none takes gigabytes; a page of A4 at 300 dpi has 8.7 million.
REDUCED_ABOVE, REDUCED_ABOVE_IF_TRANSPARENT = 12_000_000, 4_000_000  # pixels
MAXIMUM_ARRAY = 2**29  # bytes of an array in a .npz, which is read whole


class PictureSource(NamedTuple):
    """A picture that has been found and not yet read; `read` returns it or raises UserError."""

    name: str
    read: Callable[[], Image.Image | NDArray[Any]]


def find_pictures(words: Iterable[str], as_bytes: bool = False) -> Iterator[PictureSource]:
    """The pictures that `images=` names, in that order; a picture that cannot be read raises in its `read` only.

    Args:
        words: paths, folders (every picture below, in order of name), globs, `@list.txt`, or `-` for standard input.
        as_bytes: `-` is the bytes of one picture, and not a list of paths.

    Raises:
        UserError: a path does not exist, or holds no picture.
    """
    words = list(words)
    for word in words:
        yield from _going_on(_named(word, as_bytes), word, alone=len(words) == 1)


def _named(word: str, as_bytes: bool) -> Iterator[PictureSource]:
    if word == "-" and as_bytes:
        content = sys.stdin.buffer.read()
        yield PictureSource("-", partial(read_picture, io.BytesIO(content)))
    elif word == "-":
        yield from _in_list(line.rstrip("\r\n") for line in sys.stdin)
    elif word.startswith("@") and not exists(word):
        try:
            text = Path(word[1:]).expanduser().read_text(encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            raise UserError(f"{word[1:]} cannot be read as a list of paths ({error})") from None
        if "\0" in text:
            raise UserError(f"{word[1:]} cannot be read as a list of paths (it is binary)")
        yield from _in_list(text.split("\n"))  # names may hold what else splitlines() takes for an end
    elif exists(word):
        yield from _at(word)
    elif glob.has_magic(word):
        found = sorted(path for path in glob.iglob(word, recursive=True) if Path(path).is_file())  # noqa: PTH207 — also absolute ones
        if not found:
            raise UserError(f"{word} matches no file")
        yield from _in_list(found)
    else:
        raise UserError(f"{word} does not exist: give a picture, a folder of pictures, a glob or @list.txt")


def _in_list(paths: Iterable[str]) -> Iterator[PictureSource]:
    for path in filter(str.strip, paths):
        yield from _going_on(_at(path), path)


def _going_on(sources: Iterator[PictureSource], name: str, alone: bool = False) -> Iterator[PictureSource]:
    """The pictures that an entry of a list names; what is wrong with it is an error of that entry alone."""
    found = False
    try:
        for source in sources:
            yield source
            found = True
    except UserError as error:
        if alone and not found:
            raise
        yield PictureSource(name, partial(_refuse, str(error).removeprefix(f"{name} ")))


def _refuse(reason: str) -> NoReturn:
    raise UserError(reason)


def exists(path: str) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - Path has an error for a name that is too long


def _at(path: str) -> Iterator[PictureSource]:
    if os.path.isdir(path):  # noqa: PTH112
        yield from _in_folder(path)
    elif Path(path).suffix.lower() in ARRAY_ENDINGS or "idx3-ubyte" in Path(path).name:
        for name, array in _read_arrays(Path(path)):
            yield from _in_array(name, array)
    else:
        yield PictureSource(path, partial(read_picture, path))


def _in_folder(folder: str) -> Iterator[PictureSource]:
    found = pictures_below(folder)
    if not found:
        raise UserError(f"{folder} holds no picture: expected files such as *.png")
    for path in found:
        yield PictureSource(path, partial(read_picture, path))


def pictures_below(folder: str | Path) -> list[str]:
    """The pictures in a folder and below it, in order of name; hidden files are left out, others with a warning.

    A file without an ending is one where it begins as one does.
    """
    found, others = list[str](), list[str]()
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "." and name != "__MACOSX"]
        for name in names:
            if name[0] != ".":
                # Making a Path takes longer than reading a small picture.
                path, ending = os.path.join(parent, name), os.path.splitext(name)[1].lower()  # noqa: PTH118, PTH122
                picture = ending in ENDINGS or (not ending and _begins_as_picture(path))
                (found if picture else others).append(path)
    if others:
        count = "1 file" if len(others) == 1 else f"{len(others)} files"
        endings = ", ".join(sorted({os.path.splitext(path)[1].lower() or "no ending" for path in others}))  # noqa: PTH122
        log.warning("warning: left out as no picture: %s (%.200s), such as %s", count, endings, min(others))
    return sorted(found)


def _begins_as_picture(path: str) -> bool:
    try:
        with Image.open(_regular(path), formats=FORMATS):
            return True
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _read_arrays(path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """The arrays of a .npy, .npz or idx file with their names; mapped where that is possible."""
    try:
        _regular(path)
        if path.suffix.lower() == ".npy":
            yield str(path), np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:
                for record in archive.infolist():
                    if record.file_size > MAXIMUM_ARRAY:
                        raise ValueError(f"an array of more than {MAXIMUM_ARRAY:,} bytes")
                    _refuse_more_than_there_is(archive, record)
            with np.load(path, allow_pickle=False) as file:
                for name in file.files:
                    array = file[name]
                    if not isinstance(array, np.ndarray):
                        raise ValueError(f"{name} is no array")
                    yield f"{path}:{name}", array
        else:
            yield str(path), _read_idx(path)
    except Exception as error:  # numpy has no one error for a bad file
        raise UserError(f"{path} holds no array that can be read ({first_line(error):.200})") from None


def _refuse_more_than_there_is(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> None:
    """Raise ValueError where an array says that it is larger than its record: numpy takes the memory at once."""
    with archive.open(record) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    if math.prod(shape) * max(dtype.itemsize, 1) > record.file_size or dtype.itemsize > record.file_size:
        raise ValueError(f"{record.filename} is shorter than an array of {shape} is")


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """A file in MNIST's own format: 0x803, count, rows and columns as big-endian int32, then the pixels."""
    with path.open("rb") as file:
        header = np.frombuffer(file.read(16), ">i4")
    if len(header) != 4 or header[0] != 0x803 or (header[1:] < 1).any():
        raise ValueError("not an idx file of uint8 images")
    shape = tuple(int(size) for size in header[1:])
    if 16 + math.prod(shape) > path.stat().st_size:
        raise ValueError(f"it is shorter than images of {shape} are")
    return np.memmap(path, np.uint8, "r", offset=16, shape=shape)


def _in_array(name: str, array: NDArray[Any]) -> Iterator[PictureSource]:
    """An array (H, W) or (H, W, 3 or 4) is a picture; (N, H, W), (N, 1, H, W) and (N, H, W, 3 or 4) are N."""
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    is_one = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not is_one and array.ndim not in (3, 4):
        raise UserError(f"{name} has shape {array.shape}: expected (H, W), (N, H, W) or (N, 1, 28, 28)")
    if math.prod(array.shape[-3 if array.ndim > 2 and array.shape[-1] in (3, 4) else -2 :][:2]) > MAXIMUM_PIXELS:
        raise UserError(f"{name} has shape {array.shape}; at most {MAXIMUM_PIXELS:,} pixels of a picture are read")
    if not array.size:
        raise UserError(f"{name} has shape {array.shape}: it holds no picture")
    if is_one:
        yield PictureSource(name, partial(np.asarray, array))
    else:
        picture_at = np.asarray(array).__getitem__  # not of the memmap itself, which numpy indexes half as fast
        for index in range(len(array)):
            yield PictureSource(f"{name}[{index}]", partial(picture_at, index))


def read_picture(file: str | Path | io.BytesIO) -> Image.Image:
    """Read and decode a picture of one of `FORMATS`, of several frames the first; a large one is scaled down.

    Raises:
        UserError: it is missing, is none of these, is cut short, or has more than 65 million pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(file if isinstance(file, io.BytesIO) else _regular(file), formats=FORMATS)
            if picture.width * picture.height > MAXIMUM_PIXELS:
                raise UserError(f"{picture.width}×{picture.height} pixels; at most {MAXIMUM_PIXELS:,} are read")
            with _without_stderr() if picture.format == "TIFF" else nullcontext():
                picture.load()
            limit = REDUCED_ABOVE_IF_TRANSPARENT if picture.has_transparency_data else REDUCED_ABOVE
            factor = math.ceil(math.sqrt(picture.width * picture.height / limit))
            return picture if factor == 1 else _reduce(picture, factor)
    except FileNotFoundError:
        raise UserError("does not exist") from None
    except UnidentifiedImageError:
        raise UserError(f"is not a picture that can be read (expected {', '.join(FORMATS)})") from None
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError) as error:
        raise UserError(f"is not a picture that can be read ({first_line(error):.200})") from None


def _regular(path: str | Path) -> str | Path:
    """A path, if it is not that of a pipe or a device, which may have no end."""
    if not os.path.isfile(path) and os.path.exists(path):  # noqa: PTH110, PTH113
        raise UserError(f"{path} is no regular file")
    return path


@contextmanager
def _without_stderr() -> Iterator[None]:
    """libtiff writes its complaints straight to the process's stderr; its exception says enough."""
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


def _reduce(picture: Image.Image, factor: int) -> Image.Image:
    """A picture at 1/factor of its size, strip by strip: Pillow would convert the whole of it at once."""
    grey = picture.mode in ("1", "L", "I", "F") or picture.mode.startswith("I;16")
    mode = "RGBA" if picture.has_transparency_data else ("F" if picture.mode[0] in "IF" else "L") if grey else "RGB"
    small = Image.new(mode, (-(-picture.width // factor), -(-picture.height // factor)))
    for top in range(0, picture.height, 64 * factor):
        strip = picture.crop((0, top, picture.width, min(top + 64 * factor, picture.height)))
        small.paste(strip.convert(mode).reduce(factor), (0, top // factor))
    small.info["reduced_by"] = factor
    if "exif" in picture.info:
        small.info["exif"] = picture.info["exif"]  # which way is up
    return small

"""Any picture of one digit in MNIST's own form, as its authors describe it (yann.lecun.com/exdb/mnist, 1998):

the digit scaled into 20×20 with its aspect ratio kept and its edges anti-aliased, its centre of mass moved to the
centre of 28×28, the ink bright. The commands and the Python interface share this one implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mnist_cnn.config.architecture import IMAGE_SIZE
from mnist_cnn.config.schema import UserError
from mnist_cnn.pictures.ink import find_ink

Pixels = NDArray[Any]
DIGIT_SIZE = 20  # the digit's longer side, in pixels of 28×28
CENTRE = 14  # the pixel in which MNIST's centres of mass lie
MIDDLE = slice(7, 21)  # rows and columns of 28 that show which is the paper
DARK = 32  # of 255: MNIST's paper is not brighter, nor its ink darker than the rest
MINIMUM_STROKE = 1.5  # thinner strokes are made bolder, in pixels of 28×28: MNIST's own are 2 to 4 wide
BOLD_STROKE = 2.0  # how wide they become
MAXIMUM_PIXELS = 65_000_000  # a camera of 64 megapixels
IN_MNIST_FORM = ("mnist", "qmnist", "folder")  # data sets
SAMPLE = 500_000  # pixels of a large picture from which its colours are judged


def mnist_form(picture: Image.Image | Pixels) -> NDArray[np.uint8]:
    """A picture of one digit to uint8 (28, 28) in MNIST's form: pixels 0–255, ink bright on 0.

    Args:
        picture: a PIL image of any mode, or an array (H, W), (H, W, 3) or (H, W, 4): uint8, uint16, bool, or float
            in 0–1 or 0–255. Dark on light or light on dark, unevenly lit, of any size. An array uint8 (28, 28) that
            is in MNIST's form already comes through unchanged.

    Raises:
        UserError: no digit is found, as on a blank page or in noise, or this is no picture.
    """
    return readings(picture)[0]


def readings(picture: Image.Image | Pixels) -> list[NDArray[np.uint8]]:
    """What a picture of one digit may be in MNIST's form, the most likely first; arguments and errors as of
    `mnist_form`. A network takes the one that it is surest of.

    A picture of 28×28 is also read as it is: a digit in MNIST's frame with lines or spots on it, which the form would
    take for parts of the digit.
    """
    pixels = _pixel_array(picture)
    small = pixels.dtype == np.uint8 and pixels.shape == (IMAGE_SIZE, IMAGE_SIZE)
    if small:
        for form in (pixels, 255 - pixels):
            if in_mnist_form(form):
                return [form]
    inks = find_ink(_flatten_channels(pixels))
    forms = [scale_and_centre(ink) for ink in inks]
    if small:
        middle = pixels[MIDDLE, MIDDLE]
        dark, light = (middle <= DARK).mean(), (middle >= 255 - DARK).mean()
        if dark + light > 0.5:
            digit = pixels if dark >= light else 255 - pixels
            forms = [*forms, digit] if len(inks) == 1 else [digit]
    return forms


def readings_for(data: str, mode: str) -> Callable[[Image.Image | Pixels], list[NDArray[np.uint8]]]:
    """The function that turns a picture into its readings, each uint8 (28, 28), for a network.

    Args:
        data: what the network was trained on. A network of data that are not in MNIST's form takes any picture of
            28×28 as it is.
        mode: any for pictures of all kinds, exact for `exact_form`.
    """
    if mode == "exact":
        return lambda picture: [exact_form(picture)]
    if data in IN_MNIST_FORM:
        return readings

    def read(picture: Image.Image | Pixels) -> list[NDArray[np.uint8]]:
        pixels = _pixel_array(picture)
        exact = pixels.shape == (IMAGE_SIZE, IMAGE_SIZE) and pixels.dtype == np.uint8
        return [pixels] if exact else readings(pixels)

    return read


def exact_form(picture: Image.Image | Pixels) -> NDArray[np.uint8]:
    """A picture that is in MNIST's form to uint8 (28, 28), as it is.

    Raises:
        UserError: it has another size, or is an array of something else than uint8.
    """
    if isinstance(picture, Image.Image) and picture.size == (IMAGE_SIZE, IMAGE_SIZE):
        picture = np.asarray(picture.convert("L"))
    if isinstance(picture, Image.Image):
        raise UserError(f"is {picture.width}×{picture.height}: mode=exact expects 28×28 in MNIST's form")
    if picture.shape != (IMAGE_SIZE, IMAGE_SIZE) or picture.dtype != np.uint8:
        raise UserError(f"is {picture.dtype} {picture.shape}: mode=exact expects uint8 (28, 28)")
    return np.ascontiguousarray(picture)


def visible_pixels(picture: Image.Image | Pixels) -> Pixels:
    """A picture of any kind, upright, to numbers in 0–255 (H, W, 1 or 3); errors as of `mnist_form`."""
    return _flatten_channels(_pixel_array(picture))


def in_mnist_form(digit: NDArray[np.uint8]) -> bool:
    """Whether uint8 (28, 28) is bright on 0, with a longer side of 20 pixels and its centre of mass in the middle.

    All 70,000 digits of MNIST are; 19 pixels are allowed too, as a few of them have.
    """
    if digit.shape != (IMAGE_SIZE, IMAGE_SIZE):
        return False
    rows, columns = (np.flatnonzero(digit.any(axis)) for axis in (1, 0))
    if not len(rows) or digit.max() < 200:
        return False
    side = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    return DIGIT_SIZE - 1 <= side <= DIGIT_SIZE and all(abs(c - CENTRE) <= 0.55 for c in _centre_of_mass(digit))


def _centre_of_mass(ink: Pixels) -> tuple[float, float]:
    rows, columns = (ink.sum(axis, dtype=np.float64) for axis in (1, 0))
    total = rows.sum()
    return float(rows @ np.arange(len(rows)) / total), float(columns @ np.arange(len(columns)) / total)


def _pixel_array(picture: Image.Image | Pixels) -> Pixels:
    return _decode(picture) if isinstance(picture, Image.Image) else _check_array(np.asarray(picture))


def _decode(picture: Image.Image) -> Pixels:
    """A PIL image, turned as its camera says, to (H, W), or (H, W, 3 or 4) of colours."""
    if picture.width * picture.height > MAXIMUM_PIXELS:
        raise UserError(f"{picture.width}×{picture.height} pixels; at most {MAXIMUM_PIXELS:,} are read")
    try:
        picture = ImageOps.exif_transpose(picture) if picture.getexif() else picture
        if picture.has_transparency_data:
            return _check_array(np.asarray(picture.convert("RGBA")))
        if picture.mode in ("L", "RGB", "F", "I") or picture.mode.startswith("I;16"):
            return _check_array(np.asarray(picture))
        return _check_array(np.asarray(picture.convert("L" if picture.mode in ("1", "LA", "La") else "RGB")))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"not a whole picture ({first_line(error)})") from None


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its class's name where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _check_array(pixels: Pixels) -> Pixels:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise UserError(f"an array of shape {pixels.shape} is no picture: expected (H, W), (H, W, 3) or (H, W, 4)")
    if 0 in pixels.shape:
        raise UserError(f"a picture of {pixels.shape[1]}×{pixels.shape[0]} has no pixels")
    if pixels.dtype.kind not in "buif":
        raise UserError(f"an array of {pixels.dtype} is no picture: expected numbers")
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise UserError("a picture with pixels that are NaN or infinite")
    return pixels


def _flatten_channels(pixels: Pixels) -> Pixels:
    """Pixels of any type to numbers in 0–255, (H, W, 1 or 3); transparent parts become paper, or alpha is the ink."""
    if pixels.dtype != np.uint8:
        pixels = pixels.astype(np.float32)
        top = float(pixels.max())
        pixels = pixels * (255 if top <= 1 else 1 if top <= 255 else 1 / 257 if top <= 65535 else 255 / top)
    if pixels.ndim == 2:
        return pixels[..., None]
    if pixels.shape[2] == 3:
        grey = pixels.dtype == np.uint8 and (pixels == pixels[..., :1]).all()
        return pixels[..., :1] if grey else pixels
    colours, alpha = pixels[..., :3], pixels[..., 3:].astype(np.float32)
    opaque = alpha[..., 0] > 127
    if not opaque.any():
        return alpha
    sample = colours[opaque][:: 1 + opaque.size // SAMPLE]
    low, high = np.percentile(sample, (2, 98), axis=0)
    if (high - low).max() < 64 and not opaque.all():
        return alpha  # ink of one colour on nothing
    paper = np.median(sample, axis=0).astype(np.float32)
    return paper + (colours - paper) * alpha / 255


def scale_and_centre(ink: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Ink 0–1 (h, w) of any size to MNIST's form, unless it is in that already."""
    form = np.rint(255 * ink).astype(np.uint8)
    if in_mnist_form(form):
        return form
    top, bottom = _edges(ink.max(1))
    left, right = _edges(ink.max(0))
    height, width = bottom - top, right - left
    scale = DIGIT_SIZE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    ink = _thicken(ink, scale)
    resampling = Image.Resampling.BOX if scale < 0.25 else Image.Resampling.BICUBIC
    # A margin, so that the filter finds paper beyond the digit's edge.
    padded = Image.fromarray(np.pad(ink, 2))
    box = (left + 2, top + 2, right + 2, bottom + 2)
    digit = np.asarray(padded.resize(size, resampling, box=box)).clip(0, 1)
    digit = digit / max(float(np.max(digit)), 1e-6)
    y, x = _centre_of_mass(digit)
    form = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    # Moved by whole pixels only, as MNIST's authors did, so that the digit stays as sharp as it is.
    row = min(max(round(CENTRE - y), 0), IMAGE_SIZE - digit.shape[0])
    column = min(max(round(CENTRE - x), 0), IMAGE_SIZE - digit.shape[1])
    form[row : row + digit.shape[0], column : column + digit.shape[1]] = np.rint(255 * digit)
    return form


def _edges(profile: NDArray[np.float32]) -> tuple[float, float]:
    """Where a profile of ink first and last crosses 0.3 of its height, in fractions of a pixel."""
    level = 0.3 * float(profile.max())
    padded = np.concatenate(([0.0], profile, [0.0]))
    inside = np.flatnonzero(padded >= level)
    first, last = int(inside[0]), int(inside[-1])
    before = first - (padded[first] - level) / (padded[first] - padded[first - 1])
    after = last + (padded[last] - level) / (padded[last] - padded[last + 1])
    return float(before) - 0.5, float(after) - 0.5


def _thicken(ink: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """Ink with thin strokes made about as wide as MNIST's pen; scaled down by `scale` they would fade."""
    from scipy.ndimage import grey_dilation

    mask = ink > 0.5
    edges = np.count_nonzero(mask[1:] != mask[:-1]) + np.count_nonzero(mask[:, 1:] != mask[:, :-1])
    # A stroke's area is its length times its width; its outline, in steps of pixels, about 2.5 lengths.
    stroke = 2.5 * np.count_nonzero(mask) / (edges + 1)
    missing = (MINIMUM_STROKE / scale - stroke) / 2
    if scale > 0.5 or missing < 0.5:
        return ink
    reach = round(missing + (BOLD_STROKE - MINIMUM_STROKE) / scale / 2)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return grey_dilation(np.pad(ink, reach), footprint=x * x + y * y <= reach * reach + 0.5)[reach:-reach, reach:-reach]

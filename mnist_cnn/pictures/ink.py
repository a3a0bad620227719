"""Finds the ink of a digit in a picture: dark on light or light on dark, in any colours, in uneven light."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from mnist_cnn.config.schema import UserError

Ink = NDArray[np.float32]
# A larger picture is averaged down to this side; a digit that is small in it is then cut out and looked at again.
WORKING_SIZE = 192
MINIMUM_CONTRAST = 10.0  # the least difference between ink and paper, of 255
MINIMUM_SIDE = 8  # pixels of a digit's longer side, with its soft edges
MINIMUM_LIGHT = 30  # of 255: darker paper is too noisy to be corrected for uneven light
EVEN = 3  # levels by which even paper may differ, as after JPEG
LONG = 0.12  # of the picture's outline: less of it is crossed by ink, more by a shadow or a table
CLEAR = 0.9  # of the differences' variance between two classes: ink and paper then have a colour each
STROKE_LEVEL = 0.35  # of full ink: above it a pixel belongs to a stroke
FAINT_LEVEL = 0.2  # above it a pixel beside a stroke belongs to it
MINIMUM_COHERENCE = 0.3  # correlation of neighbouring pixels: noise has 0, a digit 0.5 and more
MINIMUM_OUTLINE = 0.85  # of a box's outline: a frame fills more
SMALL_PART = 0.08  # of the largest part's area: smaller parts are specks
MAXIMUM_PARTS = 6  # a digit's strokes are never more
MAXIMUM_PIECES = 25  # nor do they break into more
BLANK = "there is no digit in it: the picture is blank"
NOISE = "there is no digit in it: only noise or many things"


def find_ink(pixels: NDArray[Any]) -> list[Ink]:
    """Pixels 0–255 (H, W, channels) to ink 0–1, float32 (h, w): the digit and a margin around it, perhaps scaled down.

    Where that is a frame or a block, as a plot's axes are, what lies inside of it comes first.

    Raises:
        UserError: the picture is blank, or is noise.
    """
    pixels = _crop_to_digit(pixels)
    while True:
        factor = -(-max(pixels.shape[:2]) // WORKING_SIZE)
        small = block_means(pixels, factor)
        ink, *others = _extract_ink(small)
        rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
        if factor == 1 and (side := max(len(rows), len(columns))) < MINIMUM_SIDE:
            raise UserError(f"there is no digit in it: the ink is {side} pixels long, a digit {MINIMUM_SIDE} or more")
        margin = 2 + max(len(rows), len(columns)) // 6
        box = [(max(0, int(part[0]) - margin), int(part[-1]) + 1 + margin) for part in (rows, columns)]
        (top, bottom), (left, right) = box
        side = max(bottom - top, right - left)
        # A digit that is small in a large picture is looked at again alone: its own light, and finer pixels.
        if -(-side * factor // WORKING_SIZE) < factor:
            pixels = pixels[top * factor : bottom * factor, left * factor : right * factor]
            continue
        inks = [ink[top:bottom, left:right], *others]
        if frame := _find_frame(ink > STROKE_LEVEL):
            (top, bottom), (left, right) = frame
            with suppress(UserError):
                inks = find_ink(pixels[top * factor : bottom * factor, left * factor : right * factor]) + inks
        return inks


def _crop_to_digit(pixels: NDArray[Any]) -> NDArray[Any]:
    """A large, evenly coloured picture cut down to its largest thing: averaging would lose a small digit."""
    factor = -(-max(pixels.shape[:2]) // WORKING_SIZE)
    if factor == 1:
        return pixels
    paper, even = _even_paper(pixels)
    if even <= 0.5:
        return pixels
    paper = paper.astype(pixels.dtype)
    difference = (np.maximum(pixels, paper) - np.minimum(pixels, paper)).max(-1)  # unsigned numbers do not go below 0
    blocks = np.maximum.reduceat(difference, np.arange(0, difference.shape[0], factor), axis=0)
    blocks = np.maximum.reduceat(blocks, np.arange(0, difference.shape[1], factor), axis=1)
    mask = blocks > max(MINIMUM_CONTRAST, blocks.max() / 2)
    labels, count = ndimage.label(ndimage.binary_dilation(mask, np.ones((3, 3)), iterations=2))
    if not count:
        return pixels
    largest = np.bincount(labels[mask], minlength=2).argmax()
    box = ndimage.find_objects(labels)[largest - 1]
    return pixels[tuple(slice(max(0, (part.start - 1) * factor), (part.stop + 1) * factor) for part in box)]


def block_means(pixels: NDArray[Any], factor: int) -> Ink:
    """A picture scaled down: the means of blocks of factor × factor pixels."""
    if factor == 1:
        return pixels.astype(np.float32)
    height, width = (max(1, size // factor) for size in pixels.shape[:2])
    blocks = pixels[: height * factor, : width * factor]
    rows = np.add.reduceat(blocks, np.arange(0, blocks.shape[0], factor), axis=0, dtype=np.float32)
    sums = np.add.reduceat(rows, np.arange(0, blocks.shape[1], factor), axis=1)
    return (sums[:height, :width] / factor**2).astype(np.float32)


def ink_fractions(pixels: Ink) -> list[Ink]:
    """Pixels (H, W, channels) to how full of ink each is, about 0–1 (H, W), by each of the papers that it may be on.

    Raises:
        UserError: the picture is blank.
    """
    inks = list[Ink]()
    for paper, flat in _paper_colours(pixels):
        difference = pixels - paper
        if not flat:  # ink in the shade has less contrast: give it back
            difference *= paper.mean() / np.maximum(paper, MINIMUM_LIGHT)
        ink, contrast = _project_on_ink_colour(difference)
        if contrast >= MINIMUM_CONTRAST:
            inks.append(ink if flat else _without_noise(ink))
    if not inks:
        raise UserError(BLANK)
    return inks


def _extract_ink(pixels: Ink) -> list[Ink]:
    """What `ink_fractions` finds, zero wherever there is none of the digit."""
    inks, errors = list[Ink](), list[UserError]()
    for ink in ink_fractions(pixels):
        try:
            inks.append(_of_strokes(ink))
        except UserError as error:
            errors.append(error)
    if not inks:
        raise errors[0]
    return inks


def _of_strokes(ink: Ink) -> Ink:
    """Ink near the digit's strokes, 0–1, and 0 elsewhere.

    Raises:
        UserError: there is none, or only noise.
    """
    mask = _strokes(ink)
    near = mask if mask.all() else ndimage.binary_dilation(mask, iterations=2)
    ink = np.where(near, ink, 0).clip(0, 1).astype(np.float32)
    if not ink.any():
        raise UserError(BLANK)
    return ink


def _even_paper(pixels: NDArray[Any]) -> tuple[Ink, float]:
    """The border's median colour, and the fraction of the border that has it: none if a shadow comes in there."""
    border = _border(pixels)
    paper = np.median(border, axis=0)
    outline = np.concatenate([pixels[0], pixels[:, -1], pixels[-1, ::-1], pixels[::-1, 0]])
    runs = np.bincount(ndimage.label(np.abs(outline - paper).max(1) > EVEN)[0])[1:]
    shadow = min(pixels.shape[:2]) >= 48 and runs.max(initial=0) > LONG * len(outline)
    return paper, 0.0 if shadow else float((np.abs(border - paper).max(1) <= EVEN).mean())


def _border(pixels: Ink) -> Ink:
    """The pixels of a band along the picture's edge, (count, channels)."""
    height, width, channels = pixels.shape
    band = max(1, min(height, width) // 28)
    parts = (pixels[:band], pixels[-band:], pixels[:, :band], pixels[:, -band:])
    return np.concatenate([part.reshape(-1, channels) for part in parts])


def _paper_colours(pixels: Ink) -> list[tuple[Ink, bool]]:
    """What the paper's colour may be: one (channels,), or in uneven light one at each pixel; and whether it is one."""
    paper, even = _even_paper(pixels)
    difference = np.abs(pixels - paper).max(-1)
    found = list[tuple[Ink, bool]]()
    if even > 0.5 or min(pixels.shape[:2]) < 8:
        if (difference > difference.max() / 2).mean() > 0.7:  # a frame around the picture
            paper = np.median(pixels.reshape(-1, pixels.shape[2]), axis=0)
        found.append((paper, True))
    if not found or even < 0.8:
        surface = _fit_surface(pixels)
        if min(pixels.shape[:2]) >= 48:  # in a smaller picture strokes are as broad as shadows
            size = round(0.35 * max(pixels.shape[:2]))
            rest = ndimage.uniform_filter(pixels - surface, (3, 3, 0))
            found.append((surface + ndimage.grey_closing(rest, (size, size, 1)), False))
        if even <= 0.5:
            found.append((surface, False))
    return found


def _fit_surface(pixels: Ink) -> Ink:
    """The paper's colour at each pixel: the quadratic surface with the least absolute difference, which ink does not
    move, as it covers few pixels. Fitted by reweighted least squares; to the paper alone where two colours are clear,
    as broad strokes in a narrow picture cover much of it."""
    height, width, channels = pixels.shape
    step = max(1, max(height, width) // 32)
    basis = _quadratic_basis(height, width)
    sample, at = pixels[::step, ::step].reshape(-1, channels), basis[::step, ::step].reshape(-1, 6)
    difference = np.abs(sample - np.median(_border(pixels), axis=0)).max(1)
    threshold, clear = _otsu(difference)
    if clear:
        sample, at = sample[difference <= threshold], at[difference <= threshold]
    weights = np.ones(len(at), np.float32)
    for _ in range(12):
        weighted = at * weights[:, None]
        fit = np.linalg.solve(weighted.T @ at + 1e-4 * np.eye(6, dtype=np.float32), weighted.T @ sample)
        weights = 1 / np.maximum(np.abs(sample - at @ fit).max(1), 1)
    return basis @ fit


def _otsu(values: Ink) -> tuple[float, bool]:
    """Otsu's threshold (1979) between two classes of values, and whether they are clear: far apart for their widths."""
    counts, edges = np.histogram(values, 64)
    centres = (edges[1:] + edges[:-1]) / 2
    below, sums = np.cumsum(counts)[:-1], np.cumsum(counts * centres)
    between = (
        (sums[-1] * below - sums[:-1] * len(values)) ** 2
        / np.maximum(below * (len(values) - below), 1)
        / len(values) ** 2
    )
    best = int(between.argmax())
    return float(edges[best + 1]), bool(between[best] >= CLEAR * values.var())


def _quadratic_basis(height: int, width: int) -> Ink:
    """1, x, y, x², xy, y² at each pixel, (H, W, 6)."""
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)
    one = np.ones((height, width), np.float32)
    return np.stack([one, x * one, y * one, x * x * one, x * y, y * y * one], axis=-1)


def _project_on_ink_colour(difference: Ink) -> tuple[Ink, float]:
    """Differences from the paper (H, W, channels) to fractions of full ink (H, W), and full ink's contrast, of 255."""
    flat = difference.reshape(-1, difference.shape[2])
    size = np.abs(flat).max(1)
    count = min(len(size), 4)  # not the very strongest pixel, which may be a fault of the camera
    strongest = np.partition(size, -count)[-count]
    strong = size >= 0.5 * strongest
    # Only pixels on one side of the paper: what is darker and what is brighter must not cancel out.
    first = flat[strong][np.argmax(size[strong])]
    side = flat[strong] @ first >= 0
    side = side if side.mean() >= 0.5 else ~side
    direction = flat[strong][side].mean(0)
    along = np.where(flat @ direction > 0, size, -size)  # so that ink of a second colour is as full
    full = float(np.percentile(along[strong][side], 90))
    return (along / max(full, 1e-6)).reshape(difference.shape[:2]), full


def _without_noise(ink: Ink) -> Ink:
    """Ink less the paper's noise."""
    paper = ink[ink <= STROKE_LEVEL]
    floor = float(np.median(paper))
    noise = 1.4826 * float(np.median(np.abs(paper - floor)))
    floor += min(2 * noise, 0.3)
    full = float(np.percentile(ink[ink > STROKE_LEVEL], 90)) if (ink > STROKE_LEVEL).any() else 1.0
    return ((ink - floor) / max(full - floor, 1e-6)).astype(np.float32)


def _strokes(ink: Ink) -> NDArray[np.bool_]:
    """The mask of the digit's strokes, without specks and what comes in from the picture's edge.

    Raises:
        UserError: nothing stands out, as in noise.
    """
    mask = ink > STROKE_LEVEL
    if coherence(mask) < MINIMUM_COHERENCE:
        mask = _without_specks(mask)
        if not mask.any() or coherence(mask) < MINIMUM_COHERENCE:
            raise UserError(NOISE)
        faint = mask
    else:
        faint = ink > FAINT_LEVEL
    labels, sizes = _parts(faint, mask)
    if reach := max(mask.shape) // 64:  # parts of a broken stroke are nearer than that
        if (sizes >= SMALL_PART * sizes.max()).sum() > MAXIMUM_PIECES:
            raise UserError(NOISE)
        labels, sizes = _parts(ndimage.binary_dilation(faint, iterations=reach), mask)
        labels *= faint
    for index in range(1, len(sizes)) if len(sizes) <= 50 else ():
        sizes[index] *= not _frames_the_picture(labels == index)
    sizes[_along_the_edge(labels, sizes)] = 0
    if not sizes.any():
        return mask
    kept = sizes >= SMALL_PART * sizes.max()
    if kept.sum() > MAXIMUM_PARTS:
        raise UserError(NOISE)
    return kept[labels]


def _parts(mask: NDArray[np.bool_], counted: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Labels of a mask's components, 0 outside of it, and how many pixels of `counted` each has."""
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    sizes = np.bincount(labels[counted], minlength=count + 1)
    sizes[0] = 0
    return labels, sizes


def _without_specks(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A mask without its parts of one or two pixels."""
    labels, sizes = _parts(mask, mask)
    return (sizes > 2)[labels]


def _along_the_edge(labels: NDArray[Any], sizes: NDArray[Any]) -> NDArray[np.bool_]:
    """Which components lie along the picture's edge while others lie inside, as a table beside the paper does."""
    height, width = labels.shape
    y, x = np.arange(height)[:, None], np.arange(width)
    depth = np.minimum(np.minimum(y, height - 1 - y), np.minimum(x, width - 1 - x))
    edges = np.concatenate((labels[0], labels[-1], labels[:, 0], labels[:, -1]))
    touching = np.bincount(edges, minlength=len(sizes)) > 0
    if sizes[~touching].max(initial=0) < SMALL_PART * sizes.max():
        return np.zeros(len(sizes), bool)
    mean_depth = np.bincount(labels.ravel(), depth.ravel(), len(sizes)) / np.maximum(np.bincount(labels.ravel()), 1)
    return touching & (mean_depth < 0.15 * min(height, width))


def _frames_the_picture(part: NDArray[np.bool_]) -> bool:
    """Whether a component covers half of two sides of the picture or more: a frame, a table, a shadow."""
    sides = (part[0], part[-1], part[:, 0], part[:, -1])
    return sum(side.mean() > 0.5 for side in sides) >= 2


def _find_frame(mask: NDArray[np.bool_]) -> list[tuple[int, int]] | None:
    """First and last row and column within a frame or a block, if a thing is one: it fills the outline of a box.

    The box goes from the first to the last row, and column, that is filled for the most part; what sticks out of it,
    as the ticks of a plot's axes do, is less than half. Of MNIST's digits one in a thousand looks like that.
    """
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    thing = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    box = [part[0] + np.flatnonzero(thing.mean(axis) > 0.5) for part, axis in ((rows, 1), (columns, 0))]
    if min(map(len, box)) < 2:
        return None
    (top, bottom), (left, right) = [(int(part[0]), int(part[-1])) for part in box]
    height, width = bottom + 1 - top, right + 1 - left
    if min(height, width) <= max(12, 0.45 * max(height, width)) or height * width < thing.size / 2:
        return None
    outline = mask[[top, bottom], left : right + 1].sum() + mask[top : bottom + 1, [left, right]].sum()
    if outline < MINIMUM_OUTLINE * 2 * (height + width):
        return None
    return [(top + height // 10 + 1, bottom - height // 10), (left + width // 10 + 1, right - width // 10)]


def coherence(mask: NDArray[np.bool_]) -> float:
    """Correlation of a mask's pixels with their neighbours to the right and below, -1 to 1."""
    fraction = mask.mean()
    if fraction in (0, 1) or mask.size < 4:
        return 1.0
    pairs = [(mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])]
    both = sum(np.count_nonzero(a & b) for a, b in pairs) / max(1, sum(a.size for a, _ in pairs))
    return float((both - fraction**2) / (fraction - fraction**2))

"""Where the digits of a picture of several are, in reading order, each in MNIST's form. Imports no torch.

The ink is cut into pieces, and each piece, or run of neighbours, that may be one digit is a candidate. The network's
probabilities choose among them: heuristic over-segmentation, as in LeCun et al. 1998, "Gradient-based learning applied
to document recognition", section V.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from mnist_cnn.config.schema import UserError
from mnist_cnn.pictures.digit_image import scale_and_centre, visible_pixels
from mnist_cnn.pictures.ink import BLANK, MINIMUM_COHERENCE, NOISE, STROKE_LEVEL, block_means, coherence, ink_fractions

WORKING_SIDE = 640  # pixels; a larger picture is averaged down to it
CLOSED_FROM = 300  # pixels of a side: in larger pictures white lines of one pixel part no strokes
MINIMUM_HEIGHT = 6  # pixels of the tallest piece
MAXIMUM_COMPONENTS = 1000  # more are noise
TALL = 0.4  # of the tallest piece: lower ones are dots, dashes and parts of digits
MAXIMUM_PIECES = 5  # of one digit

# What speaks against a candidate, beside -log of its probability; found by random search on numbers that were put
# together from MNIST's training digits. Lengths are fractions of a digit's typical height.
WIDE = 20.0  # per width beyond 0.9
SHORT = 30.0  # per height below 0.7
GAP = 40.0  # per white column between its pieces
CUT, CUT_INK = 1.4, 5.0  # at each end that is a cut; per ink there
CLOSE = 1.3  # at each end: per part of the width that it shares with the neighbour
LEFT_OUT = 10.0  # of a whole piece that is read as no digit


Box = tuple[int, int, int, int]  # left, top, right, bottom in the picture's pixels, seen upright


class Candidate(NamedTuple):
    """The pieces from `start` up to `stop` as one digit, of which `image` is uint8 (28, 28), or as none."""

    start: int
    stop: int
    box: Box
    image: NDArray[np.uint8] | None
    penalty: float


class Piece(NamedTuple):
    """Ink of one digit at most: what lies between `left` and `right` of the components `parts`.

    `cut` is how many pixels of ink were cut through at its left, None where no ink was.
    """

    left: int
    top: int
    right: int
    bottom: int
    parts: tuple[int, ...]
    cut: int | None = None

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    def joined(self, other: Piece) -> Piece:
        left, top = min(self.left, other.left), min(self.top, other.top)
        right, bottom = max(self.right, other.right), max(self.bottom, other.bottom)
        return Piece(left, top, right, bottom, self.parts + other.parts)

    def gap(self, other: Piece) -> tuple[int, int]:
        """Pixels between both, across and down; below 0 where they overlap."""
        across = max(self.left, other.left) - min(self.right, other.right)
        return across, max(self.top, other.top) - min(self.bottom, other.bottom)

    def shared(self, other: Piece) -> float:
        """The fraction of the narrower one's width that both cover."""
        return max(0, -self.gap(other)[0]) / min(self.width, other.width)


def find_candidates(picture: Image.Image | NDArray[Any]) -> list[Candidate]:
    """What may be the digits of a picture, for `best_reading` to choose from.

    Raises:
        UserError: there is no digit in it, or it is no picture.
    """
    pixels = visible_pixels(picture)
    left = top = 0
    while True:
        factor = -(-max(pixels.shape[:2]) // WORKING_SIDE)
        ink = ink_fractions(block_means(pixels, factor))[0].clip(0, 1)
        mask = ink > STROKE_LEVEL
        if max(ink.shape) >= CLOSED_FROM:
            mask |= ndimage.binary_closing(mask, np.ones((3, 3)))
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        if count > MAXIMUM_COMPONENTS or coherence(mask) < MINIMUM_COHERENCE / 2:  # small digits have thin strokes
            raise UserError(NOISE)
        pieces = join_strokes(components(labels))
        if not pieces:
            raise UserError(BLANK)
        typical = typical_height(pieces)
        lines = find_lines(pieces, typical)
        # Digits that are small in a large picture are looked at again alone: their own light, and finer pixels.
        edges = np.array([piece[:4] for piece in chain.from_iterable(lines)])
        first, last = edges[:, :2].min(0) - typical, edges[:, 2:].max(0) + typical
        (x, y), (right, bottom) = (factor * np.rint(one.clip(0)).astype(int) for one in (first, last))
        closer = pixels[y:bottom, x:right]
        if -(-max(closer.shape[:2]) // WORKING_SIDE) == factor:
            break
        pixels, left, top = closer, left + x, top + y
    lines = [[part for piece in line for part in cut(piece, labels, typical)] for line in lines]
    candidates = digit_candidates(ink, labels, lines, typical)
    scale = getattr(picture, "info", {}).get("reduced_by", 1)
    found = []
    for one in candidates:
        at = scale * (np.array((left, top) * 2) + factor * np.array(one.box))
        found.append(one._replace(box=tuple(at.astype(int).tolist())))
    return found


def best_reading(candidates: Sequence[Candidate], probabilities: NDArray[np.float32]) -> list[int]:
    """Which candidates, in reading order, take each piece once at the least cost.

    Args:
        candidates: of one picture.
        probabilities: (count, classes) of those that have an image, by whose rows the answer names them; at least one.
    """
    surprise = -np.log(probabilities.max(1))
    unreached: tuple[float, list[int]] = (np.inf, [])
    best = [(0.0, []), *([unreached] * max(one.stop for one in candidates))]
    rows = iter(range(len(surprise)))
    with_rows = [(one, None if one.image is None else next(rows)) for one in candidates]
    for one, row in sorted(with_rows, key=lambda pair: pair[0].start):
        cost, path = best[one.start]
        longer = (cost + one.penalty, path) if row is None else (cost + one.penalty + surprise[row], [*path, row])
        best[one.stop] = min(best[one.stop], longer)
    return best[-1][1] or [int(surprise.argmin())]


def components(labels: NDArray[np.int32]) -> list[Piece]:
    """The components of a mask without specks, and without what comes in from the picture's edge."""
    found = [
        Piece(columns.start, rows.start, columns.stop, rows.stop, (index,))
        for index, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1)
    ]
    height, width = labels.shape
    sides = {p: (p.left == 0) + (p.top == 0) + (p.right == width) + (p.bottom == height) for p in found}
    inside = [piece for piece in found if not sides[piece]]
    highest = max((piece.height for piece in found), default=0)
    if max((piece.height for piece in inside), default=0) < max(MINIMUM_HEIGHT, TALL * highest):
        inside = found
    tallest = max((piece.height for piece in inside), default=0)
    beside = [piece for piece in inside if piece.height >= TALL * tallest]

    def in_a_line(piece: Piece) -> bool:
        """Whether a piece at the picture's edge is like a digit in a line with others."""
        level = any(-piece.gap(other)[1] > 0.4 * piece.height for other in beside)
        return level and sides[piece] < 3 and 0.6 * tallest <= piece.height <= 1.5 * tallest

    kept = inside if inside is found else [piece for piece in found if not sides[piece] or in_a_line(piece)]
    sizes = np.bincount(labels.ravel())
    speck = 2 + 0.004 * tallest**2
    return [piece for piece in kept if sizes[piece.parts[0]] > speck] if tallest >= MINIMUM_HEIGHT else []


def typical_height(pieces: Sequence[Piece]) -> float:
    heights = np.array([piece.height for piece in pieces] or [0])
    return float(np.percentile(heights[heights >= TALL * heights.max()], 75))


def join_strokes(found: list[Piece]) -> list[Piece]:
    """Components to pieces: those that lie close above one another are one digit's."""
    typical = typical_height(found)
    pieces: list[Piece] = []
    for piece in sorted(found, key=lambda piece: piece.top):
        for index, above in enumerate(pieces):
            both = above.joined(piece)
            if above.shared(piece) > 0.3 and above.gap(piece)[1] < 0.3 * typical and both.height < 1.4 * typical:
                pieces[index] = both
                break
        else:
            pieces.append(piece)
    return pieces


def find_lines(pieces: list[Piece], typical: float) -> list[list[Piece]]:
    """Lines from the top down, each from left to right: tall pieces make them, lower ones join one or are left out."""
    lines: list[list[Piece]] = []

    def shared(piece: Piece, line: list[Piece]) -> float:
        """The fraction of the lower one's height that a piece shares with the line's nearest tall piece."""
        near = min((one for one in line if one.height >= TALL * typical), key=lambda one: max(0, one.gap(piece)[0]))
        return -near.gap(piece)[1] / min(near.height, piece.height)

    for piece in sorted(pieces, key=lambda piece: (piece.height < TALL * typical, piece.left)):
        line = max(lines, key=lambda line: shared(piece, line), default=[])
        if line and shared(piece, line) > 0.4:
            line.append(piece)
        elif piece.height >= TALL * typical:
            lines.append([piece])
    return [sorted(line) for line in sorted(lines, key=lambda line: np.mean([one.top + one.bottom for one in line]))]


def cut(piece: Piece, labels: NDArray[np.int32], typical: float) -> list[Piece]:
    """A wide piece, perhaps of digits that touch, cut at the columns with the least ink; else the piece alone."""
    if piece.width < 0.9 * typical:
        return [piece]
    mask = np.isin(labels[piece.top : piece.bottom, piece.left : piece.right], piece.parts)
    column = mask.sum(0)
    smooth = ndimage.uniform_filter1d(column.astype(np.float32), max(1, round(0.05 * typical)))
    step = max(1, round(0.15 * typical))
    places = [0, piece.width]
    for x in np.argsort(smooth, kind="stable").tolist():
        if all(abs(x - place) >= step for place in places) and len(places) < 2 + 2.5 * piece.width / typical:
            places.append(x)
    parts = []
    for left, right in pairwise(sorted(places)):
        rows = np.flatnonzero(mask[:, left:right].any(1)) + piece.top
        edges = piece.left + left, int(rows[0]), piece.left + right, int(rows[-1]) + 1
        parts.append(Piece(*edges, piece.parts, int(column[left]) if left else None))
    return parts


def digit_candidates(
    ink: NDArray[np.float32], labels: NDArray[np.int32], lines: list[list[Piece]], typical: float
) -> list[Candidate]:
    """Each piece and each run of neighbours that may be one digit, and each piece as none."""
    owner = np.zeros(labels.shape, np.int32)  # of each pixel: its piece, counted from 1
    for number, piece in enumerate(chain.from_iterable(lines), start=1):
        region = np.s_[piece.top : piece.bottom, piece.left : piece.right]
        owner[region][np.isin(labels[region], piece.parts)] = number
    candidates, first = [], 0
    for line in lines:
        ends = [0.0, *(_split_penalty(*pair, typical) for pair in pairwise(line)), 0.0]
        for start in range(len(line)):
            whole, gaps = line[start], 0
            nothing = LEFT_OUT * min(1, whole.height / typical)
            candidates.append(Candidate(first + start, first + start + 1, whole[:4], None, nothing))
            for stop in range(start + 1, min(start + MAXIMUM_PIECES, len(line)) + 1):
                if stop > start + 1:
                    gaps += max(0, whole.gap(line[stop - 1])[0])
                    whole = whole.joined(line[stop - 1])
                wide = whole.width / max(whole.height, typical) - 0.9
                if stop > start + 1 and (wide > 0.7 or gaps > 0.25 * typical):
                    break
                penalty = ends[start] + ends[stop] + GAP * gaps / typical
                penalty += WIDE * max(0, wide) + SHORT * max(0, 0.7 - whole.height / typical)
                image = _cut_out(ink, owner, first + start, first + stop, whole)
                candidates.append(Candidate(first + start, first + stop, whole[:4], image, penalty))
        first += len(line)
    return candidates


def _split_penalty(left: Piece, right: Piece, typical: float) -> float:
    """What speaks against reading two neighbours as parts of two digits."""
    return CLOSE * left.shared(right) if right.cut is None else CUT + CUT_INK * right.cut / typical


def _cut_out(
    ink: NDArray[np.float32], owner: NDArray[np.int32], start: int, stop: int, whole: Piece
) -> NDArray[np.uint8]:
    """The ink of the pieces from `start` up to `stop` in MNIST's form."""
    region = np.s_[max(0, whole.top - 2) : whole.bottom + 2, max(0, whole.left - 2) : whole.right + 2]
    own = (owner[region] > start) & (owner[region] <= stop)
    soft = ndimage.binary_dilation(own, iterations=2) & (owner[region] == 0)  # edges of strokes
    return scale_and_centre(np.where(own | soft, ink[region], 0).astype(np.float32))

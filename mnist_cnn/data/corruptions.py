"""MNIST-C: digits corrupted in fifteen ways, to measure what a network makes of pictures that it was not trained on.

The families and severities are those of Mu and Gilmer, MNIST-C: A Robustness Benchmark for Computer Vision, 2019
(arXiv 1906.02337), and its generator (github.com/google-research/mnist-c). Its random numbers are not: single digits
differ from the published files, figures over many do not. For tests only: training on these spoils the measurement.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.ndimage import affine_transform, correlate, gaussian_filter, label, shift

Digits = NDArray[np.uint8]  # (N, 28, 28)
Ink = NDArray[np.floating]  # (n, 28, 28), 0–1
CORRUPTIONS: dict[str, Callable[..., Digits]] = {}  # by name: corrupt(digits, seed=0), in the paper's order
SIDE = 28
CENTRE = np.full(2, (SIDE - 1) / 2)


def corruption(family: Callable[[Ink, Generator], Ink]) -> Callable[[Ink, Generator], Ink]:
    """Enter a family into `CORRUPTIONS`; what it returns outside of 0–1 is clipped."""
    CORRUPTIONS[family.__name__] = partial(_corrupt, family, len(CORRUPTIONS))
    return family


def _corrupt(family: Callable[[Ink, Generator], Ink], number: int, digits: Digits, seed: int = 0) -> Digits:
    """Digits uint8 (N, 28, 28), ink bright on 0, corrupted: the same for the same digits and seed."""
    random = np.random.default_rng([seed, number])
    parts = [family(digits[start : start + 1000] / 255.0, random) for start in range(0, len(digits), 1000)]
    return np.rint(255 * np.concatenate(parts).clip(0, 1)).astype(np.uint8)


@corruption
def shot_noise(ink: Ink, random: Generator) -> Ink:
    return random.poisson(3 * ink) / 3


@corruption
def impulse_noise(ink: Ink, random: Generator) -> Ink:
    chance = random.random(ink.shape)
    return np.where(chance < 0.17, chance < 0.085, ink)  # half of the 17 % white, half black


@corruption
def glass_blur(ink: Ink, random: Generator) -> Ink:
    """Pixels change places with neighbours above or to the left, between two blurs.

    The generator takes columns for channels, so that it blurs down the columns only.
    """
    pixels = np.floor(255 * gaussian_filter(ink, (0, 0.7, 0))).reshape(len(ink), -1)  # (n, 784)
    rows = np.arange(len(ink))
    for _ in range(2):
        for place in [SIDE * y + x for y in range(27, 1, -1) for x in range(27, 1, -1)]:
            moves = random.integers(0, 2, (3, len(ink)))  # whether to, up, left
            other = place - moves[0] * (SIDE * moves[1] + moves[2])
            here = pixels[:, place].copy()
            pixels[:, place] = pixels[rows, other]
            pixels[rows, other] = here
    return gaussian_filter(pixels.reshape(ink.shape) / 255, (0, 0.7, 0))


@corruption
def motion_blur(ink: Ink, random: Generator) -> Ink:
    """A half Gaussian of 21 steps to one side, along a line within 45° of the horizontal, as ImageMagick draws it."""
    angles = np.deg2rad(random.uniform(-45, 45, len(ink)))
    weights = np.exp(-(np.arange(21) ** 2) / (2 * 3**2))
    blurred = np.zeros_like(ink)
    for step, weight in enumerate(weights / weights.sum()):
        down, right = (np.ceil(step * along(angles) - 0.5).astype(int)[:, None] for along in (np.sin, np.cos))
        y, x = ((np.arange(SIDE) + move).clip(0, SIDE - 1) for move in (down, right))  # (n, 28)
        blurred += weight * ink[np.arange(len(ink))[:, None, None], y[:, :, None], x[:, None, :]]
    return blurred


def _warp(ink: Ink, matrices: list[list[list[float]]]) -> Ink:
    """Each digit warped about its centre: a pixel (row, column) is read at matrix · (row, column)."""
    warped = [
        affine_transform(digit, matrix, CENTRE - matrix @ CENTRE, order=1, mode="grid-constant")
        for digit, matrix in zip(ink, np.asarray(matrices), strict=True)
    ]
    return np.stack(warped)


def _either_way(amount: float, ink: Ink, random: Generator) -> NDArray[np.floating]:
    return amount * random.choice((-1, 1), len(ink))


@corruption
def shear(ink: Ink, random: Generator) -> Ink:
    return _warp(ink, [[[np.cos(a), 0], [-np.sin(a), 1]] for a in _either_way(0.4, ink, random)])


@corruption
def scale(ink: Ink, random: Generator) -> Ink:
    return _warp(ink, [[[1 / 0.7, 0], [0, 1 / 0.7]]] * len(ink))


@corruption
def rotate(ink: Ink, random: Generator) -> Ink:
    angles = _either_way(0.4, ink, random)  # 23°
    return _warp(ink, [[[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]] for a in angles])


@corruption
def brightness(ink: Ink, random: Generator) -> Ink:
    return ink + 0.5


@corruption
def translate(ink: Ink, random: Generator) -> Ink:
    moves = random.choice((-3, 3), (len(ink), 2))
    return np.stack([shift(digit, move, order=0) for digit, move in zip(ink, moves, strict=True)])


@corruption
def stripe(ink: Ink, random: Generator) -> Ink:
    """The outer quarters inverted, the middle as it was."""
    columns = np.arange(SIDE)
    return np.where((columns < 7) | (columns >= 21), 1 - ink, ink)


@corruption
def fog(ink: Ink, random: Generator) -> Ink:
    brightest = ink.max((1, 2), keepdims=True)
    return (ink + 3 * _clouds(len(ink), random)) * brightest / (brightest + 3)


def _clouds(count: int, random: Generator) -> Ink:
    """Corners of height maps of 256×256 by the diamond-square algorithm, which wrap around; a map's range is 0–1."""
    grid = np.zeros((count, 1, 1))
    for level in range(8):
        if level == 6:  # the last two change the range by a few percent: only the corner is drawn on, with a margin
            low, high = grid.min((1, 2), keepdims=True), grid.max((1, 2), keepdims=True)
            grid = np.roll(grid, 2, (1, 2))[:, :12, :12]
        noise = (100 / 1.4**level) ** 2 * random.uniform(-1, 1, (3, *grid.shape))
        below, right = np.roll(grid, -1, 1), np.roll(grid, -1, 2)
        middle = (grid + below + right + np.roll(below, -1, 2)) / 4 + noise[0]
        finer = np.empty((count, 2 * grid.shape[1], 2 * grid.shape[2]))
        finer[:, ::2, ::2], finer[:, 1::2, 1::2] = grid, middle
        finer[:, ::2, 1::2] = (grid + right + middle + np.roll(middle, 1, 1)) / 4 + noise[1]
        finer[:, 1::2, ::2] = (grid + below + middle + np.roll(middle, 1, 2)) / 4 + noise[2]
        grid = finer
    return (grid[:, 8 : 8 + SIDE, 8 : 8 + SIDE] - low) / (high - low)


@corruption
def spatter(ink: Ink, random: Generator) -> Ink:
    """Grey blots of mud over the digit."""
    liquid = gaussian_filter(random.normal(0.65, 0.3, ink.shape), (0, 1, 1), mode="nearest")
    mud = gaussian_filter((liquid > 0.65).astype(float), (0, 1.5, 1.5), mode="nearest")
    mud[mud < 0.8] = 0
    return ink * (1 - mud) + 63 / 255 * mud


def _line(left: Ink, top: Ink, right: Ink, bottom: Ink) -> Ink:
    """Lines, one a digit, from (left, top) to (right, bottom), each (n,), which fade out 1.45 rows above and below."""
    columns = np.arange(SIDE)
    slopes = (bottom - top) / (right - left)
    heights = slopes[:, None] * (columns - left[:, None]) + top[:, None]  # (n, 28)
    distances = abs(columns[:, None] - heights[:, None, :])  # (n, 28, 28)
    inside = (columns >= np.floor(left)[:, None]) & (columns < np.ceil(right)[:, None])
    return (np.log(1 - distances.clip(max=2) / 2.3) + 1).clip(0, 1) * inside[:, None, :]


@corruption
def dotted_line(ink: Ink, random: Generator) -> Ink:
    ends = random.integers(0, 27, (2, len(ink)))
    lines = _line(np.zeros(len(ink)), ends[0], np.full(len(ink), 27), ends[1])
    return ink + lines * (np.arange(SIDE) % 4 >= 2)


@corruption
def zigzag(ink: Ink, random: Generator) -> Ink:
    """Seven strokes up and down, 2 pixels to each side of a line from column 2 to 25."""
    top = random.integers(0, 27, len(ink))
    angles = np.arctan(random.integers(-5, 5, len(ink)) / 23)
    length = 23 / np.cos(angles)
    along = [0, 2, 6, 10, 14, 18, 22, length]
    aside = [0, 2, -2, 2, -2, 2, -2, -1 / (length - 20)]
    x = [2 + a * np.cos(angles) - b * np.sin(angles) for a, b in zip(along, aside, strict=True)]
    y = [top + a * np.sin(angles) + b * np.cos(angles) for a, b in zip(along, aside, strict=True)]
    for i in range(7):
        ink = ink + _line(x[i], y[i], x[i + 1], y[i + 1])
    return ink


@corruption
def canny_edges(ink: Ink, random: Generator) -> Ink:
    """Canny's edges (A Computational Approach to Edge Detection, 1986): sigma 1, thresholds 0.1 and 0.2."""
    paper = gaussian_filter(np.ones((SIDE, SIDE)), 1, mode="constant")
    smooth = gaussian_filter(ink, (0, 1, 1), mode="constant") / paper
    sobel = np.outer((-1, 0, 1), (1, 2, 1))[None]  # down
    slope_y, slope_x = correlate(smooth, sobel), correlate(smooth, sobel.transpose(0, 2, 1))
    size = np.hypot(slope_y, slope_x)

    # A pixel stays where it is the ridge of its slope: not lower than either side, interpolated between neighbours.
    steep = abs(slope_y) >= abs(slope_x)
    step_y, step_x = np.sign(slope_y).astype(int), np.sign(slope_x).astype(int)
    slant = np.minimum(abs(slope_y), abs(slope_x)) / np.maximum(np.maximum(abs(slope_y), abs(slope_x)), 1e-12)
    padded = np.pad(size, ((0, 0), (1, 1), (1, 1)))
    n, y, x = np.ogrid[: len(ink), 1 : SIDE + 1, 1 : SIDE + 1]
    ridge = np.ones(ink.shape, bool)
    for side in (1, -1):
        straight = padded[n, y + side * step_y * steep, x + side * step_x * ~steep]
        diagonal = padded[n, y + side * step_y, x + side * step_x]
        ridge &= slant * diagonal + (1 - slant) * straight <= size
    ridge[:, [0, -1]] = ridge[:, :, [0, -1]] = False

    # Of the weak edges those stay that touch a strong one.
    lines, count = label(ridge & (size >= 0.1), np.array([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))]))
    strong = np.zeros(count + 1, bool)
    strong[lines[ridge & (size >= 0.2)]] = True
    return strong[lines] & (lines > 0)

"""The ink of a whole picture, whatever is in it: what differs from the paper around it. Imports no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

PAPER_SIDE = 48  # pixels of the picture in which the paper's colour is looked for
WINDOW = 0.4  # of the picture: the window whose median is the paper's colour
CLEAR = 0.85  # of the variance lies between ink and paper, where each has one colour
EVEN = 3  # levels by which even paper may differ
MINIMUM_LIGHT = 30  # of 255: darker paper is too noisy to be corrected for uneven light
MINIMUM_CONTRAST = 20  # between ink and paper, of 255


def ink_map(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Pixels 0–255 (H, W, channels) to ink 0–1 (H, W): how far each is from the paper around it, in any colour."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    paper = np.median(border, axis=0)
    if (np.abs(border - paper).max(1) <= EVEN).mean() < 0.5:
        # Uneven light: a median over wide windows follows the edges of shadows, and strokes do not move it.
        step = -(-max(pixels.shape[:2]) // PAPER_SIDE)
        sample = pixels[step // 2 :: step, step // 2 :: step]
        window = (*(max(3, round(WINDOW * size)) for size in sample.shape[:2]), 1)
        sample = ndimage.median_filter(_without_thick_ink(sample, paper), window)
        size = pixels.shape[1], pixels.shape[0]
        channels = [Image.fromarray(one).resize(size, Image.Resampling.BILINEAR) for one in np.moveaxis(sample, 2, 0)]
        paper = np.stack([np.asarray(one) for one in channels], axis=2)
        pixels, paper = (one * 255 / np.maximum(paper, MINIMUM_LIGHT) for one in (pixels, paper))
    difference = np.abs(pixels - paper).max(2)
    usual = float(np.median(difference))
    noise = usual + 1.5 * float(np.median(np.abs(difference - usual)))
    strongest = np.partition(difference.ravel(), -min(4, difference.size))[-min(4, difference.size)]
    full = float(np.median(difference[difference >= strongest / 2]))
    if full < max(MINIMUM_CONTRAST, 4 * noise):
        return np.zeros_like(difference)
    return ((difference - noise) / (full - noise)).clip(0, 1)


def _without_thick_ink(pixels: NDArray[np.float32], border: NDArray[np.float32]) -> NDArray[np.float32]:
    """Pixels (H, W, channels) of clearly two kinds, the brighter twice as bright, all of the kind of the `border`."""
    grey = pixels.mean(2)
    values = np.sort(grey, axis=None)
    count, sums = np.arange(1, len(values)), np.cumsum(values)
    low, high = sums[:-1] / count, (sums[-1] - sums[:-1]) / (len(values) - count)
    between = (high - low) ** 2 * count * (len(values) - count) / len(values) ** 2  # the variance of Otsu 1979
    at = int(between.argmax())
    if between[at] < CLEAR * values.var() or 2 * low[at] > high[at]:
        return pixels
    paper = (grey > values[at]) == (border.mean() > values[at])
    return np.where(paper[..., None], pixels, np.median(pixels[paper], axis=0))

"""Training digits changed at random: drawn by another hand, warped, and damaged as pictures of paper are."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mnist_cnn.config.data_settings import Augmentation

EACH_DAMAGE = 0.15  # of the damaged digits, the fraction that each kind of damage falls on


class Augment:
    """Digits (N, 1, 28, 28), pixels 0–255, each changed by random amounts, to float32; labels are (N,).

    What is changed, and how much at most, conf/augmentation says. The draws are of the device's default generator,
    whose state is a function of the step.
    """

    def __init__(self, settings: Augmentation) -> None:
        self.settings = settings
        angles = math.radians(settings.rotation), math.radians(settings.shear)
        self.bounds = torch.tensor([*angles, settings.scale, settings.shift, settings.shift])[:, None]
        self.moves = bool(self.bounds.any())

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        settings = self.settings
        with torch.autocast(images.device.type, enabled=False):  # bfloat16 would move pixels
            images = on_some(images.float(), settings.hands, lambda some, which: other_hand(some, labels[which]))
            images = on_some(images, settings.thickness, lambda some, _: thicker_or_thinner(some))
            if self.moves:
                bounds = self.bounds = self.bounds.to(images.device)
                images = warped(images, bounds * (2 * torch.rand(len(bounds), len(images), device=images.device) - 1))
            if settings.elastic:
                images = displaced(images, settings.elastic * _uniform(images, 0, 1), 5)
            return on_some(images, settings.damage, lambda some, _: damaged(some))


def on_some(images: Tensor, fraction: float, change: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """Images (N, 1, H, W), a random `fraction` of them changed: `change` takes them and their indices."""
    if not fraction:
        return images
    chosen = torch.rand(len(images), device=images.device) < fraction
    if images.device.type != "cpu":  # one would have to wait for how many there are
        return torch.where(chosen.view(-1, 1, 1, 1), change(images, slice(None)), images)
    which = chosen.nonzero()[:, 0]
    return images.index_copy(0, which, change(images[which], which)) if len(which) else images


# --- geometry --------------------------------------------------------------------------------------------------------


def warped(images: Tensor, amounts: Tensor) -> Tensor:
    """Images (N, 1, H, W) to float32, by rotation and shear (radians), scale, shift right and down (pixels): (5, N).

    An image is sheared along its rows, turned and scaled about its middle, then shifted. Bilinear; black comes in.
    """
    rotation, shear, scale, right, down = amounts.to(images.device)
    cosine, sine, tangent, size = rotation.cos(), rotation.sin(), shear.tan(), 1 + scale
    # grid_sample asks where each pixel of the outcome comes from: the inverse of shear, rotation, scale and shift.
    inverse = torch.stack([cosine - tangent * sine, -sine - tangent * cosine, sine, cosine]).view(2, 2, -1) / size
    height, width = images.shape[-2:]
    shift = torch.stack([right * 2 / width, down * 2 / height])  # the grid is 2 wide and 2 high
    origin = -(inverse * shift).sum(1)
    maps = torch.cat([inverse, origin[:, None]], dim=1).permute(2, 0, 1)  # (N, 2, 3)
    # What F.affine_grid computes, by one product and not by one for each digit: three times as fast on a CPU.
    grid = maps.flatten(0, 1) @ _places(height, width, images.device)
    return F.grid_sample(images.float(), grid.view(-1, 2, height, width).permute(0, 2, 3, 1), align_corners=False)


@cache
def _places(height: int, width: int, device: torch.device) -> Tensor:
    """Where the pixels' middles lie, from -1 to 1 across and down, and 1: float32 (3, height · width)."""
    y, x = ((2 * torch.arange(size, device=device) + 1) / size - 1 for size in (height, width))
    down, across = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([across, down, torch.ones_like(down)]).flatten(1)


def displaced(images: Tensor, amount: Tensor, cells: int) -> Tensor:
    """Elastic change (Simard et al., 2003): each pixel from up to `amount` (N, 1, 1, 1) pixels away.

    Neighbours move alike: the draws are smooth over a grid of `cells` × `cells`.
    """
    height, width = images.shape[-2:]
    offsets = _smooth(_uniform(images, -1, 1, 2, cells, cells), images) * amount * 2 / width
    grid = _places(height, width, images.device)[:2].view(1, 2, height, width) + offsets
    return F.grid_sample(images, grid.permute(0, 2, 3, 1), align_corners=False)


def thicker_or_thinner(images: Tensor) -> Tensor:
    """Strokes made thicker or thinner by up to a pixel on each side."""
    thick = F.max_pool2d(images, 3, 1, 1)
    thin = F.pad(-F.max_pool2d(-images, 2, 1), (0, 1, 0, 1))
    amount = _uniform(images, -1, 1)
    return torch.lerp(images, torch.where(amount > 0, thick, thin), amount.abs())


# --- hands -----------------------------------------------------------------------------------------------------------

TOP, MIDDLE, BOTTOM, LEFT = range(4)  # where a stroke is joined to a digit; left: the top of its left half
# Strokes that few of MNIST's writers make: label, and from where to where, in pixels right and down of such a place.
HANDS = (
    (1, TOP, (0, 0), TOP, (-6, 7)),  # a 1 with a flag
    (1, BOTTOM, (-4, 0), BOTTOM, (4, 0)),  # and with a foot
    (4, LEFT, (0, 0), TOP, (0, 0)),  # a 4 that is closed at its top
    (7, MIDDLE, (-4, 0), MIDDLE, (4, 0)),  # a crossed 7
    (9, BOTTOM, (0, 0), BOTTOM, (-6, -2)),  # a 9 with a curled tail
)


def other_hand(images: Tensor, labels: Tensor) -> Tensor:
    """Digits (N, 1, 28, 28) with half of the strokes of `HANDS` that belong to their labels (N,)."""
    device = images.device
    rows = torch.arange(28, device=device)
    ink = images[:, 0] > 100
    filled = torch.stack([ink.any(2), ink[:, :, :14].any(2)]).int()  # of the whole digit, of its left half
    top, left = filled.argmax(2)
    bottom = 27 - filled[0].flip(1).argmax(1)
    places = []
    for row, part in ((top, 28), ((top + bottom) // 2, 28), (bottom, 28), (left, 14)):
        line = ink[torch.arange(len(ink), device=device), row, :part].float()
        places.append(torch.stack([(line @ rows[:part].float()) / line.sum(1).clamp(min=1), row.float()], 1))
    strokes = []
    for label, start, begin, end, finish in HANDS:
        jitter = _uniform(images, 0.4, 1.6, 1) * _uniform(images, 0.8, 1.2, 4)
        ends = torch.cat([places[start], places[end]], 1) + _row(*begin, *finish, device=device) * jitter
        drawn = (labels == label) & (_uniform(images, 0, 1, 1)[:, 0] < 0.5)
        strokes.append(torch.where(drawn[:, None], ends, -99.0))  # else far outside
    return torch.maximum(images, 255 * segments(torch.stack(strokes, 1), _uniform(images, 2, 5)))


@cache
def _row(*numbers: float, device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)


def segments(ends: Tensor, width: Tensor) -> Tensor:
    """Lines from ends (N, S, 4), x and y of both in pixels, of a width (N, 1, 1, 1), to ink 0–1 (N, 1, 28, 28)."""
    x, y = _places(28, 28, ends.device)[:2] * 14 + 13.5  # (784,)
    x0, y0, x1, y1 = ends[..., None].unbind(2)  # (N, S, 1)
    across, down = x1 - x0, y1 - y0
    along = ((x - x0) * across + (y - y0) * down) / (across.square() + down.square()).clamp(min=1e-3)
    along = along.clamp(0, 1)
    distance = ((x0 + along * across - x).square() + (y0 + along * down - y).square()).amin(1).sqrt()
    return (width / 2 + 0.5 - distance.view(-1, 1, 28, 28)).clamp(0, 1)


# --- damage ----------------------------------------------------------------------------------------------------------


def damaged(images: Tensor) -> Tensor:
    """Digits (N, 1, 28, 28) in pictures that are badly lit, dirty, blurred, noisy or drawn over, several at once."""
    images = images / 255
    for kind in DAMAGES:
        images = on_some(images, EACH_DAMAGE, lambda some, _: kind(some).clamp(0, 1))  # noqa: B023 — called at once
    return 255 * images


def _uniform(images: Tensor, low: float, high: float, *shape: int) -> Tensor:
    """Random numbers, one for each image, (N, 1, 1, 1), or (N, *shape)."""
    return low + (high - low) * torch.rand(len(images), *(shape or (1, 1, 1)), device=images.device)


def _smooth(values: Tensor, images: Tensor) -> Tensor:
    """Random values (N, C, cells, cells) as smooth clouds over images, (N, C, H, W)."""
    return F.interpolate(values, images.shape[-2:], mode="bicubic", align_corners=False)


def _filtered(images: Tensor, kernels: Tensor) -> Tensor:
    """Each image (N, 1, H, W) by its own kernel (N, k, k)."""
    size = kernels.shape[-1]
    columns = F.unfold(F.pad(images, [size // 2] * 4, mode="replicate"), size)  # (N, k², H·W)
    return (kernels.flatten(1)[:, None] @ columns).view_as(images)


def edges(images: Tensor) -> Tensor:
    """Only what changes from a pixel to the next, as a random filter without a mean finds it, stretched to full ink."""
    kernels = torch.randn(len(images), 3, 3, device=images.device)
    found = _filtered(images, kernels - kernels.mean((1, 2), keepdim=True)).abs()
    return found * _uniform(images, 1, 3) / found.amax((2, 3), keepdim=True).clamp(min=0.01)


def lines(images: Tensor) -> Tensor:
    """A scribble of three lines, bright or dark."""
    points = _uniform(images, -4, 32, 4, 2)
    ink = segments(torch.cat([points[:, :-1], points[:, 1:]], 2), _uniform(images, 0.5, 2.5))
    return torch.lerp(images, (_uniform(images, 0, 1) < 0.75).float(), ink * _uniform(images, 0.5, 1))


def blots(images: Tensor) -> Tensor:
    """Spots, bright or dark, of soft edges."""
    mask = _smooth(_uniform(images, 0, 1, 1, 10, 10), images) - _uniform(images, 0.65, 0.95)
    level = (_uniform(images, 0, 1) < 0.6) * _uniform(images, 0.4, 1)
    return torch.lerp(images, level, (mask * _uniform(images, 3, 20)).clamp(0, 1))


def patch(images: Tensor) -> Tensor:
    """A rectangle, or all but one, in which what was dark is bright."""
    x, y = _places(28, 28, images.device)[:2].view(2, 1, 28, 28)
    left, right = _uniform(images, -1.6, 1.6, 2, 1, 1).sort(1)[0][:, :, None].unbind(1)  # (N, 1, 1, 1)
    top, bottom = _uniform(images, -1.6, 1.6, 2, 1, 1).sort(1)[0][:, :, None].unbind(1)
    inside = (x > left) & (x < right) & (y > top) & (y < bottom)
    inside = torch.where(_uniform(images, 0, 1) < 0.5, inside, ~inside).float()
    return torch.lerp(images, _uniform(images, 0.3, 1) - images, inside).abs()


def jitter(images: Tensor) -> Tensor:
    """Each pixel from one beside it, as through rough glass."""
    return displaced(images, _uniform(images, 0.5, 2.5), 28)


def blur(images: Tensor) -> Tensor:
    """Out of focus, or moved along a line: a Gaussian of two widths at any angle, as a product of spectra."""
    angle, along, across = _uniform(images, 0, math.pi), _uniform(images, 0.5, 4), _uniform(images, 0.3, 1.5)
    down, right = torch.fft.fftfreq(28, device=images.device)[:, None], torch.fft.rfftfreq(28, device=images.device)
    u, v = right * angle.cos() + down * angle.sin(), down * angle.cos() - right * angle.sin()
    spectrum = torch.fft.rfft2(images) * (-2 * math.pi**2 * ((along * u) ** 2 + (across * v) ** 2)).exp()
    found = torch.fft.irfft2(spectrum, images.shape[-2:])
    return found / found.amax((2, 3), keepdim=True).clamp(min=0.1).pow(_uniform(images, 0, 1))


def background(images: Tensor) -> Tensor:
    """Paper of uneven light."""
    clouds = _smooth(_uniform(images, 0, 1, 1, 5, 5), images)
    return torch.lerp(images, clouds * _uniform(images, 0.3, 1.5), _uniform(images, 0.2, 0.8))


def contrast(images: Tensor) -> Tensor:
    """Brighter or darker, with less or more between ink and paper."""
    return images * _uniform(images, 0.2, 1.5) + _uniform(images, -0.2, 0.8)


def noise(images: Tensor) -> Tensor:
    """Normal noise on every pixel."""
    return images + _uniform(images, 0, 0.4) * torch.randn_like(images)


def specks(images: Tensor) -> Tensor:
    """Single pixels, bright or dark."""
    draws = torch.rand_like(images)
    fraction = _uniform(images, 0, 0.3)
    return torch.where(draws < fraction / 2, 1.0, torch.where(draws > 1 - fraction / 2, 0.0, images))


DAMAGES = (edges, lines, blots, patch, jitter, blur, background, contrast, noise, specks)  # in this order

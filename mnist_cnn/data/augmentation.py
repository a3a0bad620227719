"""Random affine maps of training digits: one drawn for each, all applied by one call."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from mnist_cnn.config.settings import Augmentation


class Affine:
    """Digits (N, 1, 28, 28), pixels 0–255, each turned, sheared, scaled and shifted by random amounts, to float32.

    Every amount is uniform between its negative and itself, the factor of size between 1 - `scale` and 1 + `scale`.
    A digit is sheared along its rows, turned and scaled about its middle, then shifted. Bilinear; black comes in from
    outside. The draws are of torch's default generator on the CPU, whose state a checkpoint has.
    """

    def __init__(self, settings: Augmentation) -> None:
        angles = math.radians(settings.rotation), math.radians(settings.shear)
        self.bounds = torch.tensor([*angles, settings.scale, settings.shift, settings.shift])[:, None]

    def __call__(self, images: Tensor) -> Tensor:
        return warped(images, self.bounds * (2 * torch.rand(len(self.bounds), len(images)) - 1))


def warped(images: Tensor, amounts: Tensor) -> Tensor:
    """Images (N, 1, H, W) to float32, by rotation and shear (radians), scale, shift right and down (pixels): (5, N)."""
    rotation, shear, scale, right, down = amounts.to(images.device)
    cosine, sine, tangent, size = rotation.cos(), rotation.sin(), shear.tan(), 1 + scale
    # grid_sample asks where each pixel of the outcome comes from: the inverse of shear, rotation, scale and shift.
    inverse = torch.stack([cosine - tangent * sine, -sine - tangent * cosine, sine, cosine]).view(2, 2, -1) / size
    height, width = images.shape[-2:]
    shift = torch.stack([right * 2 / width, down * 2 / height])  # the grid is 2 wide and 2 high
    origin = -(inverse * shift).sum(1)
    maps = torch.cat([inverse, origin[:, None]], dim=1).permute(2, 0, 1)  # (N, 2, 3)
    with torch.autocast(images.device.type, enabled=False):  # bfloat16 would move pixels
        # What F.affine_grid computes, by one product and not by one for each digit: three times as fast on a CPU.
        grid = maps.flatten(0, 1) @ _places(height, width, images.device)
        grid = grid.view(-1, 2, height, width).permute(0, 2, 3, 1)
        return F.grid_sample(images.float(), grid, align_corners=False)


@cache
def _places(height: int, width: int, device: torch.device) -> Tensor:
    """Where the pixels' middles lie, from -1 to 1 across and down, and 1: float32 (3, height · width)."""
    y, x = ((2 * torch.arange(size, device=device) + 1) / size - 1 for size in (height, width))
    down, across = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([across, down, torch.ones_like(down)]).flatten(1)

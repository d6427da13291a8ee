"""Aligned training crops, and random variations that keep the identity.

Generated images, which the networks will see, are blurred, noisy and misaligned; renders are not.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from negfacediff_core.faces.align import align_batch
from negfacediff_core.images import to_float, to_uint8

ALIGN_CHUNK = 1024


def pooled_crops(images: NDArray[np.uint8], landmarks: NDArray[np.floating], pool: int) -> NDArray[np.uint8]:
    """Align `(N, H, W, 3)` uint8 images by `(N, 5, 2)` landmarks to 112 pixels and average `pool` x `pool`.

    Returns `(N, 112 // pool, 112 // pool, 3)` uint8: what a network with that `input_pool` sees of the crop.
    """
    side = 112 // pool
    crops = np.empty((len(images), side, side, 3), np.uint8)
    for start in range(0, len(images), ALIGN_CHUNK):
        part = slice(start, start + ALIGN_CHUNK)
        aligned = to_float(align_batch(images[part], landmarks[part]))
        crops[part] = to_uint8(F.avg_pool2d(aligned, pool)).numpy()
    return crops


class Draws:
    """Random numbers for one batch, one row an image, from one generator."""

    def __init__(self, rows: int, generator: torch.Generator):
        self.rows = rows
        self.generator = generator

    def uniform(self, low: float, high: float, columns: int = 1) -> Tensor:
        """`(rows, columns, 1, 1)` uniform numbers."""
        return low + (high - low) * torch.rand(self.rows, columns, 1, 1, generator=self.generator)

    def normal(self, deviation: float) -> Tensor:
        """`(rows,)` normal numbers."""
        return deviation * torch.randn(self.rows, generator=self.generator)

    def chosen(self, share: float) -> Tensor:
        """Indices of a random `share` of the rows, each row by its own draw."""
        return torch.nonzero(torch.rand(self.rows, generator=self.generator) < share)[:, 0]


def _move(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale and shift each crop a little, as misplaced landmarks would (about 1.5 pixels of 112)."""
    draws = Draws(len(crops), generator)
    angle, scale = draws.normal(0.05), 1 + draws.normal(0.04)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    # Shifts are in half sides: .027 of 56 pixels is 1.5 pixels.
    rows = [cosine, -sine, draws.normal(0.027), sine, cosine, draws.normal(0.027)]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(crops.shape), align_corners=False)
    return F.grid_sample(crops, grid, "bilinear", "border", align_corners=False)


def _coarsen(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Reduce to a half up to nine tenths of the side and enlarge again: one size for all."""
    side = crops.shape[-1]
    share = 0.5 + 0.4 * float(torch.rand((), generator=generator))
    small = F.interpolate(crops, size=round(side * share), mode="bilinear", antialias=True)
    return F.interpolate(small, size=side, mode="bilinear")


def _blur(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Mix each crop with its 3x3 binomial blur by a random share."""
    kernel = torch.tensor([1.0, 2.0, 1.0])
    weights = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(crops, (1, 1, 1, 1), "replicate"), weights, groups=3)
    return torch.lerp(crops, blurred, Draws(len(crops), generator).uniform(0.3, 1))


def _grey(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Luma (ITU-R BT.601) in all three channels."""
    luma = crops.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (crops * luma).sum(1, keepdim=True).expand_as(crops)


def _noise(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise of up to 10 grey levels to each crop."""
    deviation = Draws(len(crops), generator).uniform(0, 0.08)
    return crops + deviation * torch.randn(crops.shape, generator=generator)


def _erase(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Paint one grey rectangle of up to a third of the side over each crop."""
    draws = Draws(len(crops), generator)
    position = torch.arange(crops.shape[-1]) / crops.shape[-1]
    across = (position.view(1, 1, 1, -1) - draws.uniform(0, 1)).abs() < draws.uniform(0.03, 0.17)
    down = (position.view(1, 1, -1, 1) - draws.uniform(0, 1)).abs() < draws.uniform(0.03, 0.17)
    return torch.where(across & down, draws.uniform(-1, 1), crops)


# What is done to which share of the crops, in this order.
AUGMENTATIONS: tuple[tuple[float, Callable[[Tensor, torch.Generator], Tensor]], ...] = (
    (0.5, _move),
    (0.3, _coarsen),
    (0.25, _blur),
    (0.1, _grey),
    (0.4, _noise),
    (0.2, _erase),
)


def augment(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Vary `(N, 3, S, S)` float crops in [-1, 1], to the same shape and range.

    Mirror, light and colour first, then `AUGMENTATIONS`.
    All randomness comes from `generator`; the input is left as it is.
    """
    draws = Draws(len(crops), generator)
    mirrored = draws.chosen(0.5)
    # Contrast for all channels, a slight tint for each, brightness for all.
    varied = crops * draws.uniform(0.8, 1.2) * draws.uniform(0.95, 1.05, 3) + draws.uniform(-0.12, 0.12)
    varied[mirrored] = varied[mirrored].flip(3)
    for share, vary in AUGMENTATIONS:
        rows = draws.chosen(share)
        if len(rows):
            varied[rows] = vary(varied[rows], generator)
    return varied.clamp_(-1, 1)

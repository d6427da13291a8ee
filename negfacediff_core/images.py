"""The one pair of converters between images at rest (uint8 NHWC) and in memory (float32 NCHW)."""

import numpy as np
import torch
from numpy.typing import NDArray


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Convert `(N, 3, H, W)` float RGB in [-1, 1] to `(N, H, W, 3)` uint8, rounding to nearest and clipping.

    The result lives on the device of `images`, so that only a quarter of the bytes travel to the host.
    """
    levels = images.permute(0, 2, 3, 1).float().add(1).mul(127.5).round_().clamp_(0, 255)
    return levels.to(torch.uint8).contiguous()


def to_float(images: NDArray[np.uint8]) -> torch.Tensor:
    """Convert `(N, H, W, 3)` uint8 RGB to `(N, 3, H, W)` float32 in [-1, 1]: x / 127.5 - 1."""
    planes = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).contiguous()
    return planes.float().div_(127.5).sub_(1)

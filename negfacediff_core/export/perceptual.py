"""A perceptual hash: 255 bits that recompression and resizing hardly change.

The bits are the signs of the lowest 16 x 16 coefficients of the grey image's cosine transform, but for the
mean. They are taken at the image's own size, so that no two resizers can disagree.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

#: Coefficients along each axis, and bits of a hash.
LOWEST = 16
BITS = LOWEST * LOWEST - 1
#: Counts the forms that hashes have had: hashes that are kept are of one form.
FORM = 1
# Luma of ITU-R BT.601, which JPEG keeps best.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def image_hash(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Hash `(N, H, W, 3)` RGB, H and W at least 16: `(N, 32)` uint8, whose last bit is not used."""
    height, width = images.shape[1:3]
    grey = images.astype(np.float32) @ _LUMA
    coefficients = _cosines(height) @ grey @ _cosines(width).T
    signs = coefficients.reshape(len(images), -1)[:, 1:] > 0
    return np.packbits(signs, axis=1)


def distances(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Return in how many bits hashes differ: `(M, 32)` and `(N, 32)` make `(M, N)`."""
    first, second = (np.ascontiguousarray(hashes).view(np.uint64) for hashes in (one, other))
    apart = np.zeros((len(one), len(other)), np.uint16)
    for word in range(first.shape[1]):
        apart += np.bitwise_count(first[:, None, word] ^ second[None, :, word])
    return apart


@lru_cache(maxsize=16)
def _cosines(size: int) -> NDArray[np.float32]:
    """The lowest rows of the cosine transform (DCT-II) of `size` values: `(16, size)`."""
    place = (np.arange(size) + 0.5) / size
    return np.cos(np.pi * np.arange(LOWEST)[:, None] * place).astype(np.float32)

"""What the images of one identity are to each other: consistent, diverse, copies, or strays."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.evaluation.distributions import unit_vectors

#: A pair of images of one identity is a near-duplicate when both hold: to the judge they are the same, and so
#: are their pixels. On faces of the demo pack JPEG at quality 30, noise of 8 levels and brightness by 8
#: leave cosines of at least .97 and at most 8 levels; the closest of 5,760 pairs of different images are 17
#: levels apart.
DUPLICATE_COSINE, DUPLICATE_LEVELS = 0.95, 10.0
#: Side of the thumbnails in which pixels are compared: below it, noise and recoding average out.
THUMBNAIL = 28


class Within(NamedTuple):
    """One entry an identity, `(B,)`; NaN where fewer than two images say it.

    `total` is the sum of its unit embeddings, `(B, D)` float64, and `consistency` the mean cosine of its
    pairs. An image's own centre is the normalised sum
    of its identity's *other* images, so that no image vouches for itself: `own` `(B, R)` is the cosine to it,
    `centre_least` the least of them, and `spread` the mean angle to it in degrees. `near_duplicates` (int64)
    counts pairs. `pixel_difference` is the mean over pairs of the root mean square difference of thumbnails,
    in levels of 255.
    """

    total: NDArray[np.float64]
    consistency: NDArray[np.float64]
    own: NDArray[np.float64]
    centre_least: NDArray[np.float64]
    spread: NDArray[np.float64]
    near_duplicates: NDArray[np.int64]
    pixel_difference: NDArray[np.float64]


def thumbnails(crops: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Average `(..., 112, 112, 3)` uint8 crops over 4 x 4 pixels: `(..., 2352)` float32 in [0, 255]."""
    *shape, height, width, channels = crops.shape
    high, wide = height // THUMBNAIL, width // THUMBNAIL
    # first whole rows, which lie together: four times as fast as both axes at once
    rows = crops.reshape(*shape, THUMBNAIL, high, width * channels).sum(axis=-2, dtype=np.uint16)
    cells = rows.reshape(*shape, THUMBNAIL, THUMBNAIL, wide, channels).sum(axis=-2, dtype=np.uint16)
    return cells.reshape(*shape, -1).astype(np.float32) / (high * wide)


def within_identities(
    embeddings: NDArray[np.float32], valid: NDArray[np.bool_], small: NDArray[np.float32]
) -> Within:
    """Compare the images of each of B identities: `(B, R, D)`, `(B, R)`, and `thumbnails` `(B, R, P)`.

    Costs B R^2 (D + P) multiplications. Embeddings need not be normalised; invalid images are left out.
    """
    unit = np.zeros(embeddings.shape)
    unit[valid] = unit_vectors(embeddings[valid])
    total = unit.sum(axis=1)
    rows = [_one(unit[i, shown], small[i, shown]) for i, shown in enumerate(valid)]
    own = np.full(valid.shape, np.nan)
    own[valid] = np.concatenate([row[0] for row in rows]) if rows else []
    consistency, least, spread, copies, difference = np.array([row[1:] for row in rows]).reshape(-1, 5).T
    return Within(total, consistency, own, least, spread, copies.astype(np.int64), difference)


def _one(
    unit: NDArray[np.float64], small: NDArray[np.float32]
) -> tuple[NDArray[np.float64], float, float, float, float, float]:
    """Own cosines `(n,)`, then consistency, least, spread, near-duplicates and pixel difference."""
    count = len(unit)
    if count < 2:
        return np.full(count, np.nan), np.nan, np.nan, np.nan, 0, np.nan
    others = unit.sum(axis=0) - unit
    length = np.linalg.norm(others, axis=1)
    # Others that cancel have no centre; no direction is near to it.
    own = np.clip((unit * others).sum(axis=1) / np.where(length > 1e-9, length, np.inf), -1.0, 1.0)
    pairs = np.triu_indices(count, k=1)
    cosines = (unit @ unit.T)[pairs]
    levels = _distances(small.astype(np.float64))[pairs]
    copies = (cosines >= DUPLICATE_COSINE) & (levels <= DUPLICATE_LEVELS)
    return own, cosines.mean(), own.min(), np.degrees(np.arccos(own)).mean(), copies.sum(), levels.mean()


def _distances(small: NDArray[np.float64]) -> NDArray[np.float64]:
    """Root mean square differences `(n, n)` of the rows of `(n, P)`."""
    centred = small - small.mean(axis=0)  # keeps the products small, and their differences exact
    squares = (centred**2).sum(axis=1)
    distances = squares[:, None] + squares - 2 * centred @ centred.T
    return np.sqrt(np.maximum(distances, 0.0) / small.shape[1])

"""What comparison scores (cosines) are kept as: counts over ascending levels, with exact moments."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import NegFaceDiffError


@dataclass(frozen=True)
class Distribution:
    """Scores of one kind: `counts` `(K,)` int64 at ascending `levels` `(K,)` float64, and exact moments.

    A score is at its level or above it by less than `resolution` (0: levels are the scores themselves).
    `std` is the population deviation.
    """

    levels: NDArray[np.float64]
    counts: NDArray[np.int64]
    mean: float
    std: float
    resolution: float = 0.0

    @property
    def size(self) -> int:
        """How many scores there are."""
        return int(self.counts.sum())

    @classmethod
    def of(cls, scores: NDArray[np.floating]) -> "Distribution":
        """Keep every score of a list `(N,)`; N = 0 has NaN moments."""
        scores = np.asarray(scores, dtype=np.float64)
        if not np.isfinite(scores).all():
            raise NegFaceDiffError(
                "comparison scores hold NaN or infinity: mask the images whose embedding failed"
            )
        levels, counts = np.unique(scores, return_counts=True)
        moments = (float(scores.mean()), float(scores.std())) if len(scores) else (np.nan, np.nan)
        return cls(levels, counts.astype(np.int64), *moments)


class Comparisons(NamedTuple):
    """Scores within identities (genuine) and across identities (impostor)."""

    genuine: Distribution
    impostor: Distribution


def unit_vectors(embeddings: NDArray[np.float32], first: int = 0) -> NDArray[np.float64]:
    """Scale `(N, D)` embeddings to unit length in float64.

    NaN, infinity or zero length raises NegFaceDiffError, which counts embeddings from `first`.
    """
    rows = np.asarray(embeddings, dtype=np.float64)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(length) & (length > 0)))
    if len(bad):
        raise NegFaceDiffError(
            f"{len(bad)} embeddings marked as valid have NaN, infinite or zero length (the first is number "
            f"{first + bad[0]}): mark failed images as not valid"
        )
    return rows / length

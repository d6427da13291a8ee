"""How different the identities of a set are from each other: strays, distinct identities, capacity."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.evaluation.distributions import Comparisons
from negfacediff_core.evaluation.metrics import error_rates, point_at_most

#: False match rate whose threshold tells two identities apart, unless a cosine is given.
UNIQUE_FMR = 0.001
# Cosines that are held at a time: 128 MB in float64.
_HELD = 2**24

Centres = NDArray[np.float64]


class Crowding(NamedTuple):
    """`distinct` of all identities are told apart; `matches` of `pairs` of centres match."""

    distinct: int
    matches: int
    pairs: int

    @property
    def capacity(self) -> float | None:
        """Pairs / matches: how many equally likely, clearly different identities would match as often.

        The inverse of the chance that two identities match is the diversity of order 2 for a similarity of 0
        or 1 (Leinster and Cobbold, Ecology 93, 2012). None where no two match: the set is too small to tell.
        """
        return self.pairs / self.matches if self.matches else None


def match_threshold(comparisons: Comparisons, fmr: float = UNIQUE_FMR) -> float:
    """The lowest observed threshold at which at most `fmr` of the impostor scores match; NaN if none does."""
    threshold = point_at_most(error_rates(*comparisons), fmr).threshold
    return threshold if np.isfinite(threshold) else np.nan


def centres_of(totals: NDArray[np.float64]) -> tuple[Centres, NDArray[np.int64]]:
    """Unit centres `(C, D)` of sums of unit embeddings `(I, D)`, and the numbers `(C,)` of those with one.

    An identity without valid images, or whose images cancel, has no centre.
    """
    length = np.linalg.norm(totals, axis=1)
    there = np.flatnonzero(length > 1e-9)
    return totals[there] / length[there, None], there


def crowding(centres: Centres, threshold: float, block: int | None = None) -> Crowding:
    """Count distinct identities among unit centres `(C, D)`, and the pairs that match.

    In the order of their numbers an identity is distinct if its centre's cosine to each distinct one before
    it is below `threshold`: the uniqueness of DCFace (arXiv 2304.07060), for identities in place of their
    first images. Costs C^2 D / 2 multiplications, in products of `block` rows (default: as many as
    take 128 MB).
    """
    count = len(centres)
    block = block or max(1, _HELD // max(1, count))
    kept = np.zeros(count, np.bool_)
    matches = 0
    for start in range(0, count, block):
        rows = centres[start : start + block]
        near = rows @ centres[: start + len(rows)].T >= threshold
        earlier, inside = near[:, :start], np.tril(near[:, start:], k=-1)
        matches += int(earlier.sum()) + int(inside.sum())
        taken = (earlier & kept[:start]).any(axis=1)
        for row in np.flatnonzero(~taken):
            kept[start + row] = not (inside[row] & kept[start : start + len(rows)]).any()
    return Crowding(int(kept.sum()), matches, count * (count - 1) // 2)


def strays(
    vectors: NDArray[np.float64],
    identity: NDArray[np.int64],
    own: NDArray[np.float64],
    centres: Centres,
    numbers: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Tell which images are nearer to the centre of another identity than to their own: `(N,)`.

    `vectors` `(N, D)` are unit embeddings of identities `identity` `(N,)`, `own` `(N,)` their cosines to the
    centres of the *other* images of those (`Within.own`; an image that is alone, NaN, is no stray), `centres`
    `(C, D)` the unit centres of identities `numbers` `(C,)`, ascending. It is the misses of closed-set
    identification at rank 1, leaving one out; with contexts as centres it is those of identification by
    context. Costs N C D multiplications, in products of at most 128 MB.
    """
    found = np.zeros(len(vectors), np.bool_)
    if not len(centres):
        return found
    block = max(1, _HELD // len(centres))
    for start in range(0, len(vectors), block):
        part = slice(start, start + block)
        cosines = vectors[part] @ centres.T
        place = np.minimum(np.searchsorted(numbers, identity[part]), len(numbers) - 1)
        mine = np.flatnonzero(numbers[place] == identity[part])
        cosines[mine, place[mine]] = -np.inf
        found[part] = cosines.max(axis=1) > own[part]
    return found

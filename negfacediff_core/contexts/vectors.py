"""Sets of contexts: what makes one unusable, how close the closest are, how far apart all can be."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import ContextsError

Contexts = NDArray[np.float32]

# Rows of cosines that are held at a time.
BLOCK = 1024


class Closest(NamedTuple):
    """For each of N contexts the nearest `other` `(N,)` int64, and the `cosine` `(N,)` to it."""

    cosine: NDArray[np.float64]
    other: NDArray[np.int64]


def normalise(vectors: NDArray[Any]) -> Contexts:
    """Scale the rows of `(N, W)` to unit length, in float64, and return float32."""
    rows = np.asarray(vectors, dtype=np.float64)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def closest(contexts: NDArray[np.floating]) -> Closest:
    """Find the nearest other context of each of `(N, W)` unit vectors, N >= 2; exact, in blocks of rows."""
    rows = contexts.astype(np.float64)
    cosine, other = np.empty(len(rows)), np.empty(len(rows), np.int64)
    for start in range(0, len(rows), BLOCK):
        part = np.arange(start, min(start + BLOCK, len(rows)))
        cosines = rows[part] @ rows.T
        cosines[part - start, part] = -np.inf
        other[part] = cosines.argmax(axis=1)
        cosine[part] = cosines[part - start, other[part]]
    return Closest(cosine, other)


def lowest_worst_cosine(count: int, width: int) -> float:
    """Lower bound of the largest cosine among `count` unit vectors in `width` dimensions.

    Rankin (Proc. Glasgow Math. Assoc. 2, 1955): -1 / (N - 1) for N <= W + 1, where a simplex reaches it, and
    0 beyond, where a cross-polytope reaches it up to N = 2 W.
    """
    return -1.0 / (count - 1) if count <= width + 1 else 0.0


def check_contexts(contexts: NDArray[Any], width: int, identities: int | None = None) -> None:
    """Raise ContextsError unless `contexts` is `(N, width)`, finite, non-zero, free of exact duplicates, and
    N >= identities.

    The message names the first bad rows. Lengths other than one are no error: sources normalise.
    """
    if contexts.ndim != 2 or contexts.shape[1] != width:
        raise ContextsError(
            f"contexts of shape {contexts.shape} do not fit a generator that takes width {width}: "
            f"they must be (identities, {width}), from the recogniser that the generator was trained with"
        )
    if identities is not None:
        check_enough(len(contexts), identities)
    unusable = np.flatnonzero(~np.isfinite(contexts).all(axis=1))
    if len(unusable):
        raise ContextsError(f"contexts hold NaN or infinity in {_first(unusable)}: remove or mend these rows")
    empty = np.flatnonzero(~contexts.any(axis=1))
    if len(empty):
        raise ContextsError(f"contexts have zero length in {_first(empty)}: a context must have a direction")
    as_bytes = np.ascontiguousarray(contexts).view(np.dtype((np.void, contexts.dtype.itemsize * width)))[:, 0]
    _, first, group = np.unique(as_bytes, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[group] != np.arange(len(contexts)))
    if len(repeated):
        raise ContextsError(
            f"contexts repeat an earlier row exactly in {_first(repeated)} (row {repeated[0]} equals row "
            f"{first[group[repeated[0]]]}): two identities cannot share a context"
        )


def check_enough(contexts: int, identities: int) -> None:
    """Raise ContextsError if there are fewer contexts than identities."""
    if contexts < identities:
        raise ContextsError(
            f"{identities} identities were asked for but only {contexts} contexts are given: "
            f"set identities (and negatives.pool) to {contexts} or fewer, or bring more contexts"
        )


def _first(rows: Iterable[int], shown: int = 5) -> str:
    """Name the first few rows: "rows 3, 8 and 12 more"."""
    numbers = [int(row) for row in rows]
    more = f" and {len(numbers) - shown} more" if len(numbers) > shown else ""
    return f"row{'s' * (len(numbers) > 1)} " + ", ".join(map(str, numbers[:shown])) + more

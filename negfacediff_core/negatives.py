"""Rules that pick the negative identity of each identity from a fixed pool of contexts (arXiv 2508.09661).

Similarities are blocked float32 products that only *shortlist*; whatever lies within rounding of the decision
is scored again in float64, row by row. The choice is therefore exact, and independent of block size, order
and thread count.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from negfacediff_core.errors import ContextsError
from negfacediff_core.noise import NEGATIVES, uniform

#: What stands for "no identity" in `Negatives.index`.
NO_NEGATIVE = -1
#: Similarities held at once while mining (float32, so 32 MiB and a few masks).
_BLOCK_ELEMENTS = 2**23


@dataclass(frozen=True)
class Negatives:
    """The negative of each identity: `index` `(N,)` int64 rows of the pool, `cosine` `(N,)` float32.

    The rules none and null name no identity: index -1, cosine NaN.
    """

    index: NDArray[np.int64]
    cosine: NDArray[np.float32]


@dataclass(frozen=True)
class Search:
    """What a rule works on: contexts `(N, W)` of the identity numbers `(N,)`, the pool `(M, W)`, and the
    options.
    """

    contexts: NDArray[np.float32]
    identities: NDArray[np.int64]
    pool: NDArray[np.float32]
    seed: int
    rand: str
    mid: str
    block: int

    @property
    def in_pool(self) -> NDArray[np.bool_]:
        """Which identities `(N,)` are themselves in the pool, at the row of their number."""
        return self.identities < len(self.pool)


def mine(
    contexts: NDArray[np.float32],
    pool: NDArray[np.float32] | None,
    rule: str,
    seed: int,
    *,
    identities: NDArray[np.int64] | None = None,
    rand: str = "seeded",
    mid: str = "corrected",
    block: int | None = None,
) -> Negatives:
    """Pick the negative of each context `(N, W)` from `pool` `(M, W)`, both float32 unit vectors, by a rule
    of RULES.

    Row j of the pool is identity j, and is never its own negative. `pool=None` takes the contexts themselves.
    `identities` `(N,)` are the identity numbers of the rows (default 0..N-1), so that a work unit can mine
    its own rows. Equal cosines go to the lowest row of the pool. Negatives depend on the pool, and on nothing
    else that grows.

    Named options: `rand="ring"` takes identity i - 1 and `mid="paper"` counts the identity itself among the
    candidates, as the published code does. `block` is the number of rows scored at once; memory grows with
    block x M, the result does not change. Raises ContextsError.
    """
    if pool is None:
        pool = contexts
    if identities is None:
        identities = np.arange(len(contexts), dtype=np.int64)
    if rule not in RULES:
        raise ContextsError(f"there is no negative rule {rule!r}: choose one of {', '.join(RULES)}")
    for name, value, allowed in (("rand", rand, ("seeded", "ring")), ("mid", mid, ("corrected", "paper"))):
        if value not in allowed:
            raise ContextsError(f"the option {name} is {value!r}: choose {' or '.join(allowed)}")
    _check_unit_vectors(contexts, pool, identities)
    if len(pool) < 2 and RULES[rule] is not _nobody:
        raise ContextsError(
            f"a pool of {len(pool)} leaves nothing to pick: negatives need at least two identities"
        )
    rows = block or max(1, _BLOCK_ELEMENTS // max(1, len(pool)))
    index = RULES[rule](Search(contexts, identities, pool, seed, rand, mid, rows))
    cosine = np.full(len(contexts), np.nan, dtype=np.float32)
    named = np.flatnonzero(index != NO_NEGATIVE)
    cosine[named] = _exact_cosines(contexts[named], pool[index[named]])
    return Negatives(index, cosine)


def check_negatives(index: NDArray[np.int64], identities: NDArray[np.int64], pool: int) -> None:
    """Raise ContextsError if a negative map `(N,)` points outside the pool of that size, or an identity at
    itself.
    """
    outside = np.flatnonzero((index < NO_NEGATIVE) | (index >= pool))
    if len(outside):
        row = outside[0]
        raise ContextsError(
            f"the negative of identity {identities[row]} is {index[row]}, outside the pool of {pool} "
            f"identities ({len(outside)} such rows): mine the negatives again for this pool"
        )
    itself = np.flatnonzero(index == identities)
    if len(itself):
        raise ContextsError(
            f"identity {identities[itself[0]]} is its own negative ({len(itself)} such rows): "
            "guidance would cancel itself; mine the negatives again"
        )


def _check_unit_vectors(
    contexts: NDArray[np.float32], pool: NDArray[np.float32], identities: NDArray[np.int64]
) -> None:
    if contexts.ndim != 2 or pool.ndim != 2 or contexts.shape[1] != pool.shape[1]:
        raise ContextsError(
            f"contexts {contexts.shape} and pool {pool.shape} must be (N, W) and (M, W) of equal width"
        )
    if len(identities) != len(contexts):
        raise ContextsError(f"{len(identities)} identity numbers are given for {len(contexts)} contexts")
    for name, rows in (("contexts", contexts), ("pool", pool)):
        length = np.linalg.norm(rows, axis=1)
        bad = np.flatnonzero(~(np.abs(length - 1) < 1e-3))
        if len(bad):
            raise ContextsError(
                f"row {bad[0]} of the {name} has length {length[bad[0]]:.4g} ({len(bad)} such rows): "
                "normalise them to length 1"
            )


def _exact_cosines(left: NDArray[Any], right: NDArray[Any]) -> NDArray[np.float64]:
    """Cosines of rows `(K, W)` with rows `(K, W)` in float64; each depends on its own two rows only, to the
    last bit.
    """
    return (left.astype(np.float64) * right).sum(axis=1)


def _rounding(width: int) -> float:
    """Bound on the error of a float32 product of two unit vectors: W u, u = 2^-24, whatever the order of
    summation.
    """
    return width * 2.0**-24


def _blocks(search: Search, own: float) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield (rows, similarities `(rows, M)` float32), with `own` for that of an identity to itself."""
    pool = torch.from_numpy(np.ascontiguousarray(search.pool)).T
    in_pool = search.in_pool
    for start in range(0, len(search.contexts), search.block):
        rows = np.arange(start, min(start + search.block, len(search.contexts)))
        similarities = (torch.from_numpy(np.ascontiguousarray(search.contexts[rows])) @ pool).numpy()
        present = in_pool[rows]
        similarities[np.flatnonzero(present), search.identities[rows[present]]] = own
        yield rows, similarities


def _ranked(search: Search, rank: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> NDArray[np.int64]:
    """The identity at a rank of ascending cosine, exactly; `rank(others)` for `others` `(rows,)` candidates.
    exact.

    With float32 errors of at most e, the exact order statistic lies within e of the float32 one, v.
    Candidates beyond 2e of v are on a known side of it, so that only those within 2e are scored again, and
    the rank counts on from there.
    """
    margin = 2 * _rounding(search.pool.shape[1])
    index = np.empty(len(search.contexts), dtype=np.int64)
    for rows, similarities in _blocks(search, own=np.inf):
        position = rank(len(search.pool) - search.in_pool[rows].astype(np.int64))
        value = _order_statistic(similarities, position)[:, None]
        low, high = value - margin, value + margin
        below = np.count_nonzero(similarities < low, axis=1)
        row, candidate = np.nonzero((similarities >= low) & (similarities <= high))
        exact = _exact_cosines(search.contexts[rows[row]], search.pool[candidate])
        order = np.lexsort((candidate, exact, row))
        first = np.searchsorted(row[order], np.arange(len(rows)))
        index[rows] = candidate[order][first + position - below]
    return index


def _order_statistic(similarities: NDArray[np.float32], position: NDArray[np.int64]) -> NDArray[np.float32]:
    """The value at `position` `(rows,)` in each ascending row."""
    wanted = np.unique(position)
    ordered = np.partition(similarities, wanted, axis=1)
    return np.take_along_axis(ordered, position[:, None], axis=1)[:, 0]


def _extreme(search: Search, sign: float) -> NDArray[np.int64]:
    """The identity of greatest sign x cosine, the lowest row among equals; exact by the argument of
    `_ranked`.
    """
    margin = 2 * _rounding(search.pool.shape[1])
    index = np.empty(len(search.contexts), dtype=np.int64)
    for rows, similarities in _blocks(search, own=-sign * np.inf):
        if sign > 0:
            row, candidate = np.nonzero(similarities >= similarities.max(axis=1, keepdims=True) - margin)
        else:
            row, candidate = np.nonzero(similarities <= similarities.min(axis=1, keepdims=True) + margin)
        exact = sign * _exact_cosines(search.contexts[rows[row]], search.pool[candidate])
        order = np.lexsort((candidate, -exact, row))
        index[rows] = candidate[order][np.searchsorted(row[order], np.arange(len(rows)))]
    return index


def _nobody(search: Search) -> NDArray[np.int64]:
    return np.full(len(search.contexts), NO_NEGATIVE, dtype=np.int64)


def _rand(search: Search) -> NDArray[np.int64]:
    """A uniform draw among the others by counter, one number an identity; or the published ring i - 1."""
    size = len(search.pool)
    if search.rand == "ring":
        return (search.identities - 1) % size
    identities = search.identities
    draw = uniform(search.seed, identities, np.zeros_like(identities), 0, (1,), stream=NEGATIVES)[
        :, 0
    ].numpy()
    others = size - search.in_pool.astype(np.int64)
    index = (draw * others).astype(np.int64)
    return index + (search.in_pool & (index >= identities))


def _close(search: Search) -> NDArray[np.int64]:
    return _extreme(search, 1.0)


def _far(search: Search) -> NDArray[np.int64]:
    return _extreme(search, -1.0)


def _mid(search: Search) -> NDArray[np.int64]:
    """The identity at the median cosine over the others; the upper of the two where their number is even.

    The published code sorts all M with the identity itself last and takes row M // 2: one place higher for
    even M.
    """
    if search.mid == "paper":
        size = len(search.pool)
        return _ranked(search, lambda others: np.minimum(size // 2, others - 1))
    return _ranked(search, lambda others: others // 2)


RULES: dict[str, Callable[[Search], NDArray[np.int64]]] = {
    "none": _nobody,
    "null": _nobody,
    "rand": _rand,
    "close": _close,
    "mid": _mid,
    "far": _far,
}

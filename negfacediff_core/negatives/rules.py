"""Rules that pick the negative identities of each identity from a fixed pool of contexts (arXiv 2508.09661).

The published rules name one negative. Here each names `count` of them, with weights a_j that sum to 1, so
that guidance pushes away from their weighted predictions: eps~ = (1 + w) eps(c) - w sum_j a_j eps(n_j).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import ContextsError
from negfacediff_core.negatives.memory import MEMORY, plan_blocks
from negfacediff_core.negatives.ranks import at_ranks
from negfacediff_core.negatives.search import (
    Found,
    Pool,
    Search,
    check_lengths,
    cosines_of,
    extremes,
)
from negfacediff_core.noise import NEGATIVES, uniform

#: What stands for "no identity" in `Negatives.index`.
NO_NEGATIVE = -1


@dataclass(frozen=True)
class Negatives:
    """The negatives of each identity, the first the rule's foremost.

    `index` `(N, count)` int64 rows of the pool, `cosine` and `weight` `(N, count)` float32; the weights of a
    row sum to 1. The rules none and null name no identity: one column of index -1, cosine NaN, weight 1.
    """

    index: NDArray[np.int64]
    cosine: NDArray[np.float32]
    weight: NDArray[np.float32]


class Options(NamedTuple):
    """What a rule may depend on besides the contexts."""

    seed: int
    rand: str
    mid: str


def mine(
    contexts: NDArray[np.float32],
    pool: Pool | None,
    rule: str,
    seed: int,
    *,
    identities: NDArray[np.int64] | None = None,
    count: int = 1,
    weights: str = "equal",
    rand: str = "seeded",
    mid: str = "corrected",
    limit: int = MEMORY,
) -> Negatives:
    """Pick `count` negatives of each context `(N, W)` from `pool` `(M, W)`, float32 unit vectors, by a rule
    of RULES.

    Row j of the pool is identity j, never its own negative. `pool=None` takes the contexts themselves.
    `identities` `(N,)` are the identity numbers of the rows (default 0..N-1), so that a work unit can mine
    its own rows; they may lie outside the pool. Equal cosines go to the lowest row of the pool. Negatives
    depend on the pool, and on nothing else that grows.

    close takes the nearest, far the farthest, mid those at the ranks m, m - 1, m + 1, m - 2, ... about the
    median m, as far as there are such ranks, and rand distinct others. `weights` is a kind of WEIGHTS.

    Named options: `rand="ring"` takes identities i - 1, i - 2, ... and `mid="paper"` counts the identity
    itself among the candidates, as the published code does. The pool is read in blocks such that at most
    `limit` bytes are allocated (see `plan_blocks`); the result does not depend on it. Raises ContextsError.
    """
    # Rows in one piece, so that their float64 sums are always taken in the same order.
    contexts = np.ascontiguousarray(contexts, dtype=np.float32)
    if identities is None:
        identities = np.arange(len(contexts), dtype=np.int64)
    _check_choice("rule", rule, RULES)
    for name, value, allowed in (
        ("weights", weights, WEIGHTS),
        ("rand", rand, ("seeded", "ring")),
        ("mid", mid, ("corrected", "paper")),
    ):
        _check_choice(f"option {name}", value, allowed)
    source: Pool = contexts if pool is None else pool
    _check_shapes(contexts, source, identities)
    pick = RULES[rule]
    if pick is None:
        index = np.full((len(contexts), 1), NO_NEGATIVE, dtype=np.int64)
        found = Found(index, np.full(index.shape, np.nan))
    else:
        size = source.shape[0]
        _check_count(count, size)
        blocks = plan_blocks(len(contexts), size, contexts.shape[1], count, limit)
        for start in range(0, len(contexts), blocks.pool):
            check_lengths("contexts", contexts[start : start + blocks.pool], start)
        search = Search(contexts, identities, source, count, blocks)
        found = pick(search, Options(seed, rand, mid))
    shares = WEIGHTS[weights](found.index.shape[1])
    return Negatives(
        found.index,
        found.cosine.astype(np.float32),
        np.tile(shares.astype(np.float32), (len(contexts), 1)),
    )


def check_negatives(index: NDArray[np.int64], identities: NDArray[np.int64], pool: int) -> None:
    """Raise ContextsError if a negative map `(N, count)` points outside the pool of that size, or an identity
    `(N,)` at itself. -1 stands for no negative.
    """
    if index.ndim != 2 or len(index) != len(identities):
        raise ContextsError(
            f"a negative map of shape {index.shape} does not fit {len(identities)} identities: it must be "
            "(identities, negatives of each)"
        )
    outside = np.argwhere((index < NO_NEGATIVE) | (index >= pool))
    if len(outside):
        row, column = outside[0]
        raise ContextsError(
            f"the negative of identity {identities[row]} is {index[row, column]}, outside the pool of {pool} "
            f"identities ({len(outside)} such negatives): mine the negatives again for this pool"
        )
    itself = np.flatnonzero((index == identities[:, None]).any(axis=1))
    if len(itself):
        raise ContextsError(
            f"identity {identities[itself[0]]} is its own negative ({len(itself)} such rows): "
            "guidance would cancel itself; mine the negatives again"
        )


def _check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    choices = list(allowed)
    if value not in choices:
        raise ContextsError(f"the {name} of negatives is {value!r}: choose {', '.join(choices)}")


def _check_shapes(contexts: NDArray[np.float32], pool: Pool, identities: NDArray[np.int64]) -> None:
    if contexts.ndim != 2 or len(pool.shape) != 2 or contexts.shape[1] != pool.shape[1]:
        raise ContextsError(
            f"contexts {contexts.shape} and pool {pool.shape} must be (N, W) and (M, W) of equal width"
        )
    if len(identities) != len(contexts):
        raise ContextsError(f"{len(identities)} identity numbers are given for {len(contexts)} contexts")


def _check_count(count: int, pool: int) -> None:
    if count < 1:
        raise ContextsError(f"{count} negatives an identity are asked for: it must be 1 or more")
    if pool < count + 1:
        raise ContextsError(
            f"a pool of {pool} identities cannot give {count} other identities to each of its own: it needs "
            f"at least {count + 1}; enlarge the pool, or ask for fewer negatives"
        )


def _rand(search: Search, options: Options) -> Found:
    """Uniform draws without repetition among the others, by counter; or the published ring i - 1, ..."""
    draw = _ring if options.rand == "ring" else _drawn
    index = draw(search, options.seed)
    return Found(index, cosines_of(search, index))


def _ring(search: Search, seed: int) -> NDArray[np.int64]:
    return (search.identities[:, None] - np.arange(1, search.count + 1)) % search.size


def _drawn(search: Search, seed: int) -> NDArray[np.int64]:
    """Draw j, `(N,)`, takes one of the others that are left, by its place among them."""
    identities = search.identities
    draws = uniform(seed, identities, np.zeros_like(identities), 0, (search.count,), stream=NEGATIVES).numpy()
    index = np.empty(draws.shape, np.int64)
    # Ascending; what an identity outside the pool may not take lies outside it, too.
    taken = np.minimum(identities, search.size)[:, None]
    for number in range(search.count):
        place = (draws[:, number] * (search.others - number)).astype(np.int64)
        for column in taken.T:
            place += place >= column
        index[:, number] = place
        taken = np.sort(np.column_stack([taken, place]), axis=1)
    return index


def _close(search: Search, options: Options) -> Found:
    return extremes(search, 1.0)


def _far(search: Search, options: Options) -> Found:
    return extremes(search, -1.0)


def _mid(search: Search, options: Options) -> Found:
    """Those about the median cosine over the others; of an even number of them the upper of the two.

    The published code sorts all M with the identity itself last and takes row M // 2: one place higher for
    even M.
    """
    others = search.others
    median = others // 2
    if options.mid == "paper":
        median = np.minimum(search.size // 2, others - 1)
    first = np.clip(median - search.count // 2, 0, others - search.count)
    found = at_ranks(search, first)
    # Ranks m, m - 1, m + 1, ...; a stable sort puts the lower of two equally far ones first.
    distance = np.abs(first[:, None] + np.arange(search.count) - median[:, None])
    order = np.argsort(distance, axis=1, kind="stable")
    return Found(
        np.take_along_axis(found.index, order, axis=1), np.take_along_axis(found.cosine, order, axis=1)
    )


#: Each rule's search, or None where it names no identity.
RULES: dict[str, Callable[[Search, Options], Found] | None] = {
    "none": None,
    "null": None,
    "rand": _rand,
    "close": _close,
    "mid": _mid,
    "far": _far,
}


def _equal(count: int) -> NDArray[np.float64]:
    """Each 1 / count."""
    return np.full(count, 1 / count)


def _by_rank(count: int) -> NDArray[np.float64]:
    """In proportion to 1, 1/2, ..., 1/count."""
    shares = 1 / np.arange(1, count + 1)
    return shares / shares.sum()


#: Each kind gives the weights `(count,)` of an identity's negatives, which sum to 1.
WEIGHTS: dict[str, Callable[[int], NDArray[np.float64]]] = {"equal": _equal, "rank": _by_rank}

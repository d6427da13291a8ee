"""Exact selection by cosine from a pool that is read in blocks, never whole.

Similarities are products of low precision that only *shortlist*: whatever lies within rounding of the
decision is scored again in float64, pair by pair. The choice is therefore exact, and independent of block
sizes, order, thread count and processor.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from negfacediff_core.errors import ContextsError
from negfacediff_core.negatives.memory import Blocks
from negfacediff_core.stopping import heed

# How far from 1 the length of a unit vector may be.
_TOLERANCE = 1e-3
# Below any cosine of two vectors of such lengths, and above the mark of an identity itself.
_LOWEST = -2.0
# Unit roundoffs: the largest relative error of a rounding.
_FLOAT32, _BFLOAT16 = 2.0**-24, 2.0**-8
# Rows that are shortened at once, and strips for each of those that are looked for.
_CACHED, _STRIPS = 128, 8
# Such processors multiply bfloat16 several times as fast as float32; elsewhere it is slower.
FAST_BFLOAT16 = bool(torch.cpu.get_capabilities().get("amx_bf16", False))


class Pool(Protocol):
    """Unit vectors `(M, W)` float32, of which `pool[start:stop]` reads some rows: an array, a memory map, or
    a reader of files.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(M, W)."""
        ...

    def __getitem__(self, rows: slice, /) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Search:
    """What is searched: `count` rows of the pool `(M, W)` for each context `(N, W)`, which is that of the
    identity number `(N,)`.
    """

    contexts: NDArray[np.float32]
    identities: NDArray[np.int64]
    pool: Pool
    count: int
    blocks: Blocks

    @property
    def size(self) -> int:
        """Identities in the pool, M."""
        return self.pool.shape[0]

    @property
    def others(self) -> NDArray[np.int64]:
        """Rows of the pool that each identity may take, `(N,)`: all but its own, if that is in the pool."""
        return self.size - (self.identities < self.size).astype(np.int64)


@dataclass(frozen=True)
class Found:
    """Rows of the pool `(N, count)` int64, and their exact cosines, float64."""

    index: NDArray[np.int64]
    cosine: NDArray[np.float64]


def extremes(search: Search, sign: float) -> Found:
    """The rows of greatest sign x cosine, best first, the lowest row first among equals; one pass.

    The best so far are exact. A row of the pool that beats the last of them has a similarity of at least that
    cosine less its error, and the others of its block are no candidates. So few rows are that errors of
    bfloat16 cost less than its products save.
    """
    found = nothing_found(search)
    for rows in chunks(len(search.contexts), search.blocks.rows):
        best = Found(found.index[rows], found.cosine[rows])
        best.index[:], best.cosine[:] = search.size, _LOWEST
        contexts = np.float32(sign) * search.contexts[rows]
        identities = search.identities[rows]
        for start, block, similarities, error in similarities_to(
            search, contexts, identities, own=-np.inf, coarse=FAST_BFLOAT16
        ):
            floor = rounded_down(error.below(best.cosine[:, -1]))
            promising = np.flatnonzero(_row_maxima(similarities) >= floor)
            for part in chunks(len(promising), search.blocks.examined):
                some = promising[part]
                shortlist = similarities[some]
                # Both are off by an error at most: those that set the limit of the block, and a candidate.
                limit = rounded_down(error.below(error.below(_at_least(shortlist, search.count))))
                row, column = places(shortlist >= np.maximum(floor[some], limit)[:, None])
                cosine = scores_of(contexts, some[row], block, column, search.blocks.scored)
                _keep_best(best, some, row, Found(start + column, cosine))
    found.cosine[:] *= sign
    return found


def cosines_of(search: Search, index: NDArray[np.int64]) -> NDArray[np.float64]:
    """Exact cosines `(N, count)` of the contexts with given rows `(N, count)` of the pool."""
    row = np.repeat(np.arange(len(index)), search.count)
    return scores_at(search, search.contexts, row, index.ravel()).reshape(index.shape)


def scores_at(
    search: Search, contexts: NDArray[np.float32], row: NDArray[np.int64], index: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Exact cosines `(K,)` of contexts[row] with the rows `index` of the pool, of which only blocks that hold
    some of them are read.
    """
    cosine = np.empty(len(index))
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    for start in range(0, search.size, search.blocks.pool):
        here = slice(*np.searchsorted(ordered, [start, start + search.blocks.pool]))
        if here.start == here.stop:
            continue
        heed()
        block = _read(search, start)
        cosine[order[here]] = scores_of(
            contexts, row[order[here]], block, ordered[here] - start, search.blocks.scored
        )
    return cosine


class Error(NamedTuple):
    """How far a similarity may lie from its cosine: `absolute`, and after that `relative` to its size."""

    absolute: float
    relative: float

    def below(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """A lower bound on similarities of cosines that are at least `values`, and the other way round."""
        return values - (1 + self.relative) * self.absolute - self.relative * np.abs(values)


def rounding(width: int) -> float:
    """Bound on the error of a float32 product of two unit vectors: W u, u = 2^-24, in whatever order it is
    summed; with room for lengths that are not exactly 1, and for the rounding of what it is compared with.
    """
    return 1.01 * (width + 8) * _FLOAT32


def check_lengths(name: str, rows: NDArray[np.float32], start: int = 0) -> None:
    """Raise ContextsError unless the rows `(N, W)` are unit vectors; `start` is the number of the first."""
    squares = np.einsum("ij,ij->i", rows, rows)
    bad = np.flatnonzero(~(np.abs(np.sqrt(squares) - 1) < _TOLERANCE))
    if len(bad):
        raise ContextsError(
            f"row {start + bad[0]} of the {name} has length {np.sqrt(squares[bad[0]]):.4g} "
            f"({len(bad)} such rows up to row {start + len(rows) - 1}): normalise them to length 1"
        )


def nothing_found(search: Search) -> Found:
    """Room for what is found."""
    shape = len(search.contexts), search.count
    return Found(np.empty(shape, np.int64), np.empty(shape))


def chunks(length: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `length`."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _read(search: Search, start: int) -> NDArray[np.float32]:
    """A block of the pool, checked, as torch takes it."""
    stop = min(start + search.blocks.pool, search.size)
    block = np.require(search.pool[start:stop], np.float32, ["C", "W"])
    check_lengths("pool", block, start)
    return block


def similarities_to(
    search: Search,
    contexts: NDArray[np.float32],
    identities: NDArray[np.int64],
    own: float,
    coarse: bool = False,
) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.float32], Error]]:
    """Yield (first row, block of the pool `(B, W)`, similarities `(N, B)` float32, their error), with `own`
    for that of an identity to itself. The similarities are overwritten by the next; `coarse` ones are
    products of bfloat16.
    """
    left = torch.from_numpy(np.require(contexts, np.float32, ["C", "W"]))
    buffer = np.empty(len(contexts) * search.blocks.pool, np.float32)
    if coarse:
        short = np.empty(buffer.size, np.int16)
        short_left, lost_left = _shortened(left)
    for start in range(0, search.size, search.blocks.pool):
        heed()
        block = _read(search, start)
        shape = len(contexts), len(block)
        similarities = buffer[: len(contexts) * len(block)].reshape(shape)
        right, result = torch.from_numpy(block), torch.from_numpy(similarities)
        if coarse:
            product = torch.from_numpy(short[: similarities.size]).view(torch.bfloat16).view(shape)
            short_right, lost_right = _shortened(right)
            torch.mm(short_left, short_right.T, out=product)
            result.copy_(product)
            # With x = x^ + r, y = y^ + s: |x y - x^ y^| <= |r| |y| + |x^| |s|; the sum is taken in float32.
            absolute = 1.01 * (lost_left + lost_right) + rounding(block.shape[1])
            error = Error(absolute, 1.01 * _BFLOAT16)
        else:
            torch.mm(left, right.T, out=result)
            error = Error(rounding(block.shape[1]), 0.0)
        own_column = identities - start
        present = np.flatnonzero((own_column >= 0) & (own_column < len(block)))
        similarities[present, own_column[present]] = own
        yield start, block, similarities, error


def _shortened(rows: Tensor) -> tuple[Tensor, float]:
    """The rows as bfloat16, and the greatest length that one of them lost; a few at a time, which stay in the
    processor's caches.
    """
    short = torch.empty(rows.shape, dtype=torch.bfloat16)
    lost = 0.0
    for some in chunks(len(rows), _CACHED):
        short[some] = rows[some]
        lost = max(lost, float(torch.linalg.vector_norm(rows[some] - short[some], dim=1).max()))
    return short, lost


def _row_maxima(similarities: NDArray[np.float32]) -> NDArray[np.float32]:
    return torch.from_numpy(similarities).amax(1).numpy()


def _at_least(similarities: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """A lower bound `(N,)` on the value at place `count` from the top of each row, -2 where there are fewer.

    That of the maxima of disjoint strips: exact for one, and of many strips nearly so, and far quicker than
    sorting.
    """
    rows, columns = similarities.shape
    if columns < count:
        return np.full(rows, _LOWEST, np.float32)
    number = min(columns, _STRIPS * count) if count > 1 else 1
    strip = columns // number
    strips = torch.from_numpy(similarities)[:, : strip * number].unflatten(1, (number, strip))
    bound = strips.amax(2).numpy()
    bound.partition(number - count, axis=1)
    return np.maximum(bound[:, number - count], np.float32(_LOWEST))


def rounded_down(values: NDArray[Any]) -> NDArray[np.float32]:
    """The next lower float32, so that comparing float32 with it never loses a candidate."""
    return np.nextafter(values.astype(np.float32), np.float32(-np.inf))


def places(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of what is true, row by row; by far quicker than `np.nonzero` in two dimensions."""
    row, column = np.divmod(np.flatnonzero(mask), mask.shape[1])
    return row, column


def scores_of(
    left: NDArray[np.float32],
    row: NDArray[np.int64],
    right: NDArray[np.float32],
    column: NDArray[np.int64],
    at_once: int,
) -> NDArray[np.float64]:
    """Cosines `(K,)` of left[row] with right[column] in float64; each depends on its two vectors only, to the
    last bit.
    """
    scores = np.empty(len(row))
    for part in chunks(len(row), at_once):
        products = left[row[part]].astype(np.float64)
        products *= right[column[part]]
        scores[part] = products.sum(axis=1)
    return scores


def _keep_best(best: Found, rows: NDArray[np.int64], row: NDArray[np.int64], new: Found) -> None:
    """Merge candidates into the best of `rows`; candidate j belongs to rows[row[j]]."""
    count = best.index.shape[1]
    row = np.concatenate([np.repeat(np.arange(len(rows)), count), row])
    cosine = np.concatenate([best.cosine[rows].ravel(), new.cosine])
    index = np.concatenate([best.index[rows].ravel(), new.index])
    order = np.lexsort((index, -cosine, row))
    first = np.searchsorted(row[order], np.arange(len(rows)))
    taken = order[first[:, None] + np.arange(count)]
    best.index[rows], best.cosine[rows] = index[taken], cosine[taken]

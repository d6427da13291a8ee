"""Exact ranks of cosine in a pool that is read in blocks, in two passes.

The first pass counts float32 similarities in bins, which brackets the wanted ones. The second collects what
lies within the brackets, scores it in float64, and counts what lies below.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.negatives.search import (
    Found,
    Search,
    chunks,
    nothing_found,
    places,
    rounded_down,
    rounding,
    scores_of,
    similarities_to,
)

# The interval that the bins divide, from -1.01, holds the cosines of vectors that are of length 1 within the
# tolerance. An identity itself is put above all of them, where it moves no rank of the others.
_REACH, _OWN = 1.01, 1.005


def at_ranks(search: Search, first: NDArray[np.int64]) -> Found:
    """The rows at ranks `first` `(N,)`, first + 1, ... of ascending cosine over the others, the lowest row
    first among equals.
    """
    found = nothing_found(search)
    for rows in chunks(len(search.contexts), search.blocks.rows):
        contexts, identities = search.contexts[rows], search.identities[rows]
        counted = _counted(search, contexts, identities)
        low, high, sizes = _brackets(counted, first[rows], search.count, rounding(contexts.shape[1]))
        del counted
        for part in _packed(sizes, search.blocks.pairs):
            collected = _Collected(low[part], high[part], sizes[part])
            for start, block, similarities, _ in similarities_to(
                search, contexts[part], identities[part], own=np.inf
            ):
                for some in chunks(len(similarities), search.blocks.examined):
                    row, column = collected.inside(similarities, some)
                    scores = scores_of(contexts[part][some], row, block, column, search.blocks.scored)
                    collected.add(some, row, start + column, scores)
            collected.select(first[rows][part], Found(found.index[rows][part], found.cosine[rows][part]))
    return found


def _counted(
    search: Search, contexts: NDArray[np.float32], identities: NDArray[np.int64]
) -> NDArray[np.int32]:
    """How many of the pool each context finds in or below each of equal bins of similarity, `(N, bins)`."""
    bins = search.blocks.bins
    counts = np.zeros((len(contexts), bins), np.int32)
    scale, offset = np.float32(bins / (2 * _REACH)), np.float32(bins / 2)
    for _, _, similarities, _ in similarities_to(search, contexts, identities, own=_OWN):
        for part in chunks(len(similarities), search.blocks.examined):
            bin_ = (similarities[part] * scale + offset).astype(np.int64)
            bin_ += bins * np.arange(len(bin_))[:, None]
            added = np.bincount(bin_.ravel(), minlength=len(bin_) * bins)
            counts[part] += added.reshape(-1, bins)
    return np.cumsum(counts, axis=1, out=counts)


def _brackets(
    counted: NDArray[np.int32], first: NDArray[np.int64], count: int, error: float
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Similarities (low, high) `(N,)` around the ranks first to first + count - 1, and how many at most lie
    between.

    A similarity is within `error` of its cosine, in each pass by another amount perhaps. With the wanted
    cosines between a - error and b + error, a and b edges of bins, whatever is seen below a - 2 error is
    below all of them.
    """
    bins = counted.shape[1]
    width = 2 * _REACH / bins
    ends = [np.count_nonzero(counted <= rank[:, None], axis=1) for rank in (first, first + count - 1)]
    low, high = -_REACH + ends[0] * width - 2 * error, -_REACH + (ends[1] + 1) * width + 2 * error
    reach = math.ceil(4 * error / width)
    below = np.maximum(ends[0] - reach - 1, -1)
    above = np.minimum(ends[1] + reach, bins - 1)
    rows = np.arange(len(counted))
    sizes = counted[rows, above].astype(np.int64) - np.where(below < 0, 0, counted[rows, below])
    return rounded_down(low), -rounded_down(-high), sizes


def _packed(sizes: NDArray[np.int64], capacity: int) -> Iterator[slice]:
    """Runs of rows whose sizes add up to the capacity at most."""
    ends, start = np.cumsum(sizes), 0
    while start < len(sizes):
        before = ends[start] - sizes[start]
        stop = int(np.searchsorted(ends, before + capacity, side="right"))
        yield slice(start, stop)
        start = stop


class _Collected:
    """What a second pass finds between `low` and `high` `(N,)`, in room for `sizes` `(N,)` candidates."""

    def __init__(self, low: NDArray[np.float32], high: NDArray[np.float32], sizes: NDArray[np.int64]) -> None:
        self.low, self.high = low[:, None], high[:, None]
        self.start = np.cumsum(sizes) - sizes
        self.stop = self.start.copy()
        self.below = np.zeros(len(sizes), np.int64)
        self.index = np.empty(sizes.sum(), np.int64)
        self.cosine = np.empty(sizes.sum())

    def inside(
        self, similarities: NDArray[np.float32], rows: slice
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Count what lies below in `rows`; return the places of what lies between."""
        below = similarities[rows] < self.low[rows]
        self.below[rows] += np.count_nonzero(below, axis=1)
        return places((similarities[rows] <= self.high[rows]) > below)

    def add(
        self, rows: slice, row: NDArray[np.int64], index: NDArray[np.int64], cosine: NDArray[np.float64]
    ) -> None:
        """Append candidates, which are sorted by their row within `rows`."""
        stop = self.stop[rows]
        number = np.bincount(row, minlength=len(stop))
        place = np.arange(len(row)) + (stop - np.cumsum(number) + number)[row]
        self.index[place], self.cosine[place] = index, cosine
        stop += number

    def select(self, first: NDArray[np.int64], found: Found) -> None:
        """Write into `found` what stands at the ranks from `first` `(N,)`."""
        count = found.index.shape[1]
        for row, start in enumerate(self.start):
            place = slice(start, self.stop[row])
            # Candidates came in the order of the pool, which a stable sort keeps among equals.
            order = np.argsort(self.cosine[place], kind="stable")
            taken = start + order[first[row] - self.below[row] :][:count]
            found.index[row], found.cosine[row] = self.index[taken], self.cosine[taken]

"""Exact ranks of cosine in a pool that is read in blocks, as a rule by one product with all of it.

A sample of the pool tells between which similarities the wanted ranks probably lie. A pass over the pool
collects what lies there and counts what lies below, which shows whether they do. Of what was collected, the
few rows within rounding of the wanted ranks are read once more and scored in float64. Where the sample
misled, as it may in a pool of many equal vectors, the search is made again with everything collected.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from negfacediff_core.negatives.search import (
    Found,
    Search,
    chunks,
    nothing_found,
    rounding,
    scores_at,
    similarities_to,
)

# The sample is an eighth of the pool, up to a block of it, in so many slices spread over it.
_SHARE, _SLICES = 8, 64
# Standard deviations of a sampled rank that are allowed for, and what an identity itself and rounding move.
_DEVIATIONS, _MOVED = 5.0, 2
# Beyond any cosine of unit vectors, and below the mark of an identity itself.
_BEYOND = np.float32(2)


def at_ranks(search: Search, first: NDArray[np.int64]) -> Found:
    """The rows at ranks `first` `(N,)`, first + 1, ... of ascending cosine over the others, the lowest row
    first among equals.
    """
    found = nothing_found(search)
    for rows in chunks(len(search.contexts), search.blocks.rows):
        low, high, room = _bracketed(search, search.contexts[rows], first[rows])
        numbers = np.arange(rows.start, rows.stop)
        misled = []
        for part in chunks(len(numbers), search.blocks.pairs // room):
            collected = _Collected(low[part], high[part], room)
            misled.append(numbers[part][_search(search, numbers[part], first, collected, found)])
        again = np.concatenate(misled)
        for part in chunks(len(again), search.blocks.pairs // search.size):
            ends = np.full(len(again[part]), _BEYOND)
            _search(search, again[part], first, _Collected(-ends, ends, search.size), found)
    return found


def _bracketed(
    search: Search, contexts: NDArray[np.float32], first: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32], int]:
    """Similarities (low, high) `(N,)` between which the wanted ranks probably lie, and how many rows of the
    pool lie there at most, as probably.

    What stands at rank r of M has in a sample of s a rank of standard deviation sqrt(q (1 - q) s), q = r / M,
    where the rows are drawn independently. Slices are not, where neighbours in the pool are alike: then the
    shares of the slices that lie below differ by more, which is measured. Between two ranks of the sample
    that are d apart lie M / s (d +- sqrt(d)) rows of the pool.
    """
    similarities = _to_slices(search, contexts)
    slices, each = similarities.shape[1:]
    size = slices * each
    shares = np.array([first.min(), first.max() + search.count]) / search.size
    reach = _DEVIATIONS * np.sqrt(shares * (1 - shares).clip(0) * size) + _MOVED
    low, high = np.full((2, len(contexts)), _BEYOND)
    low *= -1
    flat = similarities.reshape(len(contexts), size)
    if 0 < (middle := int(shares.mean() * size)) < size:
        about = np.partition(flat, middle, axis=1)[:, middle]
        apart = (similarities < about[:, None, None]).mean(axis=2).std(axis=1).max()
        reach = np.maximum(reach, _DEVIATIONS * size * apart / math.sqrt(slices) + _MOVED)
    below, above = math.floor(size * shares[0] - reach[0]), math.ceil(size * shares[1] + reach[1])
    if below < 0 and above >= size:
        return low, high, search.size
    if below >= 0:
        flat.partition(below, axis=1)
        low = flat[:, below].copy()
    if above < size:
        flat.partition(above, axis=1)
        high = flat[:, above].copy()
    between = min(above, size) - max(below, 0)
    room = search.size / size * (between + _DEVIATIONS * math.sqrt(between))
    return low, high, min(math.ceil(room), search.size)


def _to_slices(search: Search, contexts: NDArray[np.float32]) -> NDArray[np.float32]:
    """Similarities `(N, slices, rows of each)` to slices of the pool that lie all over it."""
    size = max(1, min(search.size // _SHARE, search.blocks.pool))
    each = max(1, size // _SLICES)
    starts = np.linspace(0, search.size - each, size // each).astype(int)
    sample = np.concatenate([search.pool[start : start + each] for start in starts], dtype=np.float32)
    similarities = torch.mm(torch.from_numpy(contexts), torch.from_numpy(sample).T)
    return similarities.numpy().reshape(len(contexts), len(starts), each)


class _Collected:
    """What a pass finds between `low` and `high` `(N,)`, in room for `room` rows of the pool each."""

    def __init__(self, low: NDArray[np.float32], high: NDArray[np.float32], room: int) -> None:
        self.low, self.high, self.room = low, high, room
        self.below = np.zeros(len(low), np.int64)
        self.number = np.zeros(len(low), np.int64)
        self.index = np.empty((len(low), room), np.int64)
        self.similarity = np.empty((len(low), room), np.float32)

    def add(self, start: int, similarities: NDArray[np.float32]) -> None:
        """Count what lies below and take what lies between, of the pool from `start`; what there is no room
        for is counted alone.
        """
        for row, values in enumerate(similarities):
            below = values < self.low[row]
            self.below[row] += np.count_nonzero(below)
            (column,) = ((values <= self.high[row]) ^ below).nonzero()
            place = slice(self.number[row], self.number[row] + len(column))
            self.number[row] = place.stop
            if place.stop <= self.room:
                self.similarity[row, place] = values[column]
                self.index[row, place] = column
                self.index[row, place] += start

    def narrow(self, row: int, rank: int, count: int, error: float) -> NDArray[np.int64] | None:
        """The rows of the pool that may be at `rank`, ..., rank + count - 1, in ascending order; from here on
        `below` counts what lies below them. None where there was no room, or the wanted ranks lie elsewhere.

        A similarity is within `error` of its cosine, and the one at a rank within `error` of the cosine at
        it: what is more than twice that away is on a known side.
        """
        rank -= self.below[row]
        if self.number[row] > self.room or rank < 0 or rank + count > self.number[row]:
            return None
        similarity = self.similarity[row, : self.number[row]]
        low = np.partition(similarity, rank)[rank] - np.float32(2 * error)
        high = np.partition(similarity, rank + count - 1)[rank + count - 1] + np.float32(2 * error)
        if low < self.low[row] or high > self.high[row]:
            return None
        below = similarity < low
        self.below[row] += np.count_nonzero(below)
        (place,) = ((similarity <= high) ^ below).nonzero()
        return self.index[row, place]


def _search(
    search: Search, rows: NDArray[np.int64], first: NDArray[np.int64], collected: _Collected, found: Found
) -> NDArray[np.int64]:
    """Write what is found for `rows` of the contexts; return the places in `rows` of those that are not."""
    contexts, identities = search.contexts[rows], search.identities[rows]
    for start, _, similarities, _ in similarities_to(search, contexts, identities, own=np.inf):
        collected.add(start, similarities)
    error = rounding(contexts.shape[1])
    narrowed = [
        collected.narrow(place, int(first[row]), search.count, error) for place, row in enumerate(rows)
    ]
    taken = [place for place, index in enumerate(narrowed) if index is not None]
    numbers = [len(index) for index in narrowed if index is not None]
    if taken:
        index = np.concatenate([index for index in narrowed if index is not None])
        cosine = scores_at(search, contexts, np.repeat(taken, numbers), index)
        for place, stop, number in zip(taken, np.cumsum(numbers), numbers, strict=True):
            some = slice(stop - number, stop)
            # What is equal stands in the order of the pool, which a stable sort keeps.
            order = np.argsort(cosine[some], kind="stable")
            wanted = some.start + order[first[rows[place]] - collected.below[place] :][: search.count]
            found.index[rows[place]], found.cosine[rows[place]] = index[wanted], cosine[wanted]
    return np.flatnonzero([index is None for index in narrowed])

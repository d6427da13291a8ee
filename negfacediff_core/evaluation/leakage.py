"""Whether generated faces are those of people in a gallery: exact nearest neighbours, and what is alike.

For every generated image the most similar one of a gallery (the generator's training images) is found, and
called alike where its cosine reaches what two different people of the gallery reach at a stated rate, the FMR
of real impostor pairs (arXiv 2410.24015).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

#: False match rates that thresholds are calibrated at.
RATES = (1e-3, 1e-4, 1e-5)
#: Impostor pairs above a threshold that it must rest on: a rate takes at least PAIRS / rate of them.
PAIRS = 10
#: Gallery images whose impostor pairs with all others are scored; 4,096 against 500,000 are 2e9 pairs.
SAMPLE = 4096
#: Neighbours by products in float32 that are scored again in float64.
SHORTLIST = 4
# Rows that are worked on at a time.
_ROWS = 256
# Below any cosine.
_LOWEST = -2.0


@dataclass(frozen=True)
class Block:
    """A part of a gallery: its unit vectors in an exact index, and their row numbers `(n,)` int64."""

    rows: NDArray[np.int64]
    index: faiss.IndexFlatIP

    @classmethod
    def of(cls, rows: NDArray[np.int64], vectors: NDArray[np.float32]) -> "Block":
        """Index unit vectors `(n, W)`, which are copied."""
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(np.ascontiguousarray(vectors))
        return cls(rows, index)

    @property
    def vectors(self) -> NDArray[np.float32]:
        """The vectors `(n, W)` as they lie in the index."""
        count, width = self.index.ntotal, self.index.d
        return faiss.rev_swig_ptr(self.index.get_xb(), count * width).reshape(count, width)


class Neighbours(NamedTuple):
    """The gallery row most similar to each of N queries, `(N,)` int64 (-1: the gallery is empty), and its
    cosine, float64 (NaN).
    """

    row: NDArray[np.int64]
    cosine: NDArray[np.float64]


class Calibration(NamedTuple):
    """What different people of a gallery look like to a recogniser.

    `pairs` impostor pairs were scored, each once. `thresholds` holds one a rate, the lowest cosine that at
    most this share of them reaches, or None where the pairs are too few for it. `nearest` `(S,)` float64 are
    the cosines of sampled gallery images to the most similar image of somebody else.
    """

    pairs: int
    thresholds: tuple[float | None, ...]
    nearest: NDArray[np.float64]


def nearest(queries: NDArray[np.float32], gallery: Iterable[Block]) -> Neighbours:
    """Find the nearest gallery row of each of `(N, W)` unit queries: exact, one pass over the blocks.

    Products in float32 shortlist SHORTLIST rows of a block, which are scored in float64: the cosine is that
    of the very nearest to within 1e-6, and exact for the row that is named. Of equal cosines on a shortlist
    the lowest row is taken.
    """
    row, cosine = np.full(len(queries), -1), np.full(len(queries), np.nan)
    wide = queries.astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    for block in gallery:
        if not block.index.ntotal:
            continue
        _, found = block.index.search(np.ascontiguousarray(queries), min(SHORTLIST, block.index.ntotal))
        vectors = block.vectors
        for part in _chunks(len(queries)):
            candidates = vectors[found[part]].astype(np.float64)
            lengths = np.linalg.norm(candidates, axis=2)
            cosines = np.einsum("nw,nkw->nk", wide[part], candidates) / lengths
            # the lowest row among equals: ascending rows, first of the greatest
            order = np.argsort(block.rows[found[part]], axis=1)
            best = np.take_along_axis(order, np.take_along_axis(cosines, order, 1).argmax(1)[:, None], 1)
            here = Neighbours(
                np.take_along_axis(block.rows[found[part]], best, 1)[:, 0],
                np.take_along_axis(cosines, best, 1)[:, 0],
            )
            nearer = (row[part] < 0) | (here.cosine > cosine[part])
            nearer |= (here.cosine == cosine[part]) & (here.row < row[part])
            row[part] = np.where(nearer, here.row, row[part])
            cosine[part] = np.where(nearer, here.cosine, cosine[part])
    return Neighbours(row, cosine)


def calibrate(
    gallery: Iterable[Block],
    people: NDArray[np.int64],
    rates: Sequence[float] = RATES,
    sample: int = SAMPLE,
) -> Calibration:
    """Calibrate thresholds on the impostor pairs of a gallery.

    Args:
        gallery: its blocks, which are gone through twice: no iterator.
        people: who is in each gallery row `(M,)`; -1 where there is no face, which is in no block.
        rates: false match rates, each in (0, 1).
        sample: images, evenly spaced, whose pairs with all images of other people are scored, in float32.
    """
    known = np.flatnonzero(people >= 0)
    chosen = known[sampled(len(known), sample)]
    pairs = impostor_pairs(people[known], people[chosen])
    is_chosen = np.zeros(len(people), bool)
    is_chosen[chosen] = True
    highest = _Highest(math.floor(max(rates) * pairs) + 1)
    closest = np.full(len(chosen), _LOWEST)
    vectors = _gather(gallery, chosen)
    for block in gallery:
        others = block.vectors
        for part in _chunks(len(chosen)):
            cosines = vectors[part] @ others.T
            stranger = people[chosen[part], None] != people[block.rows]
            cosines[~stranger] = _LOWEST
            closest[part] = np.maximum(closest[part], cosines.max(axis=1, initial=_LOWEST))
            # of two sampled images the pair is counted once
            again = is_chosen[block.rows] & (block.rows < chosen[part, None])
            highest.add(cosines[(cosines >= highest.floor) & stranger & ~again])
    closest = np.where(closest > _LOWEST, closest, np.nan)
    scores = highest.descending()
    return Calibration(pairs, tuple(_threshold(scores, pairs, rate) for rate in rates), closest)


def sampled(count: int, sample: int = SAMPLE) -> NDArray[np.int64]:
    """Which of `count` images are sampled: all, or `sample` that are evenly spaced."""
    taken = min(count, sample)
    return np.arange(taken) * count // max(1, taken)


def impostor_pairs(people: NDArray[np.int64], chosen: NDArray[np.int64]) -> int:
    """Count the pairs of a sampled image and any other of somebody else, each once.

    `people` `(M,)` are those of all images, `chosen` `(S,)` those of the sampled ones among them.
    """
    if not len(chosen):
        return 0
    everybody = np.bincount(people)
    some = np.bincount(chosen, minlength=len(everybody))
    ordered = len(chosen) * len(people) - int((some * everybody).sum())
    twice = (len(chosen) ** 2 - int((some**2).sum())) // 2
    return ordered - twice


def needed_pairs(rate: float) -> int:
    """How many impostor pairs a threshold at this false match rate takes."""
    return math.ceil(PAIRS / rate - 1e-6)


def too_few_pairs(pairs: int, rate: float) -> str:
    """Say that a gallery's pairs do not carry a threshold at this rate."""
    return (
        f"the gallery has {pairs:,} impostor pairs, too few for a threshold at FMR {rate:g}, which takes "
        f"{needed_pairs(rate):,}: give a larger gallery, or a higher rate with --fmr"
    )


def alike(cosine: NDArray[np.float64], threshold: float) -> NDArray[np.bool_]:
    """Which cosines, of any shape, reach a threshold; NaN reaches none."""
    return cosine >= threshold


def search_bytes(queries: int, gallery: int, width: int) -> int:
    """Bytes that a search holds: the gallery's vectors, and of every query the vector in float32 and in
    float64, the shortlist and the result.
    """
    shortlists = min(queries, _ROWS) * SHORTLIST * width * (4 + 8)
    return gallery * (width * 4 + 8) + queries * (width * (4 + 8) + SHORTLIST * 12 + 16) + shortlists


def search_operations(queries: int, gallery: int, width: int) -> int:
    """Floating-point operations of an exact search: a multiplication and an addition an element."""
    return 2 * queries * gallery * width


class _Highest:
    """The `count` highest of all scores that are added, in bounded memory."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.floor = _LOWEST
        self._parts: list[NDArray[np.float32]] = []
        self._held = 0

    def add(self, scores: NDArray[np.float32]) -> None:
        """Add scores; those below `floor` may be left out."""
        self._parts.append(scores)
        self._held += len(scores)
        if self._held > 2 * self.count + 2**20:
            self._shrink()

    def descending(self) -> NDArray[np.float32]:
        """The highest scores, best first."""
        self._shrink()
        return np.sort(self._parts[0])[::-1]

    def _shrink(self) -> None:
        held = np.concatenate([np.empty(0, np.float32), *self._parts])
        if len(held) > self.count:
            held = np.partition(held, len(held) - self.count)[-self.count :]
            self.floor = float(held.min())
        self._parts, self._held = [held], len(held)


def _threshold(scores: NDArray[np.float32], pairs: int, rate: float) -> float | None:
    """The lowest threshold that at most `rate` of the pairs reach: just above the next score."""
    if pairs < needed_pairs(rate):
        return None
    allowed = math.floor(rate * pairs + 1e-6)
    return float(np.nextafter(np.float64(scores[allowed]), np.inf))


def _gather(gallery: Iterable[Block], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """The vectors of ascending gallery rows `(S,)`, all of which are in a block."""
    parts = [block.vectors[np.isin(block.rows, rows)] for block in gallery]
    return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)


def _chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, _ROWS):
        yield slice(start, start + _ROWS)

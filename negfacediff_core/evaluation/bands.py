"""All scores of a large set, counted band by band: no score is ever kept, and no two bands need to meet.

Identities are cut into bands. One band is compared with itself and with the half of the others that follow
it, so that each unordered pair is counted once and every band is the same work. It is done in parts, a few
bands each. What a part leaves are counts and sums from which those of the whole set follow by addition,
whoever counted what, and in which order.

0.5M embeddings make 1.25e11 pairs. One pass multiplies matrices, one places scores in bins and one counts.
Moments cost nothing a pair: with u the unit embeddings, S their sum and G the sum of u u',

    sum of all scores = (|S|^2 - N) / 2,        sum of their squares = (|G|^2 - N) / 2     (Frobenius norm)

over unordered pairs of N images, of which the genuine ones, some hundreds an identity, are summed apart.
"""

from collections.abc import Callable, Iterable
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from negfacediff_core.evaluation.distributions import Comparisons, Distribution, unit_vectors
from negfacediff_core.stopping import heed

#: Bins over [-1, 1]. At a density of scores of 10 per unit of cosine, above what recognisers give, the EER is
#: within 2 / BINS x 10 / 2 = 1e-5 of that of the single scores; `metrics.eer_bound` says how near it is.
BINS = 2**20
#: Images of a band: long products, and memory that two workers have.
BAND_IMAGES = 16_384
#: Bands that a part compares one with: 5e8 pairs, 12 s on one core, after which progress shows and a kill
#: loses no more. Smaller ones would read more than they compute.
PARTNERS = 2
#: Rows of a tile; it has four times as many columns, 16 MiB of scores.
TILE_ROWS = 1024
_COLUMNS_A_ROW = 4
# Scores that a bin of 32 bits can hold.
_MOST_COUNTED = 2**31 - 1


class Images(NamedTuple):
    """Valid images in ascending order of identity: `embeddings` `(N, D)` float32, `identity` `(N,)` int64."""

    embeddings: NDArray[np.float32]
    identity: NDArray[np.int64]


class BandScores(NamedTuple):
    """What a band, or a part of its comparisons, adds to the scores of a set.

    `genuine` and `impostor` `(BINS,)` int64 count the scores that the band is compared in, `genuine_sums`
    `(2,)` float64 is the sum of the genuine ones and of their squares. Of the band's own unit embeddings,
    `images` is the number, `total` `(D,)` the sum and `gram` `(D, D)` the sum of outer products, in float64.
    All but `impostor` are 0 in a part that does not compare the band with itself.
    """

    genuine: NDArray[np.int64]
    impostor: NDArray[np.int64]
    genuine_sums: NDArray[np.float64]
    images: int
    total: NDArray[np.float64]
    gram: NDArray[np.float64]


def band_identities(images: int, block: int) -> int:
    """Identities of a band where each has `images`: whole blocks, up to BAND_IMAGES images or one block."""
    return max(1, BAND_IMAGES // (images * block)) * block


def band_bytes(images: int, width: int) -> int:
    """Most bytes that scoring a band of that many images takes at a time, whatever the size of the set."""
    columns = _COLUMNS_A_ROW * TILE_ROWS
    vectors = 2 * 4 * width * (images + 2 * columns)  # as read, and of unit length
    tile = TILE_ROWS * columns * (4 + 8)
    return vectors + 16 * width * TILE_ROWS + tile + 5 * 8 * BINS + 2 * 8 * width**2


def parts_of(bands: int) -> int:
    """Parts of each band's comparisons where there are so many bands."""
    return -(-(bands // 2 + 1) // PARTNERS)


def partners(band: int, bands: int) -> list[int]:
    """The bands that one of `bands` is compared with: itself first, then the half that follows it in a ring.

    Of two opposite bands, which an even number has, the lower one compares.
    """
    half = bands // 2
    last = half if bands % 2 or band < half else half - 1
    return [(band + step) % bands for step in range(last + 1)]


def score_band(
    own: Images,
    others: Iterable[Images],
    *,
    inside: bool = True,
    device: str = "cpu",
    rows: int = TILE_ROWS,
    progress: Callable[[int], None] | None = None,
) -> BandScores:
    """Compare the images of a band with each other, where `inside`, and with `others`, and count the scores.

    `others` are pieces of any size, none of an identity of this band, read one at a time. Tiles of `rows` x
    4 `rows` float32 scores are computed on `device`; another size may move a score by one rounding.
    `progress(images)` is called with the number of images that the band has been compared with.
    """
    width = own.embeddings.shape[1]
    left = np.empty(own.embeddings.shape, np.float32)
    total, gram = np.zeros(width), np.zeros((width, width))
    for start in range(0, len(left), rows):
        unit = unit_vectors(own.embeddings[start : start + rows], start)
        left[start : start + rows] = unit
        if inside:
            total += unit.sum(axis=0)
            gram += unit.T @ unit
    counter = _Counter(torch.device(device), rows)
    columns = _COLUMNS_A_ROW * rows
    band = torch.from_numpy(left).to(device)
    genuine, sums = np.zeros(BINS, np.int64), np.zeros(2)
    if inside:
        genuine, sums = _genuine(own)
        for start in range(0, len(left), columns):
            heed()
            stop = min(start + columns, len(left))
            for top in range(0, stop, rows):
                counter.add_inside(band, own.identity, slice(top, min(top + rows, stop)), slice(start, stop))
            if progress is not None:
                progress(stop - start)
    for piece in others:
        for start in range(0, len(piece.embeddings), columns):
            heed()
            unit = unit_vectors(piece.embeddings[start : start + columns], start)
            right = torch.from_numpy(unit.astype(np.float32)).to(device)
            for top in range(0, len(left), rows):
                counter.add(band[top : top + rows], right)
            if progress is not None:
                progress(len(right))
    return BandScores(genuine, counter.counts(), sums, len(left) if inside else 0, total, gram)


def add_up(bands: Iterable[BandScores]) -> Comparisons:
    """The scores of the whole set from those of all its bands or their parts, at least one, in their order.

    Levels are the lower edges of the filled bins; the moments are those of the scores in float64. One band is
    held at a time.
    """
    sums = reduce(_sum, bands)
    every = (np.array([np.square(sums.total).sum(), np.square(sums.gram).sum()]) - sums.images) / 2
    return Comparisons(
        _distribution(sums.genuine, sums.genuine_sums),
        _distribution(sums.impostor, every - sums.genuine_sums),
    )


def _sum(one: BandScores, other: BandScores) -> BandScores:
    return BandScores(
        genuine=one.genuine + other.genuine,
        impostor=one.impostor + other.impostor,
        genuine_sums=one.genuine_sums + other.genuine_sums,
        images=one.images + other.images,
        total=one.total + other.total,
        gram=one.gram + other.gram,
    )


def bins_of(scores: NDArray[np.floating]) -> NDArray[np.int64]:
    """The bin of each score, floor((score + 1) BINS / 2); the last one for 1 and what rounding puts above."""
    return np.clip((scores + 1) * (BINS / 2), 0, BINS - 1).astype(np.int64)


def levels_of(bins: NDArray[np.int64]) -> NDArray[np.float64]:
    """The lower edge of each bin."""
    return bins.astype(np.float64) * (2 / BINS) - 1


def genuine_scores(unit: NDArray[np.float64], rows: int = TILE_ROWS) -> Iterable[NDArray[np.float64]]:
    """Yield the scores of all pairs of one identity's unit embeddings `(R, D)`, some rows at a time."""
    for start in range(0, len(unit), rows):
        scores = unit[start : start + rows] @ unit[start:].T
        yield scores[np.triu_indices(len(scores), k=1, m=scores.shape[1])]


def _genuine(own: Images) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Counts `(BINS,)` of the genuine scores, and their sum and sum of squares; each in float64."""
    counts, sums = np.zeros(BINS, np.int64), np.zeros(2)
    edges = np.flatnonzero(np.diff(own.identity)) + 1
    for first, last in zip([0, *edges], [*edges, len(own.identity)], strict=True):
        for scores in genuine_scores(unit_vectors(own.embeddings[first:last], int(first))):
            np.add.at(counts, bins_of(scores), 1)
            sums += scores.sum(), np.square(scores).sum()
    return counts, sums


def _distribution(counts: NDArray[np.int64], sums: NDArray[np.float64]) -> Distribution:
    filled, size = np.flatnonzero(counts), int(counts.sum())
    if not size:
        return Distribution(levels_of(filled), counts[filled], np.nan, np.nan, 2 / BINS)
    mean, square = sums / size
    deviation = np.sqrt(max(0.0, square - mean**2))
    return Distribution(levels_of(filled), counts[filled], float(mean), float(deviation), 2 / BINS)


class _Counter:
    """Counts of impostor scores on a device, and the tile that products are written to."""

    def __init__(self, device: torch.device, rows: int) -> None:
        # one bin more than there are: for scores of 1 and what rounding puts above
        self._total = torch.zeros(BINS + 1, dtype=torch.int64, device=device)
        # Counting in 32 bits takes two thirds of the time; what is counted moves on before it could overflow.
        self._counts = torch.zeros(BINS + 1, dtype=torch.int32, device=device)
        self._room = _MOST_COUNTED
        self._scores = torch.empty(_COLUMNS_A_ROW * rows * rows, device=device)
        self._bins = torch.empty(_COLUMNS_A_ROW * rows * rows, dtype=torch.int64, device=device)
        self._one = torch.ones(1, dtype=torch.int32, device=device)

    def add(self, left: torch.Tensor, right: torch.Tensor, wanted: torch.Tensor | None = None) -> None:
        """Count the scores of unit rows `(M, D)` and `(N, D)`; of all, or of the `wanted` `(M, N)`."""
        shape = len(left), len(right)
        scores = self._scores[: shape[0] * shape[1]].view(shape)
        bins = self._bins[: shape[0] * shape[1]].view(shape)
        torch.mm(left, right.T, out=scores)
        # as `bins_of`: casting cuts towards 0, which is down, and puts what rounding left below -1 in bin 0
        bins.copy_(scores.add_(1).mul_(BINS / 2))
        counted = bins.view(-1) if wanted is None else bins[wanted]
        if len(counted) > self._room:
            self._move_on()
        self._room -= len(counted)
        self._counts.scatter_add_(0, counted, self._one.expand(len(counted)))

    def add_inside(
        self, band: torch.Tensor, identity: NDArray[np.int64], rows: slice, columns: slice
    ) -> None:
        """Count the scores of a tile of one band with itself whose row is of a lower identity."""
        if identity[rows][-1] < identity[columns][0]:
            self.add(band[rows], band[columns])
        elif identity[rows][0] < identity[columns][-1]:
            across = identity[rows][:, None] < identity[columns]
            self.add(band[rows], band[columns], torch.from_numpy(across).to(band.device))

    def counts(self) -> NDArray[np.int64]:
        """The counts `(BINS,)`."""
        self._move_on()
        counts = self._total.cpu().numpy()
        counts[BINS - 1] += counts[BINS]
        return counts[:BINS]

    def _move_on(self) -> None:
        self._total += self._counts
        self._counts.zero_()
        self._room = _MOST_COUNTED

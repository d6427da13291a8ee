"""How sure figures are: the bootstrap over identities, for sets of any size.

Identities are resampled with replacement, not pairs, because the pairs of one identity move together. Two
copies of one identity are not compared with each other. Sets of up to MOST_IDENTITIES identities are
resampled whole. Of larger ones a few disjoint random subsets of b identities are, each b of them drawn as
often as the whole set has identities: the bag of little bootstraps (Kleiner, Talwalkar, Sarkar and Jordan,
arXiv 1112.5016), whose subsets say how far a figure of the *whole* set scatters, and are averaged.

The published protocol compares no more than its first identities, which are resampled whole: a pair that it
compares counts as often as both its identities are drawn, and one that it leaves out never.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.evaluation.bands import (
    BINS,
    BandScores,
    Images,
    add_up,
    bins_of,
    genuine_scores,
    levels_of,
    score_band,
)
from negfacediff_core.evaluation.distributions import Comparisons, unit_vectors
from negfacediff_core.evaluation.metrics import (
    ErrorRates,
    equal_error_rate,
    error_rates,
    fisher_discriminant_ratio,
    point_at_most,
)
from negfacediff_core.evaluation.scores import PAPER_IDENTITIES, select
from negfacediff_core.stopping import heed

Valid = NDArray[np.bool_]
Floats = NDArray[np.float64]

#: The figures that get an interval, in the order of the columns of `Resampled`.
FIGURES = ("fdr", "eer", "fmr100", "fmr1000")
#: Identities and images of a subset, and how many subsets: seconds each, and 1.3e8 scores at most.
MOST_IDENTITIES, MOST_IMAGES, SUBSETS = 320, 16_384, 4
#: Thresholds at which resamples are counted. Where scores have more levels than this, thresholds lie evenly
#: where FMR 1e-4 to 1/2 and the EER are, which moves a rate by some 1e-4.
LEVELS = 2048
#: The share of the resamples that lies in an interval.
CONFIDENCE = 0.95


class Resampled(NamedTuple):
    """The FIGURES of S subsets, `estimate` `(S, 4)`, and of the draws of each, `draws` `(S, B, 4)`.

    A draw without genuine or without impostor pairs is NaN. Subsets and draws are the same for every dataset
    of as many identities and images, and the same seed: the difference of two datasets' results is the paired
    bootstrap of the difference.
    """

    estimate: Floats
    draws: Floats

    def less(self, other: "Resampled") -> "Resampled":
        """The same of the differences of two datasets' figures, this one's less the other's."""
        return Resampled(self.estimate - other.estimate, self.draws - other.draws)

    def interval(self, figures: Floats, confidence: float = CONFIDENCE) -> Floats:
        """Return low and high `(4, 2)` about `figures` `(4,)` of the whole set; NaN where no draw has one.

        They are as far from the figure as the quantiles of a subset's draws are from that of the subset, in
        the mean over subsets; for a set that was resampled whole, the quantiles themselves.
        """
        outside = (1 - confidence) / 2
        limits = np.full((len(figures), 2), np.nan)
        for number, figure in enumerate(figures):
            offsets = [
                np.quantile(drawn[np.isfinite(drawn)], [outside, 1 - outside]) - own
                for drawn, own in zip(self.draws[:, :, number], self.estimate[:, number], strict=True)
                if np.isfinite(own) and np.isfinite(drawn).any()
            ]
            if offsets:
                limits[number] = figure + np.mean(offsets, axis=0)
        return limits


def subsets_of(identities: int, images: int, seed: int) -> list[NDArray[np.int64]]:
    """The identities of each subset of a set of `identities` with `images` each, ascending."""
    size = min(identities, MOST_IDENTITIES, max(2, MOST_IMAGES // images))
    if size == identities:
        return [np.arange(identities)]
    order = np.random.Generator(np.random.Philox(seed)).permutation(identities)
    count = min(SUBSETS, identities // size)
    return [np.sort(order[start * size : (start + 1) * size]) for start in range(count)]


def draw_weights(identities: int, subset: int, draws: int, seed: int) -> Floats:
    """How often each identity of a subset is among the `identities` of a draw: `(draws, subset)`."""
    generator = np.random.Generator(np.random.Philox(seed))
    return generator.multinomial(identities, np.full(subset, 1 / subset), size=draws).astype(np.float64)


def bootstrap(
    read: Callable[[NDArray[np.int64]], tuple[NDArray[np.float32], Valid]],
    extent: tuple[int, int],
    draws: int,
    seed: int,
    protocol: str = "full",
) -> Resampled:
    """Resample the FIGURES of a protocol `draws` times.

    Args:
        read: returns embeddings `(b, R, D)` and which are valid `(b, R)` of given identities.
        extent: identities, and images of each.
        draws: resamples of each subset, B.
        seed: of subsets and draws.
    """
    identities = min(extent[0], PAPER_IDENTITIES) if protocol == "paper" else extent[0]
    subsets = [np.arange(identities)] if protocol == "paper" else subsets_of(*extent, seed)
    estimates, results = np.full((len(subsets), 4), np.nan), np.full((len(subsets), draws, 4), np.nan)
    for number, subset in enumerate(subsets):
        embeddings, valid = read(subset)
        # another stream than that of the subsets, and another for each
        weights = draw_weights(identities, len(subset), draws, seed + number + 1)
        every = np.concatenate([np.ones((1, len(subset))), weights])
        chosen, impostors = select(valid, protocol, seed)
        figures = _weighted_figures(Images(embeddings[chosen], np.nonzero(chosen)[0]), every, impostors)
        estimates[number], results[number] = figures[0], figures[1:]
    return Resampled(estimates, results)


def _weighted_figures(images: Images, weights: Floats, impostors: Valid | None) -> Floats:
    """The FIGURES `(W, 4)` where each pair counts as often as the product of its identities' weights
    `(W, b)`; a genuine pair as often as its identity. `impostors` as in `scores.Selection`.
    """
    scores = score_band(images, ())
    if not (scores.genuine.any() and scores.impostor.any()):
        return np.full((len(weights), len(FIGURES)), np.nan)
    cells, levels = _cells(scores)
    counts, sums = _weighted_counts(images, weights, impostors, cells, len(levels))
    return np.array([_figures(levels, counts[:, row], sums[:, row]) for row in range(len(weights))])


def _cells(scores: BandScores) -> tuple[NDArray[np.int64], Floats]:
    """Join bins to at most LEVELS cells: the cell of each bin `(BINS,)`, and the lower edges of cells."""
    filled = np.flatnonzero(scores.genuine + scores.impostor)
    if len(filled) > LEVELS:
        low, high = _region(add_up([scores]))
        even = np.unique(np.linspace(low, high, LEVELS - 1).astype(np.int64))
        filled = np.union1d(filled[:1], even)
    # no score lies below the first cell
    return np.maximum(np.searchsorted(filled, np.arange(BINS), side="right") - 1, 0), levels_of(filled)


def _region(kinds: Comparisons) -> tuple[np.int64, np.int64]:
    """The bins between which all thresholds of the FIGURES lie: those of both medians and of FMR 1e-4."""
    medians = [kind.levels[np.searchsorted(kind.counts.cumsum(), kind.size / 2)] for kind in kinds]
    strict = min(1.0, point_at_most(error_rates(*kinds), 1e-4).threshold)
    low, high = bins_of(np.array([min(medians), max(*medians, strict)]))
    return low, high


def _weighted_counts(
    images: Images, weights: Floats, impostors: Valid | None, cells: NDArray[np.int64], count: int
) -> tuple[Floats, Floats]:
    """Of genuine and of impostor scores, the weighted counts by cell `(2, W, count)`, and the weighted
    number, sum and sum of squares `(2, W, 3)`.
    """
    vectors, identity = unit_vectors(images.embeddings), images.identity
    starts = np.flatnonzero(np.diff(identity, prepend=-1))
    sizes, present = np.diff([*starts, len(identity)]), identity[starts]
    weights = weights[:, present]
    counts, sums = np.zeros((2, len(weights), count)), np.zeros((2, len(weights), 3))
    for place, start in enumerate(starts):
        heed()
        stop, once = start + sizes[place], weights[:, place, None]
        for scores in genuine_scores(vectors[start:stop]):
            counts[0] += once * np.bincount(cells[bins_of(scores)], minlength=count)
            sums[0] += once * [len(scores), scores.sum(), np.square(scores).sum()]
        compared, others = np.arange(place + 1, len(starts)), vectors[stop:]
        if impostors is not None:
            wanted = impostors[present[place], present[compared]]
            others = others[np.repeat(wanted, sizes[compared])]
            compared = compared[wanted]
        if not len(compared):
            continue
        scores, pairs = vectors[start:stop] @ others.T, once * weights[:, compared]
        # one row of cells for each later identity
        later = np.repeat(np.arange(len(compared)), sizes[compared])
        table = np.bincount((cells[bins_of(scores)] + later * count).ravel(), minlength=len(compared) * count)
        counts[1] += pairs @ table.reshape(-1, count).astype(np.float64)
        columns = np.stack([np.ones_like(scores), scores, np.square(scores)]).sum(axis=1)
        firsts = np.cumsum(sizes[compared]) - sizes[compared]
        sums[1] += pairs @ np.add.reduceat(columns, firsts, axis=1).T
    return counts, sums


def _figures(levels: Floats, counts: Floats, sums: Floats) -> list[float]:
    """The FIGURES of weighted counts `(2, K)` and number, sum, sum of squares `(2, 3)` of both kinds."""
    number, total, squares = sums.T
    if not number.all():
        return [np.nan] * len(FIGURES)
    mean = total / number
    deviation = np.sqrt(np.maximum(0.0, squares / number - mean**2))
    # weighted counts are whole numbers, and their sums exact
    rejected = np.concatenate([np.zeros((2, 1)), counts.cumsum(axis=1)], axis=1)
    every = rejected[:, -1:]
    rates = ErrorRates(np.append(levels, np.inf), ((every - rejected) / every)[1], (rejected / every)[0])
    return [
        fisher_discriminant_ratio(mean[0], deviation[0], mean[1], deviation[1]),
        equal_error_rate(rates)[0],
        point_at_most(rates, 0.01).fnmr,
        point_at_most(rates, 0.001).fnmr,
    ]

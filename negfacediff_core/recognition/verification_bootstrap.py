"""How sure the figures of a verification set are: the bootstrap over its pairs.

Pairs are drawn with replacement within each fold, whose sizes stay. The draws are those of the set and the
seed, so that two recognisers are compared on the same ones (a paired bootstrap). Pairs that share a person
are not independent, which the bootstrap does not see: its intervals are rather too narrow than too wide.
"""

import copy
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.evaluation.metrics import ErrorRates, equal_error_rate, point_at_most
from negfacediff_core.recognition.fold_accuracy import resampled_accuracies

#: The figures that are resampled, in the order of the columns: the TAR is that at a FAR of at most 1e-3.
FIGURES = ("accuracy", "eer", "tar_1e-3")
CONFIDENCE = 0.95


def draw_weights(folds: NDArray[np.int64], draws: int, seed: int = 0) -> Iterator[NDArray[np.float64]]:
    """Yield how often each pair is drawn `(P,)`, draw by draw: from each fold as many pairs as it has.

    One generator makes the draws fold by fold. It is run ahead once to note where each fold begins, so that
    one row is held at a time: all rows of a million pairs would be gigabytes.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    parts = [np.flatnonzero(folds == fold) for fold in np.unique(folds)]
    shares = [np.full(len(inside), 1 / len(inside)) for inside in parts]
    generators = [copy.deepcopy(generator)]
    for share in shares[:-1]:
        for _ in range(draws):
            generator.multinomial(len(share), share)
        generators.append(copy.deepcopy(generator))
    for _ in range(draws):
        weights = np.empty(len(folds))
        for inside, share, one in zip(parts, shares, generators, strict=True):
            weights[inside] = one.multinomial(len(share), share)
        yield weights


def resample(
    cosines: NDArray[np.float64],
    distances: NDArray[np.float64],
    same: NDArray[np.bool_],
    folds: NDArray[np.int64],
    weights: Iterable[NDArray[np.float64]],
) -> NDArray[np.float64]:
    """Return the FIGURES of each draw `(B, 3)`; NaN in a draw without genuine or without impostor pairs."""
    order = np.argsort(cosines, kind="stable")
    levels, counts = np.unique(cosines, return_counts=True)
    starts = np.concatenate([[0], counts.cumsum()])
    genuine = same[order]
    figures = []
    rows, again = itertools.tee(weights)  # taken in step: one row is held
    for row, accuracy in zip(rows, resampled_accuracies(distances, same, folds, again), strict=True):
        drawn = row[order]
        # how much of each kind lies below every level, and below +inf
        below = [np.concatenate([[0], np.cumsum(drawn * kind)])[starts] for kind in (genuine, ~genuine)]
        missed, rejected = below
        eer = tar = np.nan
        if missed[-1] and rejected[-1]:
            fmr = (rejected[-1] - rejected) / rejected[-1]
            rates = ErrorRates(np.append(levels, np.inf), fmr, missed / missed[-1])
            eer, tar = equal_error_rate(rates)[0], 1 - point_at_most(rates, 1e-3).fnmr
        figures.append((accuracy, eer, tar))
    return np.array(figures)


def interval(figures: NDArray[np.float64]) -> list[tuple[float, float]]:
    """Return low and high of each column of `(B, F)` draws, between which CONFIDENCE of them lie."""
    outside = (1 - CONFIDENCE) / 2
    limits = np.nanquantile(figures, [outside, 1 - outside], axis=0)
    return [(float(low), float(high)) for low, high in limits.T]

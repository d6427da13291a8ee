"""How sure the figures of a verification set are: the bootstrap over its pairs.

Pairs are drawn with replacement within each fold, whose sizes stay. The draws are those of the set and the
seed, so that two recognisers are compared on the same ones (a paired bootstrap). Pairs that share a person
are not independent, which the bootstrap does not see: its intervals are rather too narrow than too wide.
"""

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.evaluation.metrics import ErrorRates, equal_error_rate, point_at_most
from negfacediff_core.recognition.fold_accuracy import resampled_accuracies

#: The figures that are resampled, in the order of the columns: the TAR is that at a FAR of at most 1e-3.
FIGURES = ("accuracy", "eer", "tar_1e-3")
CONFIDENCE = 0.95


def draw_weights(folds: NDArray[np.int64], draws: int, seed: int = 0) -> NDArray[np.float64]:
    """Return how often each pair is drawn `(draws, P)`: from each fold as many pairs as it has."""
    generator = np.random.Generator(np.random.Philox(seed))
    weights = np.empty((draws, len(folds)))
    for fold in np.unique(folds):
        inside = np.flatnonzero(folds == fold)
        weights[:, inside] = generator.multinomial(len(inside), np.full(len(inside), 1 / len(inside)), draws)
    return weights


def resample(
    cosines: NDArray[np.float64],
    distances: NDArray[np.float64],
    same: NDArray[np.bool_],
    folds: NDArray[np.int64],
    weights: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the FIGURES of each draw `(B, 3)`; NaN in a draw without genuine or without impostor pairs."""
    order = np.argsort(cosines, kind="stable")
    levels, counts = np.unique(cosines, return_counts=True)
    starts = np.concatenate([[0], counts.cumsum()])
    genuine = same[order]
    figures = np.full((len(weights), len(FIGURES)), np.nan)
    figures[:, 0] = resampled_accuracies(distances, same, folds, weights)
    for number, row in enumerate(weights):
        drawn = row[order]
        # how much of each kind lies below every level, and below +inf
        below = [np.concatenate([[0], np.cumsum(drawn * kind)])[starts] for kind in (genuine, ~genuine)]
        missed, rejected = below
        if missed[-1] and rejected[-1]:
            fmr = (rejected[-1] - rejected) / rejected[-1]
            rates = ErrorRates(np.append(levels, np.inf), fmr, missed / missed[-1])
            figures[number, 1:] = equal_error_rate(rates)[0], 1 - point_at_most(rates, 1e-3).fnmr
    return figures


def interval(figures: NDArray[np.float64]) -> list[tuple[float, float]]:
    """Return low and high of each column of `(B, F)` draws, between which CONFIDENCE of them lie."""
    outside = (1 - CONFIDENCE) / 2
    limits = np.nanquantile(figures, [outside, 1 - outside], axis=0)
    return [(float(low), float(high)) for low, high in limits.T]

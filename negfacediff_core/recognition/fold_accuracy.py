"""Verification accuracy as the field reports it: a threshold from nine folds of pairs, applied to the tenth.

A pair is accepted where the squared distance of its two unit embeddings, in [0, 4], is below the threshold.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FOLDS = 10
#: Among these the field looks for the best. An exact search, between every two distances, moves the
#: accuracy by a few pairs in thousands, either way.
THRESHOLDS: NDArray[np.float64] = np.arange(0, 4, 0.01)


class FoldAccuracy(NamedTuple):
    """Of each fold, the share of its pairs that are judged rightly, and the threshold of the others."""

    accuracies: NDArray[np.float64]
    thresholds: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """The reported accuracy, in [0, 1]: every fold counts the same."""
        return float(self.accuracies.mean())

    @property
    def std(self) -> float:
        """Deviation of the folds' accuracies (population, as the field has it)."""
        return float(self.accuracies.std())


def contiguous_folds(pairs: int) -> NDArray[np.int64]:
    """Number the fold of each pair `(pairs,)`: ten stretches of the list, the first ones longer by one if
    need be.

    So scikit-learn's KFold divides without shuffling, which is what the field takes for its `.bin` sets.
    """
    return np.arange(FOLDS).repeat([len(part) for part in np.array_split(np.empty(pairs), FOLDS)])


def even_folds(same: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Number the fold of each pair `(P,)` so that all folds have as many genuine and as many impostor pairs.

    Each kind is divided in ten stretches. A list that stands in such folds already, as those of LFW do, is
    divided as `contiguous_folds` divides it.
    """
    folds = np.empty(len(same), np.int64)
    for kind in (same, ~same):
        folds[kind] = contiguous_folds(int(kind.sum()))
    return folds


def best_threshold(distances: NDArray[np.float64], same: NDArray[np.bool_]) -> float:
    """Return the threshold that judges most of the pairs `(P,)` rightly, the lowest of several."""
    accepted_from = np.searchsorted(THRESHOLDS, distances, side="right")
    gains = np.bincount(accepted_from, np.where(same, 1, -1), len(THRESHOLDS) + 1)[:-1]
    return float(THRESHOLDS[gains.cumsum().argmax()])


def fold_accuracy(
    distances: NDArray[np.float64],
    same: NDArray[np.bool_],
    folds: NDArray[np.int64],
    thresholds: NDArray[np.float64] = THRESHOLDS,
) -> FoldAccuracy:
    """Return the accuracy of each of the FOLDS.

    Args:
        distances: squared distances `(P,)` of unit embeddings.
        same: whether a pair is genuine `(P,)`.
        folds: the fold of each pair `(P,)`; none may be empty.
        thresholds: ascending candidates `(K,)`. Of those that judge most pairs of the other folds rightly the
            lowest is taken.
    """
    cells = _cells(distances, folds, thresholds)
    accuracies, best = _accuracies(cells, same, np.ones(len(same)), len(thresholds))
    return FoldAccuracy(accuracies, thresholds[best])


def resampled_accuracies(
    distances: NDArray[np.float64],
    same: NDArray[np.bool_],
    folds: NDArray[np.int64],
    weights: Iterable[NDArray[np.floating]],
) -> Iterator[float]:
    """Yield the mean accuracy of each draw of weights `(P,)`, where pair p counts `weights[p]` times.

    The thresholds are found anew in each draw. In a draw every fold must have some pair.
    """
    cells = _cells(distances, folds, THRESHOLDS)
    for row in weights:
        yield float(_accuracies(cells, same, row, len(THRESHOLDS))[0].mean())


def _cells(
    distances: NDArray[np.float64], folds: NDArray[np.int64], thresholds: NDArray[np.float64]
) -> NDArray[np.int64]:
    """A number for each pair: its fold, and the first threshold that accepts it (K: none does)."""
    return folds * (len(thresholds) + 1) + np.searchsorted(thresholds, distances, side="right")


def _accuracies(
    cells: NDArray[np.int64], same: NDArray[np.bool_], weights: NDArray[np.floating], count: int
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """The accuracy of each fold, and the number of the threshold that the other folds chose for it."""
    accepted, sizes = [], []
    for kind in (same, ~same):
        counts = np.bincount(cells[kind], weights[kind], FOLDS * (count + 1)).reshape(FOLDS, count + 1)
        accepted.append(counts.cumsum(axis=1)[:, :-1])
        sizes.append(counts.sum(axis=1))
    right = accepted[0] + sizes[1][:, None] - accepted[1]
    best = (right.sum(axis=0) - right).argmax(axis=1)
    return right[np.arange(FOLDS), best] / (sizes[0] + sizes[1]), best

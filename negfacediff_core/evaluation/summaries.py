"""Distributions of a number over images, as a report holds them, and the balance of classes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: The quantiles that a summary has, in order.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 50


def summarise(
    values: NDArray[np.floating], limits: tuple[float, float] | None = None, bins: int = BINS
) -> dict[str, Any] | None:
    """Histogram and moments of the finite ones of `values`, any shape, in JSON types; None if there are none.

    `counts` are over `bins` equal bins between the `limits`, `low` and `high` (default: the least and the
    greatest value); what lies outside counts in the first or last bin. `std` is the population deviation.
    """
    finite = np.asarray(values, np.float64).ravel()
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return None
    low, high = limits or (float(finite.min()), float(finite.max()))
    if low == high:  # a constant
        high = low + 1.0
    counts, _ = np.histogram(np.clip(finite, low, high), bins, (low, high))
    return {
        "low": low,
        "high": high,
        "counts": counts.tolist(),
        "count": len(finite),
        "mean": float(finite.mean()),
        "std": float(finite.std()),
        "quantiles": [float(value) for value in np.quantile(finite, QUANTILES)],
    }


def evenness(counts: NDArray[np.integer]) -> float | None:
    """Entropy of the shares of K classes over ln K, in [0, 1] (Pielou, J. Theor. Biol. 13, 1966).

    1: all classes are equally frequent; 0: one has everything. `counts` `(K,)`; None for nothing or K < 2.
    """
    total = counts.sum()
    if not total or len(counts) < 2:
        return None
    shares = counts[counts > 0] / total
    return float(-(shares * np.log(shares)).sum() / np.log(len(counts)))

"""Separability of genuine from impostor scores: FDR, EER and error rates at fixed false match rates.

A pair matches when its score is at or above the threshold. FMR is the share of impostor pairs that match,
FNMR the share of genuine pairs that do not. Thresholds are the observed levels and, above them all, one at
which nothing matches.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.evaluation.distributions import Distribution


@dataclass(frozen=True)
class Separability:
    """All figures of one comparison of genuine with impostor scores; rates are in [0, 1], deviations of the
    population.

    `fmr100`, `fmr1000` and `zero_fmr` are the lowest FNMR at which the FMR is *at most* 1%, 0.1% and 0. The
    `_closest` figures take the threshold whose FMR is *closest* to that, above or below, as the tool pyeer
    does. `resolution` is the width of the score bins that they were computed from; 0 means from every single
    score. `eer_bound` is the most by which the EER can differ from that of the single scores.
    """

    genuine_count: int
    impostor_count: int
    genuine_mean: float
    genuine_std: float
    impostor_mean: float
    impostor_std: float
    fdr: float
    decidability: float
    eer: float
    eer_threshold: float
    fmr100: float
    fmr1000: float
    zero_fmr: float
    fmr100_closest: float
    fmr1000_closest: float
    zero_fmr_closest: float
    auc: float
    resolution: float
    eer_bound: float


class OperatingPoint(NamedTuple):
    """A threshold with its FMR and FNMR; +inf, at which nothing matches, is one."""

    threshold: float
    fmr: float
    fnmr: float


class ErrorRates(NamedTuple):
    """FMR and FNMR `(K,)` at ascending thresholds `(K,)`; the last threshold is +inf (FMR 0, FNMR 1)."""

    thresholds: NDArray[np.float64]
    fmr: NDArray[np.float64]
    fnmr: NDArray[np.float64]


def separability(genuine: Distribution, impostor: Distribution) -> Separability:
    """Compute every figure of `Separability`; NegFaceDiffError where either kind has no score."""
    if not genuine.size or not impostor.size:
        raise NegFaceDiffError(
            f"separability needs genuine and impostor comparisons, got {genuine.size} and {impostor.size}: "
            "it takes at least two identities, and two images of one of them, in which a face was found"
        )
    rates = error_rates(genuine, impostor)
    eer, eer_threshold = equal_error_rate(rates)
    fdr = fisher_discriminant_ratio(genuine.mean, genuine.std, impostor.mean, impostor.std)
    return Separability(
        genuine_count=genuine.size,
        impostor_count=impostor.size,
        genuine_mean=genuine.mean,
        genuine_std=genuine.std,
        impostor_mean=impostor.mean,
        impostor_std=impostor.std,
        fdr=fdr,
        decidability=math.sqrt(2 * fdr),
        eer=eer,
        eer_threshold=eer_threshold,
        fmr100=point_at_most(rates, 0.01).fnmr,
        fmr1000=point_at_most(rates, 0.001).fnmr,
        zero_fmr=point_at_most(rates, 0.0).fnmr,
        fmr100_closest=point_closest(rates, 0.01).fnmr,
        fmr1000_closest=point_closest(rates, 0.001).fnmr,
        zero_fmr_closest=point_closest(rates, 0.0).fnmr,
        auc=area_under_curve(rates),
        resolution=max(genuine.resolution, impostor.resolution),
        eer_bound=eer_bound(rates) if genuine.resolution or impostor.resolution else 0.0,
    )


def fisher_discriminant_ratio(
    genuine_mean: float, genuine_std: float, impostor_mean: float, impostor_std: float
) -> float:
    """FDR = (mu_g - mu_i)^2 / (sd_g^2 + sd_i^2); infinite for distinct constants, 0 for equal ones.

    Decidability is |mu_g - mu_i| / sqrt((sd_g^2 + sd_i^2) / 2) = sqrt(2 FDR).
    """
    distance, spread = (genuine_mean - impostor_mean) ** 2, genuine_std**2 + impostor_std**2
    if spread == 0:
        return math.inf if distance else 0.0
    return distance / spread


def error_rates(genuine: Distribution, impostor: Distribution) -> ErrorRates:
    """FMR(t) = share of impostor scores >= t and FNMR(t) = share of genuine scores < t, at every level t and
    at +inf.
    """
    levels = np.union1d(genuine.levels, impostor.levels)
    rejected = [
        np.concatenate([[0], np.cumsum(kind.counts)])[np.searchsorted(kind.levels, levels)]
        for kind in (genuine, impostor)
    ]
    fnmr = rejected[0] / genuine.size
    fmr = (impostor.size - rejected[1]) / impostor.size
    return ErrorRates(np.append(levels, np.inf), np.append(fmr, 0.0), np.append(fnmr, 1.0))


def equal_error_rate(rates: ErrorRates) -> tuple[float, float]:
    """The EER, FMR(t) = FNMR(t), and its threshold: (rate, t).

    Rates move in steps, so that they rarely meet: of the two thresholds around the crossing the one of
    smaller FMR + FNMR is taken, the lower one on a tie, and the EER is the mean of its two rates (FVC2000; as
    pyeer).
    """
    before, after = _crossing(rates)
    totals = rates.fmr + rates.fnmr
    at = before if totals[before] <= totals[after] else after
    return float(totals[at] / 2), float(rates.thresholds[at])


def eer_bound(rates: ErrorRates) -> float:
    """The most by which the EER of binned scores can differ from that of the scores themselves.

    Rates at the edges of bins are exact, and rates are monotone: the scores' own thresholds around the
    crossing lie between the edges around it. So both rates, and with them the mean, lie between those there.
    """
    before, after = _crossing(rates)
    eer, _ = equal_error_rate(rates)
    lowest, highest = rates.fmr[after] + rates.fnmr[before], rates.fmr[before] + rates.fnmr[after]
    return float(max(eer - lowest / 2, highest / 2 - eer))


def _crossing(rates: ErrorRates) -> tuple[int, int]:
    """The last threshold with FMR > FNMR and the one after it; twice the same where the rates are equal."""
    after = int(np.argmax(rates.fmr <= rates.fnmr))
    before = after if after == 0 or rates.fmr[after] == rates.fnmr[after] else after - 1
    return before, after


def point_at_most(rates: ErrorRates, fmr: float) -> OperatingPoint:
    """The lowest threshold, and with it the lowest FNMR, whose FMR is at most `fmr`."""
    return _point(rates, int(np.argmax(rates.fmr <= fmr)))


def point_closest(rates: ErrorRates, fmr: float) -> OperatingPoint:
    """The lowest observed threshold of an FMR closest to `fmr`, above or below (as pyeer)."""
    return _point(rates, int(np.argmin(np.abs(rates.fmr[:-1] - fmr))))


def point_at(rates: ErrorRates, threshold: float) -> OperatingPoint:
    """FMR and FNMR at any threshold."""
    above = int(np.searchsorted(rates.thresholds, threshold))
    return _point(rates, above)._replace(threshold=threshold)


def _point(rates: ErrorRates, index: int) -> OperatingPoint:
    return OperatingPoint(*(float(values[index]) for values in rates))


def area_under_curve(rates: ErrorRates) -> float:
    """Area under the ROC curve: the chance that a genuine score exceeds an impostor score, ties counting
    half.
    """
    return float(np.trapezoid(1 - rates.fnmr[::-1], rates.fmr[::-1]))

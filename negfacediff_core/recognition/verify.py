"""Verification of recognisers: the figures of a set of pairs, or of templates."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.evaluation.distributions import Distribution, unit_vectors
from negfacediff_core.evaluation.metrics import (
    area_under_curve,
    equal_error_rate,
    error_rates,
    point_at_most,
    point_closest,
)
from negfacediff_core.recognition.embedding import Embedding, embed_all, embedded_batches
from negfacediff_core.recognition.fold_accuracy import fold_accuracy
from negfacediff_core.recognition.ijbc import TemplateSet, pool, template_cosines
from negfacediff_core.recognition.pair_sets import ComparisonList
from negfacediff_core.recognition.verification_bootstrap import (
    FIGURES,
    draw_weights,
    interval,
    resample,
)
from negfacediff_core.recognition.verification_sets import VerificationSet

#: The false accept rates at which the true accept rate is told, of pairs and of templates.
PAIR_FARS = (1e-3, 1e-4)
TEMPLATE_FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)

Committed = Callable[[int], None]
Batches = Iterator[tuple[int, NDArray[np.float32]]]


@dataclass(frozen=True)
class Verified:
    """What one recogniser makes of one set: `figures` in JSON types, the `cosines` `(P,)` of its pairs, and
    the `draws` `(B, 3)` behind the figures' intervals.

    See `pair_figures` and `template_figures` for the figures, which comparisons without labels have none of;
    `draws` is empty where nothing was resampled.
    """

    figures: dict[str, Any]
    cosines: NDArray[np.floating]
    draws: NDArray[np.float64]


def verify(
    tested: VerificationSet,
    how: Embedding,
    committed: Committed = lambda count: None,
    draws: int = 0,
    weigh: bool = True,
) -> Verified:
    """Embed a set's crops and compute its figures.

    Args:
        tested: the set.
        how: by which recogniser, and how.
        committed: is told how many crops were embedded, now and then.
        draws: resamples of the pairs, for intervals. Templates are not resampled: their millions of pairs are
            those of a few thousand people, and intervals over pairs would be far too narrow.
        weigh: weigh the images of a template by the detector's scores of their faces.

    Raises NegFaceDiffError as `embedded_batches` and `pool`.
    """
    none = np.empty((0, len(FIGURES)))
    if isinstance(tested, TemplateSet):
        batches = _told(embedded_batches(tested.crops, how), committed)
        pooled = pool(tested, batches, how.embedder.width, weigh)
        similar = template_cosines(pooled, tested.pairs)
        return Verified(template_figures(similar, tested.same), similar, none)
    unit = unit_vectors(embed_all(tested.crops, how, committed))
    cosines, distances = pair_scores(unit, tested.pairs)
    if isinstance(tested, ComparisonList):
        return Verified({}, cosines, none)
    figures = pair_figures(cosines, distances, tested.same, tested.folds)
    if not draws:
        return Verified(figures, cosines, none)
    weights = draw_weights(tested.folds, draws)
    resampled = resample(cosines, distances, tested.same, tested.folds, weights)
    figures["intervals"] = dict(zip(FIGURES, map(list, interval(resampled)), strict=True))
    return Verified(figures, cosines, resampled)


class Outcome(NamedTuple):
    """The figures of the set `tested` by `recogniser`, the `cosines` `(P,)` of its pairs, and the
    `differences` to the first recogniser.
    """

    tested: str
    recogniser: str
    figures: dict[str, Any]
    cosines: NDArray[np.floating]
    differences: dict[str, dict[str, Any]]


def verify_all(
    tested: Sequence[VerificationSet],
    recognisers: Mapping[str, Embedding],
    committed: Committed = lambda count: None,
    draws: int = 0,
    weigh: bool = True,
) -> Iterator[Outcome]:
    """Yield what each recogniser makes of each set, set by set; arguments and errors as `verify`."""
    for one in tested:
        first: Verified | None = None
        for name, how in recognisers.items():
            verified = verify(one, how, committed, draws, weigh)
            apart = {} if first is None else differences(verified, first)
            first = first or verified
            yield Outcome(one.name, name, verified.figures, verified.cosines, apart)


def _told(batches: Batches, committed: Committed) -> Batches:
    """The same batches; `committed` is told of each."""
    for start, part in batches:
        yield start, part
        committed(len(part))


def pair_scores(
    unit: NDArray[np.float64], pairs: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the cosine and the squared distance of each pair `(P,)` of unit embeddings `(N, width)`."""
    first, second = unit[pairs[:, 0]], unit[pairs[:, 1]]
    return np.einsum("pd,pd->p", first, second), np.square(first - second).sum(axis=1)


def pair_figures(
    cosines: NDArray[np.float64],
    distances: NDArray[np.float64],
    same: NDArray[np.bool_],
    folds: NDArray[np.int64],
) -> dict[str, Any]:
    """Return the figures of pairs `(P,)`, in JSON types.

    `accuracy` and `accuracy_std` over the ten folds, with their `accuracies` and `thresholds` (squared
    distances); further what `template_figures` returns, at PAIR_FARS.
    """
    folded = fold_accuracy(distances, same, folds)
    return {
        "accuracy": folded.mean,
        "accuracy_std": folded.std,
        "accuracies": folded.accuracies.tolist(),
        "thresholds": folded.thresholds.tolist(),
        **_rates(cosines, same, PAIR_FARS),
    }


def template_figures(cosines: NDArray[np.floating], same: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the figures of pairs of templates `(P,)`, in JSON types.

    `genuine` and `impostor` count pairs; `eer`, `auc`, and `tar` by FAR (`"1e-5"`): the highest share of the
    genuine pairs that is accepted where the FAR is at most that. `tar_closest` takes the FAR that is closest
    to it, above or below, as published evaluations do.
    """
    return _rates(cosines, same, TEMPLATE_FARS)


def _rates(cosines: NDArray[np.floating], same: NDArray[np.bool_], fars: Sequence[float]) -> dict[str, Any]:
    rates = error_rates(Distribution.of(cosines[same]), Distribution.of(cosines[~same]))
    return {
        "genuine": int(same.sum()),
        "impostor": int((~same).sum()),
        "eer": equal_error_rate(rates)[0],
        "auc": area_under_curve(rates),
        "tar": {far_name(far): 1 - point_at_most(rates, far).fnmr for far in fars},
        "tar_closest": {far_name(far): 1 - point_closest(rates, far).fnmr for far in fars},
    }


def differences(one: Verified, other: Verified) -> dict[str, dict[str, Any]]:
    """Compare two recognisers on one set: of each of the FIGURES, `one` less `other`, with its interval.

    `low` and `high` are those of the paired bootstrap. Empty where the set was not resampled.
    """
    if not len(one.draws) or not len(other.draws):
        return {}
    limits = interval(one.draws - other.draws)
    return {
        name: {"difference": _figure(one, name) - _figure(other, name), "low": low, "high": high}
        for name, (low, high) in zip(FIGURES, limits, strict=True)
    }


def _figure(verified: Verified, name: str) -> float:
    """One of the FIGURES of the whole set."""
    kind, _, far = name.partition("_")
    value = verified.figures[kind]
    return float(value[far] if far else value)


def far_name(far: float) -> str:
    """Write a rate as papers do: 1e-4."""
    return f"{far:.0e}".replace("e-0", "e-")

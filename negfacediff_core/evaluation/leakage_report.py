"""What a leakage gate reports: counts at each rate, and the most similar pairs, in JSON types only."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.evaluation.leakage import Calibration, Neighbours, alike, needed_pairs

#: The most similar pairs that a report names.
WORST = 50


class Seen(NamedTuple):
    """What one recogniser says: of the images `(I, R)` and of the identities' centres `(I,)` the nearest
    gallery rows and their cosines, and how the gallery's own people compare.
    """

    images: Neighbours
    centres: Neighbours
    calibration: Calibration


def describe(seen: Seen, rates: Sequence[float], names: Sequence[str]) -> dict[str, Any]:
    """Say what one recogniser sees: at each rate the threshold and what reaches it, and the WORST pairs.

    `names` are those of the gallery's images. A rate that the gallery has too few pairs for is null.
    """
    calibration = seen.calibration
    return {
        "impostor_pairs": calibration.pairs,
        "gallery_sampled": len(calibration.nearest),
        "rates": [
            {
                "fmr": rate,
                "threshold": threshold,
                "pairs_needed": needed_pairs(rate),
                **_counts(seen, threshold),
            }
            for rate, threshold in zip(rates, calibration.thresholds, strict=True)
        ],
        "nearest": _quantiles(seen.images.cosine),
        "nearest_of_gallery": _quantiles(calibration.nearest),
        "worst_images": _worst(seen.images, names),
        "worst_centres": _worst(seen.centres, names),
    }


def describe_together(seen: Sequence[Seen], rates: Sequence[float]) -> list[dict[str, Any]]:
    """Count at each rate the images that some recogniser finds alike, and that all do; null where one has no
    threshold.
    """
    rows: list[dict[str, Any]] = []
    for number, rate in enumerate(rates):
        reached = [
            alike(one.images.cosine, threshold)
            for one in seen
            if (threshold := one.calibration.thresholds[number]) is not None
        ]
        complete = len(reached) == len(seen)
        some = int(np.logical_or.reduce(reached).sum()) if complete else None
        both = int(np.logical_and.reduce(reached).sum()) if complete else None
        rows.append({"fmr": rate, "some": some, "all": both})
    return rows


def _counts(seen: Seen, threshold: float | None) -> dict[str, Any]:
    """How much reaches a threshold: images, identities with such an image, centres, and the share of the
    gallery's own faces that are alike to somebody else in it; null without a threshold.
    """
    if threshold is None:
        return dict.fromkeys(("images", "identities", "centres", "gallery_share"))
    images = alike(seen.images.cosine, threshold)
    own = alike(seen.calibration.nearest, threshold)
    return {
        "images": int(images.sum()),
        "identities": int(images.any(axis=1).sum()),
        "centres": int(alike(seen.centres.cosine, threshold).sum()),
        "gallery_share": float(own.mean()),
    }


def _quantiles(cosine: NDArray[np.float64]) -> dict[str, float]:
    """Median, 99% quantile and greatest of the cosines that exist."""
    there = cosine[np.isfinite(cosine)]
    if not len(there):
        return {}
    return {
        "median": float(np.median(there)),
        "q99": float(np.quantile(there, 0.99)),
        "greatest": float(there.max()),
    }


def _worst(found: Neighbours, names: Sequence[str]) -> list[dict[str, Any]]:
    """Name the pairs of greatest cosine, at most WORST."""
    cosine = np.where(np.isnan(found.cosine), -np.inf, found.cosine)
    order = np.argsort(-cosine, axis=None, kind="stable")[:WORST]
    places = zip(*np.unravel_index(order, cosine.shape), strict=True)
    axes = ("identity", "replicate")
    return [
        {
            **{axis: int(position) for axis, position in zip(axes, place, strict=False)},
            "gallery": names[found.row[place]],
            "cosine": float(found.cosine[place]),
        }
        for place in places
        if np.isfinite(cosine[place])
    ]

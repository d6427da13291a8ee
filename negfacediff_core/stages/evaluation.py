"""Stage `evaluation`: the figures and pictures of one build's extent, as one unit.

It is derived from the other stages and holds nothing that depends on how long they took, so that the same
images give the same bytes.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.evaluation.identities import bootstrap_fdr, identity_statistics
from negfacediff_core.evaluation.metrics import Separability, separability
from negfacediff_core.evaluation.plots import (
    ScorePanel,
    SheetPanel,
    contact_sheet,
    score_histogram,
)
from negfacediff_core.evaluation.scores import EXACT_IMAGES, Comparisons, compare
from negfacediff_core.stages.models import describe_device, device_of
from negfacediff_core.stages.negatives import stored_negatives
from negfacediff_core.store.extents import read_array, read_column
from negfacediff_core.store.layout import Grid, StageSpec, Unit
from negfacediff_core.store.records import Record
from negfacediff_core.store.shards import commit
from negfacediff_core.store.tables import rows_of

VERSION = 1
COLUMNS = (
    ("identity", "int64"),
    ("images", "int64"),
    ("genuine_mean", "float64"),
    ("nearest", "int64"),
    ("nearest_cosine", "float64"),
)
INPUTS = ("negatives", "samples", "aligned", "embeddings")
# The share of the bootstrap's resamples that lies in an interval.
CONFIDENCE = 0.95
# Largest contact sheet, identities x replicates.
SHEET = (12, 8)


class Evaluated(NamedTuple):
    """What the judge says: embeddings `(I, R, D)` float32, and which are valid `(I, R)`."""

    embeddings: NDArray[np.float32]
    valid: NDArray[np.bool_]


def plan(build: BuildConfig, store: str, upstream: Mapping[str, StageSpec]) -> StageSpec:
    """Describe the stage; unlike the others its extent is part of its fingerprint."""
    settings = build.evaluation
    options = {name: getattr(settings, name) for name in ("protocol", "bootstrap", "seed")}
    return StageSpec(
        store=store,
        name="evaluation",
        version=VERSION,
        config={**options, "identities": build.identities, "images": build.images},
        inputs={name: upstream[name].fingerprint for name in INPUTS},
        grid=Grid(build.identities, 1, build.identities, 1),
        columns=COLUMNS,
        per_replicate=False,
    )


def run_unit(spec: StageSpec, unit: Unit, execution: ExecutionConfig) -> Record:
    """Compute and draw everything."""
    started, begun = time.time(), time.perf_counter()
    device = device_of(execution.device)
    judged = _judged(spec)
    seconds = {"read": time.perf_counter() - begun}

    begun = time.perf_counter()
    comparisons = _compare(spec, judged, device)
    report = {
        **_settings(spec),
        **_figures(comparisons),
        **_interval(spec, judged),
        **_shares(spec),
        **_closeness(spec),
    }
    statistics = identity_statistics(*judged)
    seconds["score"] = time.perf_counter() - begun

    begun = time.perf_counter()
    label = str(report["rule"])
    files = {
        "report.json": (json.dumps(_finite(report), indent=2, allow_nan=False) + "\n").encode(),
        "contact_sheet.png": contact_sheet([sheet_panel(spec, label, *SHEET)]),
    }
    if _comparable(comparisons):
        files["histogram.png"] = score_histogram([ScorePanel(label, *comparisons)])
    seconds["draw"] = time.perf_counter() - begun
    return commit(
        spec,
        unit,
        arrays={},
        rows=rows_of(spec, {"identity": np.arange(spec.config["identities"]), **statistics}),
        started=started,
        seconds=seconds,
        device=describe_device(device),
        files=files,
    )


def score_panel(spec: StageSpec, label: str) -> ScorePanel:
    """Return a build's scores for a histogram that shows several builds."""
    return ScorePanel(label, *_compare(spec, _judged(spec), "cpu"))


def sheet_panel(spec: StageSpec, label: str, identities: int, images: int) -> SheetPanel:
    """Return a build's first images, at most that many, for a contact sheet that shows several builds."""
    extent = min(identities, spec.config["identities"]), min(images, spec.config["images"])
    detected = read_column(spec.input("aligned"), "status", *extent) == "ok"
    return SheetPanel(label, read_array(spec.input("samples"), "image", *extent), detected)


def _judged(spec: StageSpec) -> Evaluated:
    stored, extent = spec.input("embeddings"), _extent(spec)
    return Evaluated(read_array(stored, "embedding", *extent), read_column(stored, "status", *extent) == "ok")


def _compare(spec: StageSpec, judged: Evaluated, device: str) -> Comparisons:
    return compare(*judged, spec.config["protocol"], spec.config["seed"], device=device)


def _comparable(comparisons: Comparisons) -> bool:
    return comparisons.genuine.size > 0 and comparisons.impostor.size > 0


def _settings(spec: StageSpec) -> dict[str, Any]:
    samples, (identities, images) = spec.input("samples"), _extent(spec)
    return {
        "rule": spec.input("negatives").config["rule"],
        **samples.config,
        "identities": identities,
        "images": identities * images,
    }


def _figures(comparisons: Comparisons) -> dict[str, Any]:
    """All figures; none of them where no two images can be compared, which is a result, too."""
    if not _comparable(comparisons):
        return dict.fromkeys(field.name for field in fields(Separability))
    return asdict(separability(*comparisons))


def _interval(spec: StageSpec, judged: Evaluated) -> dict[str, Any]:
    """Bootstrap interval of the FDR over the first identities that it can take."""
    fits = np.cumsum(judged.valid.sum(axis=1)) <= EXACT_IMAGES
    draws = spec.config["bootstrap"]
    if not draws or fits.sum() < 2:
        return {}
    part = Evaluated(judged.embeddings[fits], judged.valid[fits])
    resampled = bootstrap_fdr(*part, draws, spec.config["seed"])
    resampled = resampled[np.isfinite(resampled)]
    if not len(resampled):
        return {}
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [outside, 1 - outside])
    return {"fdr_interval": [float(low), float(high)]}


def _shares(spec: StageSpec) -> dict[str, Any]:
    """Faces found among all images, and the mean share of clipped values of those that were sampled."""
    extent = _extent(spec)
    detected = read_column(spec.input("aligned"), "status", *extent) == "ok"
    clipped = read_column(spec.input("samples"), "clipped", *extent)
    sampled = np.isfinite(clipped)
    return {
        "detected_fraction": float(detected.mean()),
        "clipped_fraction": float(clipped[sampled].mean()) if sampled.any() else None,
        "failed": int((~sampled).sum()),
    }


def _closeness(spec: StageSpec) -> dict[str, Any]:
    """How close the negatives are: mean, least and greatest cosine; nothing where the rule names none."""
    cosine = stored_negatives(spec.input("negatives"), np.arange(spec.config["identities"])).cosine
    if np.isnan(cosine).any():
        return {}
    return {
        "negative_cosine": float(cosine.mean(dtype=np.float64)),
        "negative_cosine_range": [float(cosine.min()), float(cosine.max())],
    }


def _extent(spec: StageSpec) -> tuple[int, int]:
    return spec.config["identities"], spec.config["images"]


def _finite(report: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity (the threshold above all scores): such a figure is null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in report.items()
    }

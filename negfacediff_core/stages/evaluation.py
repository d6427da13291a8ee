"""Stage `evaluation`: the figures and pictures of one build's extent, as one unit.

It is derived from the other stages and holds nothing that depends on how long they took, so that the same
images give the same bytes.
"""

import io
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.cost import evaluations_of, passes_of
from negfacediff_core.diffusion.checkpoint import open_release
from negfacediff_core.errors import StoreError
from negfacediff_core.evaluation.bootstrap import FIGURES, Resampled, bootstrap
from negfacediff_core.evaluation.distribution_plots import distribution_plots
from negfacediff_core.evaluation.metrics import (
    OperatingPoint,
    Separability,
    error_rates,
    point_at,
    point_at_most,
    separability,
)
from negfacediff_core.evaluation.plots import ScorePanel, det_curves, score_histogram
from negfacediff_core.evaluation.scores import PAPER_IDENTITIES, Comparisons, compare
from negfacediff_core.evaluation.sheets import SheetPanel, contact_sheet
from negfacediff_core.stages.dataset_figures import DATASET_COLUMNS, dataset_figures
from negfacediff_core.stages.models import describe_device, scores_device_of, scoring_on
from negfacediff_core.stages.negatives import stored_negatives
from negfacediff_core.stages.samples import sampler_settings
from negfacediff_core.stages.scores import read_judged, stored_comparisons
from negfacediff_core.store.extents import read_array, read_column
from negfacediff_core.store.layout import Grid, StageSpec, Unit
from negfacediff_core.store.records import Record
from negfacediff_core.store.shards import commit, read_file
from negfacediff_core.store.tables import rows_of

VERSION = 3
COLUMNS = (("identity", "int64"), *DATASET_COLUMNS)
INPUTS = ("contexts", "negatives", "samples", "aligned", "embeddings", "scores")
# Operating points of the report: the lowest threshold of at most these FMR, and thresholds themselves.
RATES = (0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6, 0.0)
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(-4, 20))
# The file of the unit that holds the figures of the resamples.
RESAMPLES = "bootstrap.npz"
# What the embeddings say of an image that is no part of the dataset, though nothing failed.
TAKEN_OUT = ("leaked", "out_of_band")
# Largest contact sheet, identities x replicates.
SHEET = (12, 8)


def plan(build: BuildConfig, store: str, upstream: Mapping[str, StageSpec]) -> StageSpec:
    """Describe the stage; unlike the others its extent is part of its fingerprint."""
    settings = build.evaluation
    options = {name: getattr(settings, name) for name in ("protocol", "bootstrap", "match_cosine", "seed")}
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
    device = scores_device_of(execution.device)
    comparisons = _compare(spec, device)
    figures = _figures(comparisons)
    seconds = {"score": time.perf_counter() - begun}

    begun = time.perf_counter()
    resampled = _resample(spec) if spec.config["bootstrap"] else None
    report = {
        **_settings(spec),
        **figures,
        **(_intervals(resampled, figures) if resampled else {}),
        **_operating_points(comparisons),
        **_shares(spec),
        **_closeness(spec),
        "network_evaluations": _evaluations_an_image(spec),
    }
    seconds["resample"] = time.perf_counter() - begun

    begun = time.perf_counter()
    worth = dataset_figures(spec, comparisons if _comparable(comparisons) else None)
    report |= worth.figures
    seconds["dataset"] = time.perf_counter() - begun

    begun = time.perf_counter()
    label = str(report["rule"])
    files = {
        "report.json": (json.dumps(_finite(report), indent=2, allow_nan=False) + "\n").encode(),
        "contact_sheet.png": contact_sheet([sheet_panel(spec, label, *SHEET)]),
    }
    if resampled:
        files[RESAMPLES] = _encode(resampled)
    if _comparable(comparisons):
        panels = [ScorePanel(label, *comparisons)]
        for form in ("png", "svg"):
            files[f"histogram.{form}"] = score_histogram(panels, form)
            files[f"det.{form}"] = det_curves(panels, form)
    if report["distributions"]:
        for form in ("png", "svg"):
            files[f"distributions.{form}"] = distribution_plots(report["distributions"], form)
    seconds["draw"] = time.perf_counter() - begun
    return commit(
        spec,
        unit,
        arrays={},
        rows=rows_of(spec, {"identity": np.arange(spec.config["identities"]), **worth.columns}),
        started=started,
        seconds=seconds,
        device=describe_device(device),
        files=files,
    )


def score_panel(spec: StageSpec, label: str) -> ScorePanel:
    """Return a build's scores for a histogram that shows several builds."""
    return ScorePanel(label, *_compare(spec, "cpu"))


def sheet_panel(spec: StageSpec, label: str, identities: int, images: int) -> SheetPanel:
    """Return a build's first images, at most that many, for a contact sheet that shows several builds.

    Images that were taken out of the dataset, since they leak or lie outside the band, are not shown.
    """
    extent = min(identities, spec.config["identities"]), min(images, spec.config["images"])
    detected = read_column(spec.input("aligned"), "status", *extent) == "ok"
    taken_out = np.isin(read_column(spec.input("embeddings"), "status", *extent), TAKEN_OUT)
    return SheetPanel(label, read_array(spec.input("samples"), "image", *extent), detected, taken_out)


def difference_intervals(spec: StageSpec, other: StageSpec) -> dict[str, tuple[float, float]]:
    """Return the interval of the difference of each bootstrapped figure, `spec`'s less `other`'s.

    Both evaluations are committed. The same identities were drawn for both, so that what they share falls
    out. Figures that one of them does not have are left out.

    Raises:
        StoreError: if the two did not draw the same identities, or drew none.
    """
    drawn = ("protocol", "identities", "images", "bootstrap", "seed")
    one, two = ({name: each.config[name] for name in drawn} for each in (spec, other))
    if one != two or not one["bootstrap"]:
        raise StoreError(
            f"the difference of {spec.directory} and {other.directory} has no interval, which takes the same "
            "protocol, identities, images, evaluation.seed and evaluation.bootstrap, above 0: "
            f"{one} and {two}"
        )
    figures, draws = [], []
    for each in (spec, other):
        (unit,) = each.grid.units()
        report = json.loads(read_file(each, unit, "report.json"))
        figures.append(np.array([report[name] for name in FIGURES], np.float64))
        draws.append(_decode(read_file(each, unit, RESAMPLES)))
    limits = draws[0].less(draws[1]).interval(figures[0] - figures[1])
    return {
        name: (float(low), float(high))
        for name, (low, high) in zip(FIGURES, limits, strict=True)
        if np.isfinite(low + high)
    }


def _compare(spec: StageSpec, device: str) -> Comparisons:
    """The scores of the protocol: those that the bands have counted, or every single one."""
    # evaluations of the first version knew no bands
    counted = stored_comparisons(spec.input("scores")) if "scores" in spec.inputs else None
    if counted is not None:
        return counted
    settings = spec.config
    # the paper's protocol takes no identity beyond these
    count = min(settings["identities"], PAPER_IDENTITIES) if settings["protocol"] == "paper" else None
    judged = read_judged(spec.input("embeddings"), _extent(spec), np.arange(count or settings["identities"]))
    with scoring_on(device):
        return compare(*judged, settings["protocol"], settings["seed"], device=device)


def _comparable(comparisons: Comparisons) -> bool:
    return comparisons.genuine.size > 0 and comparisons.impostor.size > 0


def _settings(spec: StageSpec) -> dict[str, Any]:
    samples, (identities, images) = spec.input("samples"), _extent(spec)
    return {
        "rule": spec.input("negatives").config["rule"],
        **samples.config,
        "identities": identities,
        "images": identities * images,
        "protocol": spec.config["protocol"],
        "bootstrap": spec.config["bootstrap"],
        "evaluation_seed": spec.config["seed"],
    }


def _figures(comparisons: Comparisons) -> dict[str, Any]:
    """All figures; none of them where no two images can be compared, which is a result, too."""
    if not _comparable(comparisons):
        return dict.fromkeys(field.name for field in fields(Separability))
    return asdict(separability(*comparisons))


def _resample(spec: StageSpec) -> Resampled:
    """The figures of the protocol in resamples of the identities."""
    embeddings, extent = spec.input("embeddings"), _extent(spec)
    return bootstrap(
        lambda identities: read_judged(embeddings, extent, identities),
        extent,
        spec.config["bootstrap"],
        spec.config["seed"],
        spec.config["protocol"],
    )


def _intervals(resampled: Resampled, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Bootstrap intervals by figure; none where there is no figure, or it has no limit."""
    limits = resampled.interval(np.array([figures[name] for name in FIGURES], np.float64))
    return {
        f"{name}_interval": [max(0.0, float(low)), float(high) if name == "fdr" else min(1.0, float(high))]
        for name, (low, high) in zip(FIGURES, limits, strict=True)
        if np.isfinite(low + high)
    }


def _operating_points(comparisons: Comparisons) -> dict[str, Any]:
    """FMR and FNMR where the FMR is at most each of RATES, and at each of THRESHOLDS.

    A rate that is less than one of the impostor pairs cannot be told from 0, and has no point.
    """
    if not _comparable(comparisons):
        return {}
    rates = error_rates(*comparisons)
    nothing = dict.fromkeys(OperatingPoint._fields)
    points = [
        nothing if 0 < rate * comparisons.impostor.size < 1 else _finite(point_at_most(rates, rate)._asdict())
        for rate in RATES
    ]
    return {
        "at_fmr": [{"fmr_at_most": rate, **point} for rate, point in zip(RATES, points, strict=True)],
        "at_threshold": [point_at(rates, threshold)._asdict() for threshold in THRESHOLDS],
    }


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


def _evaluations_an_image(spec: StageSpec) -> int:
    """How often the network is evaluated for one image, as its sampler and guidance ask for it."""
    samples, negatives = spec.input("samples"), spec.input("negatives").config
    timesteps = open_release(Path(samples.weights["generator"].path)).schedule.T
    # the rule null picks nobody: it has no count, and one context for all
    count = 0 if negatives["rule"] == "none" else negatives.get("count", 1)
    return evaluations_of(passes_of(sampler_settings(samples), timesteps, count))


def _extent(spec: StageSpec) -> tuple[int, int]:
    return spec.config["identities"], spec.config["images"]


def _encode(resampled: Resampled) -> bytes:
    file = io.BytesIO()
    np.savez(file, **resampled._asdict())
    return file.getvalue()


def _decode(content: bytes) -> Resampled:
    with np.load(io.BytesIO(content), allow_pickle=False) as held:
        return Resampled(held["estimate"], held["draws"])


def _finite(report: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity (the threshold above all scores): such a figure is null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in report.items()
    }

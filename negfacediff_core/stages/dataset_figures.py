"""What a dataset is worth beyond how well its identities are told apart: a part of the stage `evaluation`.

Everything is read a block of identities at a time, twice: first what the images of an identity are to each
other, then what they are to all identities. What is held is about 40 bytes x width an identity, for centres
and contexts, and 150 bytes an image.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.contexts import closest
from negfacediff_core.evaluation.coverage import effective_dimensions, expected_nearest_cosine
from negfacediff_core.evaluation.distributions import Comparisons, unit_vectors
from negfacediff_core.evaluation.summaries import evenness, summarise
from negfacediff_core.evaluation.uniqueness import centres_of, crowding, match_threshold, strays
from negfacediff_core.evaluation.within import thumbnails, within_identities
from negfacediff_core.faces.pose import head_pose
from negfacediff_core.faces.quality import GENDERS
from negfacediff_core.stages.aligned import LANDMARKS
from negfacediff_core.stages.contexts import contexts_of
from negfacediff_core.store.layout import StageSpec, Unit
from negfacediff_core.store.shards import read_arrays, read_rows

#: Columns of an identity in the rows of the stage; NaN where too few of its images say it, and -1 for the
#: nearest identity where there is none.
DATASET_COLUMNS = (
    ("images", "int64"),
    ("genuine_mean", "float64"),
    ("nearest", "int64"),
    ("nearest_cosine", "float64"),
    ("centre_least", "float64"),
    ("spread", "float64"),
    ("pixel_difference", "float64"),
    ("near_duplicates", "int64"),
    ("strays", "int64"),
    ("context_cosine", "float64"),
)
# What has a distribution in the report, and between which limits its histogram lies; None: the extremes.
RANGES: dict[str, tuple[float, float] | None] = {
    "context_cosine": (-1.0, 1.0),
    "quality": None,
    "score": (0.0, 1.0),
    "yaw": (-90.0, 90.0),
    "pitch": (-90.0, 90.0),
    "roll": (-90.0, 90.0),
    "age": (0.0, 100.0),
}

Columns = dict[str, NDArray[Any]]


class DatasetFigures(NamedTuple):
    """`figures` for the report, in JSON types, and `columns` of the rows, `(I,)` each."""

    figures: dict[str, Any]
    columns: Columns


class _Part(NamedTuple):
    """A block of identities `(B,)`, and arrays and columns of all their images, `(B, R, ...)` by name."""

    identities: NDArray[np.int64]
    values: Columns


def dataset_figures(spec: StageSpec, comparisons: Comparisons | None) -> DatasetFigures:
    """Compute all figures of the extent of the evaluation `spec`.

    `comparisons` are its scores, None where nothing could be compared: they set the threshold from which two
    identities count as one, unless the stage's settings do. I identities of R images and width D cost
    I^2 R D multiplications, nearly all of them for strays; the full protocol costs I^2 R^2 D / 2.
    """
    contexts = contexts_of(spec.input("contexts"), np.arange(spec.config["identities"]))
    totals, identities, images = _first_pass(spec)
    placed, strays_of = _second_pass(spec, totals, contexts, images["own"])
    embedded = spec.input("embeddings").config
    threshold = spec.config["match_cosine"] or (match_threshold(comparisons) if comparisons else math.nan)
    figures = {
        **_identity_figures(identities, images["valid"]),
        **_uniqueness(totals, threshold),
        **placed,
        **_context_figures(contexts, images, "band_low" in embedded),
        **_image_figures(images, embedded.get("classes", 0)),
    }
    columns = {**identities, **_nearest(totals), "strays": strays_of, "images": images["valid"].sum(axis=1)}
    return DatasetFigures(_finite(figures), {name: columns[name] for name, _ in DATASET_COLUMNS})


def _first_pass(spec: StageSpec) -> tuple[NDArray[np.float64], Columns, Columns]:
    """Sums of unit embeddings `(I, D)`, columns of identities `(I,)`, and columns of images `(I, R)`."""
    totals: list[NDArray[np.float64]] = []
    identities: list[Columns] = []
    images: list[Columns] = []
    for part in _parts(spec, {"embeddings": ("embedding",), "aligned": ("image",)}):
        rows, valid = part.values, part.values["status"] == "ok"
        within = within_identities(part.values["embedding"], valid, thumbnails(part.values["image"]))
        totals.append(within.total)
        points = np.stack([rows[name] for name in LANDMARKS], axis=-1).reshape(*valid.shape, 5, 2)
        of_images: Columns = {
            "quality": rows.get("quality", rows["norm"]),
            **head_pose(points)._asdict(),
            **{name: rows[name] for name in ("attribute", "age", "context_cosine") if name in rows},
        }
        kept: Columns = {name: np.where(valid, values, np.nan) for name, values in of_images.items()}
        identities.append(
            {
                "genuine_mean": within.consistency,
                "centre_least": within.centre_least,
                "spread": within.spread,
                "pixel_difference": within.pixel_difference,
                "near_duplicates": within.near_duplicates,
                "context_cosine": _row_means(kept.get("context_cosine", np.full(valid.shape, np.nan))),
            }
        )
        # Images that a band leaves out have a similarity, and those that were not embedded a detection, too.
        every = ("score", "faces", "status", "context_cosine")
        kept |= {name: rows[name] for name in every if name in rows}
        images.append({**kept, "valid": valid, "own": within.own})
    return np.concatenate(totals), _joined(identities), _joined(images)


def _second_pass(
    spec: StageSpec, totals: NDArray[np.float64], contexts: NDArray[np.float32], own: NDArray[np.float64]
) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """The shares of strays, and of images at rank 1 to their context; and the strays of each identity."""
    centres, numbers = centres_of(totals)
    targets = contexts.astype(np.float64)
    conditioned = "recogniser" in spec.input("embeddings").weights
    count, hits, seen = np.zeros(len(totals), np.int64), 0, 0
    names = ("embedding", "context_embedding") if conditioned else ("embedding",)
    for part in _parts(spec, {"embeddings": names}):
        valid = part.values["status"] == "ok"
        identity = part.identities[np.nonzero(valid)[0]]
        vectors = unit_vectors(part.values["embedding"][valid])
        astray = strays(vectors, identity, own[part.identities][valid], centres, numbers)
        np.add.at(count, identity[astray], 1)
        seen += len(identity)
        if conditioned:
            hits += _at_rank_one(part.values["context_embedding"][valid], identity, targets)
    figures = {"stray_fraction": count.sum() / seen if seen else None}
    if conditioned:
        figures["rank1"] = hits / seen if seen else None
    return figures, count


def _nearest(totals: NDArray[np.float64]) -> Columns:
    """The identity with the most similar centre, and its cosine."""
    centres, numbers = centres_of(totals)
    nearest, cosine = np.full(len(totals), -1), np.full(len(totals), np.nan)
    if len(numbers) > 1:
        found = closest(centres)
        nearest[numbers], cosine[numbers] = numbers[found.other], found.cosine
    return {"nearest": nearest, "nearest_cosine": cosine}


def _at_rank_one(
    embeddings: NDArray[np.float32], identity: NDArray[np.int64], contexts: NDArray[np.float64]
) -> int:
    """How many images `(N, W)` have no context nearer than their own; one whose embedding is zero is none."""
    known = embeddings.any(axis=1)
    vectors, identity = unit_vectors(embeddings[known]), identity[known]
    own = (vectors * contexts[identity]).sum(axis=1)
    return int((~strays(vectors, identity, own, contexts, np.arange(len(contexts)))).sum())


def _identity_figures(identities: Columns, valid: NDArray[np.bool_]) -> dict[str, Any]:
    """Means over identities, and the shares of pairs and of identities with near-duplicates."""
    images = valid.sum(axis=1)
    pairs = images * (images - 1) // 2
    comparable = int((pairs > 0).sum())
    copies = identities["near_duplicates"]
    return {
        "embedding_diversity": 1 - _mean(identities["genuine_mean"]),
        "angular_spread": _mean(identities["spread"]),
        "centre_least": _mean(identities["centre_least"]),
        "pixel_diversity": _mean(identities["pixel_difference"]),
        "near_duplicate_fraction": copies.sum() / pairs.sum() if comparable else None,
        "collapsed_fraction": (copies > 0).sum() / comparable if comparable else None,
    }


def _uniqueness(totals: NDArray[np.float64], threshold: float) -> dict[str, Any]:
    """Distinct identities and capacity; none without a threshold."""
    centres, _ = centres_of(totals)
    if math.isnan(threshold) or not len(centres):
        return dict.fromkeys(("unique_identities", "unique_fraction", "capacity", "match_cosine"))
    found = crowding(centres, threshold)
    return {
        "unique_identities": found.distinct,
        "unique_fraction": found.distinct / len(totals),
        "capacity": found.capacity,
        "match_cosine": threshold,
    }


def _context_figures(contexts: NDArray[np.float32], images: Columns, banded: bool) -> dict[str, Any]:
    """How contexts cover the sphere and, where images were compared with them, how like them those are."""
    figures: dict[str, Any] = {
        "context_dimensions": effective_dimensions(contexts),
        "context_nearest_cosine": _mean(closest(contexts).cosine),
        "context_nearest_cosine_even": expected_nearest_cosine(*contexts.shape),
    }
    if "context_cosine" in images:
        figures["context_similarity"] = _mean(images["context_cosine"][images["valid"]])
    if banded:
        figures["out_of_band_fraction"] = (images["status"] == "out_of_band").mean()
    return figures


def _image_figures(images: Columns, classes: int) -> dict[str, Any]:
    """Quality, pose, detections and attributes, with the distributions of all that is a number."""
    found, valid = images["faces"] > 0, images["valid"]
    figures: dict[str, Any] = {
        "kept_images": valid.sum(),
        "kept_fraction": valid.mean(),
        "quality": _mean(images["quality"]),
        "detection_score": _mean(images["score"]),
        "several_faces_fraction": (images["faces"] > 1).sum() / found.sum() if found.any() else None,
        **{f"{angle}_deviation": _deviation(images[angle]) for angle in ("yaw", "pitch", "roll")},
    }
    if classes:
        figures |= _attribute_figures(images["attribute"], images["age"], classes)
    summaries = {name: summarise(images[name], limits) for name, limits in RANGES.items() if name in images}
    return figures | {"distributions": {name: each for name, each in summaries.items() if each is not None}}


def _attribute_figures(
    attribute: NDArray[np.float64], age: NDArray[np.float64], classes: int
) -> dict[str, Any]:
    """Counts of the classes and their evenness; where there are ages the classes are those of genderage."""
    aged = bool(np.isfinite(age).any())
    counts = np.bincount(attribute[np.isfinite(attribute)].astype(np.int64), minlength=classes)
    names = GENDERS if aged else tuple(map(str, range(classes)))
    figures = {"attributes": dict(zip(names, counts.tolist(), strict=True)), "evenness": evenness(counts)}
    return figures | ({"age": _mean(age)} if aged else {})


def _parts(spec: StageSpec, names: Mapping[str, Sequence[str]]) -> Iterator[_Part]:
    """Yield the extent a block of identities at a time, with the named arrays of each stage and all rows."""
    stages = {name: spec.input(name) for name in ("aligned", "embeddings")}
    identities, replicates = spec.config["identities"], spec.config["images"]
    grid = replace(stages["embeddings"].grid, identities=identities, replicates=replicates)
    for _, units in groupby(grid.units(), key=lambda unit: unit.identity_block):
        pieces = [_piece(stages, names, unit) for unit in units]
        start = pieces[0].identities[0]
        values = {
            name: np.concatenate([piece.values[name] for piece in pieces], axis=1)[
                : identities - start, :replicates
            ]
            for name in pieces[0].values
        }
        yield _Part(pieces[0].identities[: identities - start], values)


def _piece(stages: Mapping[str, StageSpec], names: Mapping[str, Sequence[str]], unit: Unit) -> _Part:
    """Read a unit: arrays, and rows as `(B, R)`; where stages have equal columns, those of the last stand."""
    values: Columns = {}
    identities = np.array(stages["embeddings"].grid.identities_of(unit), np.int64)
    for stage, spec in stages.items():
        rows = read_rows(spec, unit).sort_by([("identity", "ascending"), ("replicate", "ascending")])
        columns = zip(rows.column_names, rows.columns, strict=True)
        values |= {name: column.to_numpy().reshape(len(identities), -1) for name, column in columns}
        if stage in names:
            arrays = read_arrays(spec, unit)
            values |= {name: arrays[name] for name in names[stage]}
    return _Part(identities, values)


def _joined(parts: Sequence[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _row_means(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Means of the finite values of each row of `(B, R)`; NaN where there is none."""
    known = np.isfinite(values)
    count = known.sum(axis=1)
    return np.where(count > 0, np.where(known, values, 0).sum(axis=1) / np.maximum(count, 1), np.nan)


def _mean(values: NDArray[np.floating]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean(dtype=np.float64)) if len(finite) else math.nan


def _deviation(values: NDArray[np.floating]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.std(dtype=np.float64)) if len(finite) else math.nan


def _finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Python numbers in place of numpy's, and null in place of what is not finite, as JSON has it."""
    plain = {name: each.item() if isinstance(each, np.generic) else each for name, each in figures.items()}
    return {
        name: None if isinstance(each, float) and not math.isfinite(each) else each
        for name, each in plain.items()
    }

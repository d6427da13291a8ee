"""Stage `embeddings`: what networks see in each aligned crop.

The judge always; where they are given, the recogniser that conditions the generator, which says how like its
context an image is, a quality network, and an attribute network.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.config import BuildConfig, EmbeddingsConfig, ExecutionConfig
from negfacediff_core.errors import ConfigError, WeightsError
from negfacediff_core.faces.embed import Embedder
from negfacediff_core.faces.quality import GENDERS, attributes_of, genderage_crops, is_genderage
from negfacediff_core.stages.aligned import LANDMARKS, SIZE
from negfacediff_core.stages.contexts import contexts_of
from negfacediff_core.stages.models import (
    SCORERS,
    conditioner_hash,
    describe_device,
    embedder_of,
    faces_device_of,
    file_weight,
    named,
    network_weight,
    scorer_of,
)
from negfacediff_core.store.layout import ArraySpec, StageSpec, Unit, Weight
from negfacediff_core.store.records import Record
from negfacediff_core.store.shards import commit, read_arrays, read_rows
from negfacediff_core.store.tables import rows_of

VERSION = 2
# `status` is ok; skipped without a crop; failed where the judge's embedding is not finite or zero; and
# out_of_band where the image is not as similar to its context as the dataset asks, and so no part of it.
COLUMNS = (
    ("identity", "int64"),
    ("replicate", "int64"),
    ("embedder", "string"),
    ("norm", "float32"),
    ("status", "string"),
)
# By the role of the weight that makes them.
FURTHER_COLUMNS: dict[str, tuple[tuple[str, str], ...]] = {
    "recogniser": (("context_cosine", "float32"),),
    "quality": (("quality", "float32"),),
    "attributes": (("attribute", "int64"), ("age", "float32")),
}


def plan(build: BuildConfig, store: str, upstream: Mapping[str, StageSpec]) -> StageSpec:
    """Describe the stage; its networks are loaded. The judge must not be what conditions the generator."""
    settings, aligned, contexts = build.embeddings, upstream["aligned"], upstream["contexts"]
    weights = _weights(settings)
    judge = embedder_of(weights["judge"], threads=1)
    if judge.input_size != SIZE:
        raise WeightsError(
            f"the judge {weights['judge'].path} takes crops of {judge.input_size} pixels; give a recogniser "
            f"of {SIZE}x{SIZE} crops."
        )
    conditioner = conditioner_hash(build.samples.generator)
    if weights["judge"].sha256["file"] == conditioner:
        raise ConfigError(
            f"embeddings.judge is {settings.judge}, the very recogniser that the generator was trained with, "
            "which would judge its own work; give another one."
        )
    arrays = [ArraySpec("embedding", "f4", (judge.width,))]
    inputs = {"aligned": aligned.fingerprint}
    config: dict[str, Any] = {"flip": settings.flip}
    if "recogniser" in weights:
        width = contexts.arrays[0].item[0]
        _check_recogniser(settings, weights, conditioner, width)
        arrays.append(ArraySpec("context_embedding", "f4", (width,)))
        inputs["contexts"] = contexts.fingerprint
    if settings.banded:
        config |= {"band_low": settings.band_low, "band_high": settings.band_high}
    if "attributes" in weights:
        scorer = scorer_of(weights["attributes"], "attributes", threads=1)
        config["classes"] = len(GENDERS) if is_genderage(scorer) else scorer.width
        if is_genderage(scorer):
            inputs["samples"] = upstream["samples"].fingerprint  # it sees more than the crop
    further = [column for role in weights for column in FURTHER_COLUMNS.get(role, ())]
    return StageSpec(
        store=store,
        name="embeddings",
        version=VERSION,
        config=config,
        inputs=inputs,
        grid=aligned.grid,
        weights=weights,
        arrays=tuple(arrays),
        columns=(*COLUMNS, *further),
    )


def run_unit(spec: StageSpec, unit: Unit, execution: ExecutionConfig) -> Record:
    """Embed the crops of a unit, not normalised; without a face vectors are zero and numbers are missing."""
    started, begun = time.time(), time.perf_counter()
    aligned, where = spec.input("aligned"), (execution.threads_per_worker, faces_device_of(execution))
    crops, rows = read_arrays(aligned, unit)["image"], read_rows(aligned, unit)
    blocks = crops.shape[:2]
    crops = crops.reshape(-1, *crops.shape[2:])
    usable = np.array([status == "ok" for status in rows.column("status").to_pylist()])
    seconds = {"read": time.perf_counter() - begun}

    begun = time.perf_counter()
    embeddings = _embed(embedder_of(spec.weights["judge"], *where), crops, usable, spec.config["flip"])
    norms = np.linalg.norm(embeddings, axis=1)
    finite = np.isfinite(norms)
    embeddings[~finite] = 0
    arrays = {"embedding": embeddings}
    columns: dict[str, Any] = {
        "identity": rows.column("identity"),
        "replicate": rows.column("replicate"),
        "embedder": [Path(spec.weights["judge"].path).stem] * len(usable),
        "norm": np.where(finite, norms, 0),
    }
    status = np.where(usable, np.where(finite & (norms > 0), "ok", "failed"), "skipped").astype(object)
    if "recogniser" in spec.weights:
        # as contexts are made: the mirrored crop is the judge's option
        arrays["context_embedding"] = _embed(embedder_of(spec.weights["recogniser"], *where), crops, usable)
        cosine = _context_cosine(spec, unit, arrays["context_embedding"])
        columns["context_cosine"] = cosine
        if "band_low" in spec.config:
            inside = (cosine >= spec.config["band_low"]) & (cosine <= spec.config["band_high"])
            status[(status == "ok") & ~inside] = "out_of_band"
    if "quality" in spec.weights:
        quality = np.full(len(usable), np.nan, np.float32)
        quality[usable] = scorer_of(spec.weights["quality"], "quality", *where).score(crops[usable])[:, 0]
        columns["quality"] = quality
    if "attributes" in spec.weights:
        columns |= _attributes(spec, unit, crops, usable, rows, where)
    seconds["embed"] = time.perf_counter() - begun
    return commit(
        spec,
        unit,
        arrays={name: values.reshape(*blocks, -1) for name, values in arrays.items()},
        rows=rows_of(spec, {**columns, "status": status}),
        started=started,
        seconds=seconds,
        device=describe_device(where[1]),
    )


def _weights(settings: EmbeddingsConfig) -> dict[str, Weight]:
    """Find, hash and load the networks, by role."""
    weights = {}
    for role, path in (("judge", settings.judge), ("recogniser", settings.recogniser)):
        if path is not None:
            with named(f"embeddings.{role}"):
                weights[role] = network_weight(path, "recognition")
                embedder_of(weights[role], threads=1)
    for kind in SCORERS:
        path = getattr(settings, kind)
        if path is not None:
            with named(f"embeddings.{kind}"):
                weights[kind] = file_weight(path)
                scorer_of(weights[kind], kind, threads=1)
    return weights


def _check_recogniser(
    settings: EmbeddingsConfig, weights: Mapping[str, Weight], conditioner: str | None, width: int
) -> None:
    """Raise ConfigError or WeightsError unless the recogniser can be what the contexts came from."""
    given = weights["recogniser"].sha256["file"]
    if conditioner not in (None, given):
        raise ConfigError(
            f"embeddings.recogniser is {settings.recogniser}, but the generator was trained with another "
            "recogniser, whose embeddings mean something else; give that one."
        )
    if given == weights["judge"].sha256["file"]:
        raise ConfigError(
            f"embeddings.recogniser and embeddings.judge are both {settings.judge}: what conditions the "
            "generator would judge its own work; give another judge."
        )
    recogniser = embedder_of(weights["recogniser"], threads=1)
    if (recogniser.width, recogniser.input_size) != (width, SIZE):
        raise WeightsError(
            f"embeddings.recogniser: {weights['recogniser'].path} gives vectors of width {recogniser.width} "
            f"for crops of {recogniser.input_size} pixels, but contexts have width {width} and crops {SIZE} "
            "pixels; give the recogniser that the generator was trained with."
        )


def _embed(
    embedder: Embedder, crops: NDArray[np.uint8], usable: NDArray[np.bool_], flip: bool = False
) -> NDArray[np.float32]:
    """Embed the usable of N crops: `(N, width)`, zero for the others."""
    embeddings = np.zeros((len(crops), embedder.width), np.float32)
    if usable.any():
        embeddings[usable] = embedder.embed(crops[usable], flip=flip)
    return embeddings


def _context_cosine(spec: StageSpec, unit: Unit, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosine of each image `(N, W)` of a unit to the context of its identity; NaN where it is zero.

    What is not finite is set to zero in `embeddings`: such an image has no similarity.
    """
    embeddings[~np.isfinite(embeddings).all(axis=1)] = 0
    identities = np.array(spec.grid.identities_of(unit), np.int64)
    contexts = contexts_of(spec.input("contexts"), identities).repeat(spec.grid.block_replicates, axis=0)
    vectors = embeddings.astype(np.float64)
    length = np.linalg.norm(vectors, axis=1)
    length[length == 0] = np.nan
    return ((vectors * contexts).sum(axis=1) / length).astype(np.float32)


def _attributes(
    spec: StageSpec,
    unit: Unit,
    crops: NDArray[np.uint8],
    usable: NDArray[np.bool_],
    rows: Any,
    where: tuple[int, str],
) -> dict[str, Any]:
    """The columns `attribute`, null without a crop, and `age`, NaN where the network tells none.

    `where` is the number of threads and the device that the network runs on.
    """
    scorer = scorer_of(spec.weights["attributes"], "attributes", *where)
    seen = crops[usable]
    if is_genderage(scorer):
        images = read_arrays(spec.input("samples"), unit)["image"]
        points = np.stack([rows.column(name).to_numpy() for name in LANDMARKS], axis=1)
        seen = genderage_crops(
            images.reshape(-1, *images.shape[2:])[usable], points[usable].reshape(-1, 5, 2)
        )
    found = attributes_of(scorer, seen)
    attribute, age = np.full(len(usable), None, object), np.full(len(usable), np.nan, np.float32)
    attribute[usable] = found.attribute
    if found.age is not None:
        age[usable] = found.age
    return {"attribute": attribute, "age": age}

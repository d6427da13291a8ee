"""Stage `leakage`: thresholds from the gallery, and what of one build's extent reaches them, as one unit."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import ConfigError
from negfacediff_core.evaluation.leakage import (
    RATES,
    Neighbours,
    alike,
    calibrate,
    nearest,
    too_few_pairs,
)
from negfacediff_core.evaluation.leakage_report import Seen, describe, describe_together
from negfacediff_core.stages.neighbours import nearest_columns
from negfacediff_core.stages.stored_gallery import People, StoredGallery, people_of
from negfacediff_core.store.extents import read_column
from negfacediff_core.store.layout import Grid, StageSpec, Unit, Weight
from negfacediff_core.store.records import Record
from negfacediff_core.store.shards import commit, read_arrays, read_file
from negfacediff_core.store.tables import rows_of

VERSION = 1
REPORT = "report.json"


def plan(
    embeddings: StageSpec, neighbours: StageSpec, gallery: StageSpec, recognisers: Mapping[str, Weight]
) -> StageSpec:
    """Describe the stage for the images that `embeddings` calls ok; its extent is part of its fingerprint."""
    identities, images = embeddings.grid.identities, embeddings.grid.replicates
    return StageSpec(
        store=neighbours.store,
        name="leakage",
        version=VERSION,
        config={"rates": list(RATES), "identities": identities, "images": images},
        inputs={
            "embeddings": embeddings.fingerprint,
            "gallery": gallery.fingerprint,
            "neighbours": neighbours.fingerprint,
        },
        grid=Grid(identities, 1, identities, 1),
        columns=(("identity", "int64"), ("images", "int64"), *nearest_columns(recognisers)),
        per_replicate=False,
    )


def run_unit(spec: StageSpec, unit: Unit, execution: ExecutionConfig) -> Record:
    """Calibrate, find the identity centres' neighbours, and count; a row is an identity and its centre."""
    started, begun = time.time(), time.perf_counter()
    neighbours, gallery = spec.input("neighbours"), spec.input("gallery")
    extent, rates, people = _extent(spec), spec.config["rates"], people_of(gallery)
    valid = _valid(spec)
    faiss.omp_set_num_threads(execution.threads_per_worker)
    seen = {}
    for role in neighbours.weights:
        stored = StoredGallery(gallery, role)
        centres = _nearest_to_centres(neighbours, role, valid, stored)
        calibration = calibrate(stored, people.person, rates)
        seen[role] = Seen(_found(spec, role, valid), centres, calibration)
    report = {
        "identities": extent[0],
        "images": extent[0] * extent[1],
        "compared": int(valid.sum()),
        "gallery": _gallery(gallery, people),
        "recognisers": [
            {
                "recogniser": "/".join(Path(weight.path).parts[-2:]),
                "sha256": weight.sha256["file"],
                **describe(seen[role], rates, people.names),
            }
            for role, weight in neighbours.weights.items()
        ],
        "rates": describe_together(list(seen.values()), rates),
    }
    columns = {
        column: values
        for role, one in seen.items()
        for column, values in (
            (f"{role}_nearest", one.centres.row),
            (f"{role}_cosine", one.centres.cosine),
        )
    }
    rows = {"identity": np.arange(extent[0]), "images": valid.sum(axis=1), **columns}
    return commit(
        spec,
        unit,
        arrays={},
        rows=rows_of(spec, rows),
        started=started,
        seconds={"compare": time.perf_counter() - begun},
        device="cpu",
        files={REPORT: (json.dumps(report, indent=2, allow_nan=False) + "\n").encode()},
    )


def read_report(spec: StageSpec) -> dict[str, Any]:
    """Return the report of a committed stage: what `run_unit` counted."""
    return json.loads(read_file(spec, Unit(0, 0), REPORT))


def thresholds_at(report: Mapping[str, Any], rate: float) -> list[float]:
    """Return each recogniser's threshold at a rate; ConfigError, saying what it takes, if one has none."""
    found = []
    for recogniser in report["recognisers"]:
        row = next((row for row in recogniser["rates"] if row["fmr"] == rate), None)
        if row is None or row["threshold"] is None:
            raise ConfigError(too_few_pairs(recogniser["impostor_pairs"], rate))
        found.append(row["threshold"])
    return found


def leaking(spec: StageSpec, rate: float) -> pa.Table:
    """List the images of the extent that some recogniser finds alike to somebody in the gallery.

    A row holds `identity`, `replicate`, and for each recogniser `<role>_nearest`, the name of the gallery
    image, and `<role>_cosine`.
    """
    names, valid = people_of(spec.input("gallery")).names, _valid(spec)
    found = {role: _found(spec, role, valid) for role in spec.input("neighbours").weights}
    thresholds = thresholds_at(read_report(spec), rate)
    flagged = np.logical_or.reduce(
        [alike(one.cosine, threshold) for one, threshold in zip(found.values(), thresholds, strict=True)]
    )
    identity, replicate = np.nonzero(flagged)
    columns: dict[str, Any] = {"identity": identity, "replicate": replicate}
    for role, one in found.items():
        columns[f"{role}_nearest"] = pa.array([names[row] for row in one.row[flagged]], pa.string())
        columns[f"{role}_cosine"] = one.cosine[flagged]
    return pa.table(columns)


def _extent(spec: StageSpec) -> tuple[int, int]:
    return spec.config["identities"], spec.config["images"]


def _valid(spec: StageSpec) -> NDArray[np.bool_]:
    """Which images `(I, R)` of the dataset could be compared."""
    extent = _extent(spec)
    compared = read_column(spec.input("neighbours"), "status", *extent) == "ok"
    return compared & (read_column(spec.input("embeddings"), "status", *extent) == "ok")


def _found(spec: StageSpec, role: str, valid: NDArray[np.bool_]) -> Neighbours:
    """The neighbours of the images `(I, R)`; of those that are not valid none."""
    stored, extent = spec.input("neighbours"), _extent(spec)
    row = read_column(stored, f"{role}_nearest", *extent)
    cosine = read_column(stored, f"{role}_cosine", *extent)
    return Neighbours(np.where(valid, row, -1), np.where(valid, cosine, np.nan))


def _nearest_to_centres(
    neighbours: StageSpec, role: str, valid: NDArray[np.bool_], gallery: StoredGallery
) -> Neighbours:
    """Search for the centre of each identity: the direction of the sum of its images' unit embeddings.

    Identities without an image, or whose images cancel out, have none.
    """
    identities, replicates = valid.shape
    name = f"{role}_embedding"
    width = next(array.item[0] for array in neighbours.arrays if array.name == name)
    totals = np.zeros((identities, width))
    grid = Grid(identities, replicates, neighbours.grid.block_identities, neighbours.grid.block_replicates)
    for unit in grid.units():
        first, start = grid.identities_of(unit).start, grid.replicates_of(unit).start
        vectors = read_arrays(neighbours, unit)[name][: identities - first, : replicates - start]
        kept = valid[first : first + vectors.shape[0], start : start + vectors.shape[1], None]
        vectors = np.where(kept, vectors, 0).astype(np.float64)
        lengths = np.linalg.norm(vectors, axis=2, keepdims=True)
        totals[first : first + len(vectors)] += (vectors / np.where(kept, lengths, 1)).sum(axis=1)
    lengths = np.linalg.norm(totals, axis=1)
    present = lengths > 1e-9
    row, cosine = np.full(identities, -1), np.full(identities, np.nan)
    centres = (totals[present] / lengths[present, None]).astype(np.float32)
    row[present], cosine[present] = nearest(centres, gallery)
    return Neighbours(row, cosine)


def _gallery(gallery: StageSpec, people: People) -> dict[str, Any]:
    faces = people.person[people.person >= 0]
    return {
        "images": len(people.person),
        "faces": len(faces),
        "people": len(np.unique(faces)),
        "sha256": next(iter(gallery.weights["gallery"].sha256.values())),
    }

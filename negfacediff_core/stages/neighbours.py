"""Stage `neighbours`: of every generated image the most similar one of a gallery, to each recogniser."""

import time
from collections.abc import Iterable, Mapping

import faiss
import numpy as np

from negfacediff_core.config import ExecutionConfig
from negfacediff_core.contexts.vectors import normalise
from negfacediff_core.evaluation.leakage import nearest
from negfacediff_core.stages.models import embedder_of
from negfacediff_core.stages.stored_gallery import StoredGallery
from negfacediff_core.store.layout import StageSpec, Unit, Weight
from negfacediff_core.store.records import Record
from negfacediff_core.store.shards import commit, read_arrays, read_rows
from negfacediff_core.store.tables import rows_of

VERSION = 1


def plan(aligned: StageSpec, gallery: StageSpec, recognisers: Mapping[str, Weight]) -> StageSpec:
    """Describe the stage for the crops of `aligned`, with its extent; `recognisers` by role, as the
    gallery's.
    """
    return StageSpec(
        store=aligned.store,
        name="neighbours",
        version=VERSION,
        config={},
        inputs={"aligned": aligned.fingerprint, "gallery": gallery.fingerprint},
        grid=aligned.grid,
        weights=dict(recognisers),
        arrays=gallery.arrays,
        columns=(
            ("identity", "int64"),
            ("replicate", "int64"),
            *nearest_columns(recognisers),
            ("status", "string"),
        ),
    )


def nearest_columns(recognisers: Iterable[str]) -> list[tuple[str, str]]:
    """Return what a row says of its nearest face of the gallery, to the recognisers in these roles."""
    return [
        column
        for role in recognisers
        for column in ((f"{role}_nearest", "int64"), (f"{role}_cosine", "float64"))
    ]


def run_unit(spec: StageSpec, unit: Unit, execution: ExecutionConfig) -> Record:
    """Embed the crops of a unit and search for each; the nearest is -1 where an image shows no face."""
    started = time.time()
    seconds = {"read": 0.0, "embed": 0.0, "search": 0.0}

    def spent(phase: str, since: float) -> float:
        now = time.perf_counter()
        seconds[phase] += now - since
        return now

    clock = time.perf_counter()
    aligned, gallery = spec.input("aligned"), spec.input("gallery")
    crops, rows = read_arrays(aligned, unit)["image"], read_rows(aligned, unit)
    flat = crops.reshape(-1, *crops.shape[2:])
    usable = np.array(rows.column("status").to_pylist()) == "ok"
    clock = spent("read", clock)

    faiss.omp_set_num_threads(execution.threads_per_worker)
    seen = usable.copy()
    arrays = {}
    for role, weight in spec.weights.items():
        embedder = embedder_of(weight, execution.threads_per_worker)
        embeddings = np.zeros((len(flat), embedder.width), np.float32)
        if usable.any():
            embeddings[usable] = embedder.embed(flat[usable])
        lengths = np.linalg.norm(embeddings, axis=1)
        seen &= np.isfinite(lengths) & (lengths > 0)
        arrays[f"{role}_embedding"] = embeddings
    clock = spent("embed", clock)

    columns: dict[str, object] = {
        "identity": rows.column("identity"),
        "replicate": rows.column("replicate"),
        "status": np.where(seen, "ok", np.where(usable, "failed", "skipped")),
    }
    for role in spec.weights:
        embeddings = arrays[f"{role}_embedding"]
        embeddings[~seen] = 0
        row, cosine = np.full(len(flat), -1), np.full(len(flat), np.nan)
        row[seen], cosine[seen] = nearest(normalise(embeddings[seen]), StoredGallery(gallery, role))
        columns |= {f"{role}_nearest": row, f"{role}_cosine": cosine}
    spent("search", clock)
    shape = crops.shape[:2]
    return commit(
        spec,
        unit,
        arrays={name: embeddings.reshape(*shape, -1) for name, embeddings in arrays.items()},
        rows=rows_of(spec, columns),
        started=started,
        seconds=seconds,
        device="cpu",
    )

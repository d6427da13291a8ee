"""Stage `embeddings`: what the judge sees in each aligned crop."""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.errors import ConfigError, WeightsError
from negfacediff_core.stages.aligned import SIZE
from negfacediff_core.stages.models import conditioner_hash, embedder_of, named, network_weight
from negfacediff_core.store.layout import ArraySpec, StageSpec, Unit
from negfacediff_core.store.records import Record
from negfacediff_core.store.shards import commit, read_arrays, read_rows
from negfacediff_core.store.tables import rows_of

VERSION = 1
COLUMNS = (
    ("identity", "int64"),
    ("replicate", "int64"),
    ("embedder", "string"),
    ("norm", "float32"),
    ("status", "string"),
)


def plan(build: BuildConfig, store: str, upstream: Mapping[str, StageSpec]) -> StageSpec:
    """Describe the stage; the judge is loaded, and must not be what conditions the generator."""
    settings, aligned = build.embeddings, upstream["aligned"]
    with named("embeddings.judge"):
        weight = network_weight(settings.judge, "recognition")
        judge = embedder_of(weight, threads=1)
    if judge.input_size != SIZE:
        raise WeightsError(
            f"the judge {weight.path} takes crops of {judge.input_size} pixels; give a recogniser of "
            f"{SIZE}x{SIZE} crops."
        )
    if weight.sha256["file"] == conditioner_hash(build.samples.generator):
        raise ConfigError(
            f"embeddings.judge is {settings.judge}, the very recogniser that the generator was trained with, "
            "which would judge its own work; give another one."
        )
    return StageSpec(
        store=store,
        name="embeddings",
        version=VERSION,
        config={"flip": settings.flip},
        inputs={"aligned": aligned.fingerprint},
        grid=aligned.grid,
        weights={"judge": weight},
        arrays=(ArraySpec("embedding", "f4", (judge.width,)),),
        columns=COLUMNS,
    )


def run_unit(spec: StageSpec, unit: Unit, execution: ExecutionConfig) -> Record:
    """Embed the crops of a unit as the judge does, not normalised; without a face the vector is zero."""
    started, begun = time.time(), time.perf_counter()
    aligned = spec.input("aligned")
    crops, rows = read_arrays(aligned, unit)["image"], read_rows(aligned, unit)
    judge = embedder_of(spec.weights["judge"], execution.threads_per_worker)
    seconds = {"read": time.perf_counter() - begun}

    begun = time.perf_counter()
    usable = np.array([status == "ok" for status in rows.column("status").to_pylist()])
    embeddings = np.zeros((len(usable), *spec.arrays[0].item), np.float32)
    if usable.any():
        embeddings[usable] = judge.embed(
            crops.reshape(-1, *crops.shape[2:])[usable], flip=spec.config["flip"]
        )
    norms = np.linalg.norm(embeddings, axis=1)
    finite = np.isfinite(norms)
    embeddings[~finite] = 0
    status = np.where(usable, np.where(finite & (norms > 0), "ok", "failed"), "skipped")
    seconds["embed"] = time.perf_counter() - begun
    return commit(
        spec,
        unit,
        arrays={"embedding": embeddings.reshape(*crops.shape[:2], -1)},
        rows=rows_of(
            spec,
            {
                "identity": rows.column("identity"),
                "replicate": rows.column("replicate"),
                "embedder": [Path(spec.weights["judge"].path).stem] * len(usable),
                "norm": np.where(finite, norms, 0),
                "status": status,
            },
        ),
        started=started,
        seconds=seconds,
        device="cpu",
    )

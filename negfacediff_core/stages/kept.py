"""What a leakage gate drops: a copy of the stage `embeddings` in which the images that leak are marked.

Nothing that is committed changes: the copy lies beside the stage that it was made from, and what is made from
the copy leaves the marked images out, as it does those without a face.
"""

import time
from collections.abc import Mapping

import numpy as np

from negfacediff_core.config import BuildConfig
from negfacediff_core.evaluation.leakage import alike
from negfacediff_core.stages.build import STAGES
from negfacediff_core.stages.leakage import read_report, thresholds_at
from negfacediff_core.store.layout import StageSpec, Unit, adopt
from negfacediff_core.store.records import Record
from negfacediff_core.store.shards import commit, read_arrays, read_rows
from negfacediff_core.store.tables import rows_of

LEAKED = "leaked"


def plan(embeddings: StageSpec, leakage: StageSpec, rate: float) -> StageSpec:
    """Describe the copy of `embeddings`, with its extent, in which images that leak at a rate are marked."""
    return StageSpec(
        store=embeddings.store,
        name="embeddings",
        version=embeddings.version,
        config={**embeddings.config, "leakage_fmr": rate},
        inputs={
            **embeddings.inputs,
            "embeddings": embeddings.fingerprint,
            "leakage": leakage.fingerprint,
        },
        grid=embeddings.grid,
        weights=embeddings.weights,
        arrays=embeddings.arrays,
        columns=embeddings.columns,
    )


def mark_unit(spec: StageSpec, unit: Unit) -> Record:
    """Copy a unit of embeddings, with the status LEAKED where an image that was ok is dropped."""
    started, begun = time.time(), time.perf_counter()
    source, leakage = spec.input("embeddings"), spec.input("leakage")
    rows = read_rows(source, unit)
    found = read_rows(leakage.input("neighbours"), unit)
    leaked = np.zeros(rows.num_rows, bool)
    thresholds = thresholds_at(read_report(leakage), spec.config["leakage_fmr"])
    for role, threshold in zip(leakage.input("neighbours").weights, thresholds, strict=True):
        leaked |= alike(found.column(f"{role}_cosine").to_numpy(), threshold)
    status = np.array(rows.column("status").to_pylist())
    marked = np.where(leaked & (status == "ok"), LEAKED, status)
    columns = {name: rows.column(name) for name in rows.column_names} | {"status": marked}
    return commit(
        spec,
        unit,
        arrays=read_arrays(source, unit),
        rows=rows_of(spec, columns),
        started=started,
        seconds={"mark": time.perf_counter() - begun},
        device="cpu",
    )


def remake(build: BuildConfig, stages: Mapping[str, StageSpec], kept: StageSpec) -> dict[str, StageSpec]:
    """Return the stages that are made anew when `kept` takes the place of `embeddings`, which comes first.

    `build` is that of the run, and `stages` are its stages.
    """
    specs, names = {**stages, kept.name: kept}, list(STAGES)
    later = names[names.index(kept.name) + 1 :]
    for name in later:
        specs[name] = adopt(STAGES[name].plan(build, kept.store, specs))
    return {name: specs[name] for name in (kept.name, *later)}

"""Stage `contexts`: one unit vector an identity, drawn, read, or embedded.

Contexts that depend on each other, packed or kept apart, are made together, in one unit.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.contexts import (
    REDRAWN,
    SOURCES,
    Contexts,
    Given,
    Unique,
    check_contexts,
    check_distinct,
    check_enough,
    check_possible,
    closest,
    draw_unique,
)
from negfacediff_core.errors import ContextsError, WeightsError
from negfacediff_core.stages.context_sources import given_of, settings_of, weights_of
from negfacediff_core.stages.models import (
    describe_device,
    device_of,
    generator_of,
    generator_weight,
    named,
)
from negfacediff_core.store.layout import ArraySpec, Grid, StageSpec, Unit, read_spec
from negfacediff_core.store.location import locate
from negfacediff_core.store.records import Record
from negfacediff_core.store.runs import read_run
from negfacediff_core.store.shards import commit, read_arrays
from negfacediff_core.store.tables import rows_of

VERSION = 1
BLOCK = 1024
# Embedding or making images takes a block of them minutes, where drawing vectors takes no time.
BLOCK_OF_IMAGES = 64
COLUMNS = (("identity", "int64"), ("source", "string"), ("norm", "float32"))
# Of contexts that are made together: draws thrown away before this one, and the cosine to the nearest other.
JOINT_COLUMNS = (*COLUMNS, ("attempts", "int64"), ("nearest", "float32"))


def plan(build: BuildConfig, store: str, upstream: Mapping[str, StageSpec]) -> StageSpec:
    """Describe the stage; loads the generator, whose context width counts, and what the source reads.

    The extent covers the pool of negatives too. A file, a folder, and contexts that are made together limit
    how many identities there are.
    """
    settings = build.contexts
    with named("samples.generator"):
        width = generator_of(generator_weight(build.samples.generator), "cpu").context_width
    if width == 0:
        raise WeightsError(
            f"the generator {build.samples.generator} takes no identity contexts: it is unconditional, or of "
            "numbered classes; give one that was trained with the vectors of a recogniser."
        )
    identities = max(build.identities, build.negatives.pool)
    weights = weights_of(build)
    spec = StageSpec(
        store=store,
        name="contexts",
        version=VERSION,
        config={"source": settings.source, "width": width, **settings_of(settings)},
        inputs={},
        grid=Grid(identities, 1, BLOCK_OF_IMAGES if "recogniser" in weights else BLOCK, 1),
        weights=weights,
        arrays=(ArraySpec("context", "f4", (width,)),),
        columns=JOINT_COLUMNS if settings.joint else COLUMNS,
        per_replicate=False,
    )
    if settings.joint:
        spec = _together(spec, _count_of(build, spec, identities))
    given = given_of(spec, "cpu", 0, 1)
    return replace(spec, grid=replace(spec.grid, limit=_check(spec, given)))


def run_unit(spec: StageSpec, unit: Unit, execution: ExecutionConfig) -> Record:
    """Make the contexts of a unit's identities."""
    started, begun = time.time(), time.perf_counter()
    identities = np.array(spec.grid.identities_of(unit), np.int64)
    device = device_of(execution.device) if "generator" in spec.weights else "cpu"
    given = given_of(spec, device, execution.batch_size, execution.threads_per_worker)
    columns: dict[str, object] = {}
    if "count" in spec.config:
        contexts, attempts = _draw_together(spec, given)
        columns = {"attempts": attempts, "nearest": closest(contexts).cosine}
    else:
        contexts = _draw(spec, given, identities, np.zeros_like(identities))
    check_contexts(contexts, spec.config["width"])
    columns |= {
        "identity": identities,
        "source": [spec.config["source"]] * len(identities),
        "norm": np.linalg.norm(contexts, axis=1),
    }
    return commit(
        spec,
        unit,
        arrays={"context": contexts},
        rows=rows_of(spec, columns),
        started=started,
        seconds={"draw": time.perf_counter() - begun},
        device=describe_device(device),
    )


def contexts_of(spec: StageSpec, identities: NDArray[np.int64]) -> Contexts:
    """Return the stored contexts `(N, W)` of identity numbers `(N,)`; StoreError if one is not committed."""
    blocks, rows = np.divmod(identities, spec.grid.block_identities)
    contexts = np.empty((len(identities), *spec.arrays[0].item), np.float32)
    for block in np.unique(blocks):
        chosen = blocks == block
        contexts[chosen] = _stored(spec.store, spec.fingerprint, int(block))[rows[chosen]]
    return contexts


@lru_cache(maxsize=64)
def _stored(store: str, digest: str, block: int) -> Contexts:
    """A whole unit's contexts: every worker needs those of the pool again and again."""
    return read_arrays(read_spec(store, "contexts", digest), Unit(block, 0))["context"]


def _draw(
    spec: StageSpec, given: Given, identities: NDArray[np.int64], attempts: NDArray[np.int64]
) -> Contexts:
    return SOURCES[spec.config["source"]](spec.config.get("seed", 0), identities, attempts, given)


def _draw_together(spec: StageSpec, given: Given) -> Unique:
    """Make all contexts of a stage whose contexts depend on each other."""
    count, max_cosine = spec.config["count"], spec.config.get("max_cosine", 1.0)
    if spec.config["source"] in REDRAWN:
        return draw_unique(partial(_draw, spec, given), count, max_cosine)
    attempts = np.zeros(count, np.int64)
    contexts = _draw(spec, given, np.arange(count), attempts)
    if max_cosine < 1:
        check_distinct(contexts, max_cosine)
    return Unique(contexts, attempts)


def _check(spec: StageSpec, given: Given) -> int | None:
    """Check what can be checked before contexts are made; returns how many there can be (None: no limit)."""
    config, wanted = spec.config, spec.config.get("count", spec.grid.identities)
    if "max_cosine" in config:
        check_possible(config["count"], given.width, config["max_cosine"])
    if "contexts" in spec.weights:  # what is wrong with a file shows when one is drawn from it
        _draw(spec, given, np.zeros(1, np.int64), np.zeros(1, np.int64))
    there = None
    if given.folder is not None:
        there = len(given.folder.names)
        if there < wanted:
            raise ContextsError(
                f"{wanted} identities were asked for but {spec.weights['folder'].path} holds images of "
                f"{there}: ask for fewer identities or bring more images"
            )
    if config["source"] == "file" and given.reference is not None:
        there = len(given.reference)
        check_enough(there, wanted)
        if "max_cosine" in config:
            check_distinct(given.reference[:wanted], config["max_cosine"])
    return config.get("count", there)


def _count_of(build: BuildConfig, spec: StageSpec, identities: int) -> int:
    """How many contexts are made together: the build's own choice, that of the run of its name, or all.

    Raises ContextsError where that is fewer than the build needs: contexts that were made together stay.
    """
    count = build.contexts.count
    if not count:
        count = identities
        run = read_run(spec.store, build.name)
        digest = None if run is None else run["stages"].get("contexts", {}).get("fingerprint")
        if digest and locate(spec.store).at(f"contexts/{digest}").exists("stage.json"):
            before = read_spec(spec.store, "contexts", digest).config.get("count")
            if before and _together(spec, before).fingerprint == digest:
                count = before
    if count < identities:
        raise ContextsError(
            f"{identities} identities are needed (the pool of negatives among them) but {count} contexts are "
            f"made together, which are packed or kept apart, so that none can be added: ask for {count} or "
            "fewer, or give a new dataset its own name and contexts.count"
        )
    return count


def _together(spec: StageSpec, count: int) -> StageSpec:
    """The stage as one unit of `count` identities."""
    block = -(-count // BLOCK) * BLOCK
    return replace(
        spec,
        config={**spec.config, "count": count},
        grid=replace(spec.grid, block_identities=block, limit=count),
    )

"""Stage `contexts`: one unit vector an identity, drawn or read, in units of 1,024 identities."""

import time
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.contexts import SOURCES, check_contexts, load_contexts
from negfacediff_core.errors import WeightsError
from negfacediff_core.stages.models import check_unchanged, file_weight, generator_of, generator_weight
from negfacediff_core.store.layout import ArraySpec, Grid, StageSpec, Unit, read_spec
from negfacediff_core.store.records import Record
from negfacediff_core.store.shards import commit, read_arrays
from negfacediff_core.store.tables import rows_of

VERSION = 1
BLOCK = 1024
COLUMNS = (("identity", "int64"), ("source", "string"), ("norm", "float32"))


def plan(build: BuildConfig, store: str, upstream: Mapping[str, StageSpec]) -> StageSpec:
    """Describe the stage; loads the generator, whose context width counts, and checks the contexts file.

    The extent covers the pool of negatives too. A contexts file limits how many identities there are.
    """
    settings = build.contexts
    width = generator_of(generator_weight(build.samples.generator), "cpu").context_width
    if width == 0:
        raise WeightsError(
            f"the generator {build.samples.generator} is unconditional: it takes no identity contexts; give "
            "one that was trained with contexts."
        )
    identities = max(build.identities, build.negatives.pool)
    config: dict[str, object] = {"source": settings.source, "width": width}
    weights, limit = {}, None
    if settings.file is not None:
        weights["contexts"] = file_weight(settings.file)
    if settings.source == "file":
        stored = load_contexts(weights["contexts"].path).contexts
        check_contexts(stored, width, identities)
        limit = len(stored)
    else:
        config["seed"] = settings.seed
    spec = StageSpec(
        store=store,
        name="contexts",
        version=VERSION,
        config=config,
        inputs={},
        grid=Grid(identities, 1, BLOCK, 1, limit),
        weights=weights,
        arrays=(ArraySpec("context", "f4", (width,)),),
        columns=COLUMNS,
        per_replicate=False,
    )
    _draw(spec, np.zeros(1, np.int64))  # a source that cannot be drawn from says so now
    return spec


def run_unit(spec: StageSpec, unit: Unit, execution: ExecutionConfig) -> Record:
    """Draw the contexts of a unit's identities."""
    started, begun = time.time(), time.perf_counter()
    identities = np.array(spec.grid.identities_of(unit), np.int64)
    contexts = _draw(spec, identities)
    check_contexts(contexts, spec.config["width"])
    rows = rows_of(
        spec,
        {
            "identity": identities,
            "source": [spec.config["source"]] * len(identities),
            "norm": np.linalg.norm(contexts, axis=1),
        },
    )
    seconds = {"draw": time.perf_counter() - begun}
    return commit(
        spec, unit, arrays={"context": contexts}, rows=rows, started=started, seconds=seconds, device="cpu"
    )


def contexts_of(spec: StageSpec, identities: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the stored contexts `(N, W)` of identity numbers `(N,)`; StoreError if one is not committed."""
    blocks, rows = np.divmod(identities, spec.grid.block_identities)
    contexts = np.empty((len(identities), *spec.arrays[0].item), np.float32)
    for block in np.unique(blocks):
        chosen = blocks == block
        contexts[chosen] = _stored(spec.store, spec.fingerprint, int(block))[rows[chosen]]
    return contexts


@lru_cache(maxsize=64)
def _stored(store: str, digest: str, block: int) -> NDArray[np.float32]:
    """A whole unit's contexts: every worker needs those of the pool again and again."""
    return read_arrays(read_spec(store, "contexts", digest), Unit(block, 0))["context"]


def _draw(spec: StageSpec, identities: NDArray[np.int64]) -> NDArray[np.float32]:
    weight = spec.weights.get("contexts")
    if weight is not None:
        check_unchanged(weight)
    source = SOURCES[spec.config["source"]]
    return source(
        spec.config.get("seed", 0), identities, spec.config["width"], weight.path if weight else None
    )

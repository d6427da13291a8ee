"""Stage `negatives`: which other identity each identity is pushed away from."""

import time
from collections.abc import Mapping

import numpy as np

from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.errors import ConfigError
from negfacediff_core.negatives import check_negatives, mine
from negfacediff_core.stages.contexts import contexts_of
from negfacediff_core.store.layout import Grid, StageSpec, Unit
from negfacediff_core.store.records import Record
from negfacediff_core.store.shards import commit
from negfacediff_core.store.tables import rows_of

VERSION = 1
COLUMNS = (("identity", "int64"), ("negative", "int64"), ("rule", "string"), ("cosine", "float32"))

# What each rule depends on beside the contexts; the rest must not move its results to another place.
OPTIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "null": (),
    "rand": ("pool", "rand", "seed"),
    "close": ("pool",),
    "mid": ("pool", "mid"),
    "far": ("pool",),
}


def plan(build: BuildConfig, store: str, upstream: Mapping[str, StageSpec]) -> StageSpec:
    """Describe the stage; `build.negatives.pool` must have been resolved to a number of identities."""
    settings, contexts = build.negatives, upstream["contexts"]
    if settings.pool < 2 and OPTIONS[settings.rule]:
        raise ConfigError(
            f"negatives.pool is {settings.pool}, but the rule {settings.rule} picks another identity out of "
            "it; set it to 2 or more."
        )
    options = {option: getattr(settings, option) for option in OPTIONS[settings.rule]}
    grid = contexts.grid
    return StageSpec(
        store=store,
        name="negatives",
        version=VERSION,
        config={"rule": settings.rule, **options},
        inputs={"contexts": contexts.fingerprint},
        grid=Grid(build.identities, 1, grid.block_identities, 1, grid.limit),
        columns=COLUMNS,
        per_replicate=False,
    )


def run_unit(spec: StageSpec, unit: Unit, execution: ExecutionConfig) -> Record:
    """Mine the negatives of a unit's identities in the pool."""
    started, begun = time.time(), time.perf_counter()
    options = dict(spec.config)
    rule, pool, seed = options.pop("rule"), options.pop("pool", 0), options.pop("seed", 0)
    identities = np.array(spec.grid.identities_of(unit), np.int64)
    stored = spec.input("contexts")
    candidates = contexts_of(stored, np.arange(pool)) if pool else None
    found = mine(contexts_of(stored, identities), candidates, rule, seed, identities=identities, **options)
    if pool:
        check_negatives(found.index, identities, pool)
    rows = rows_of(
        spec,
        {
            "identity": identities,
            "negative": found.index,
            "rule": [rule] * len(identities),
            "cosine": found.cosine,
        },
    )
    seconds = {"mine": time.perf_counter() - begun}
    return commit(spec, unit, arrays={}, rows=rows, started=started, seconds=seconds, device="cpu")

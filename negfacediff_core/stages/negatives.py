"""Stage `negatives`: which other identities each identity is pushed away from, how close and how weighted."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.errors import ConfigError
from negfacediff_core.negatives import Negatives, check_negatives, mine
from negfacediff_core.stages.contexts import contexts_of
from negfacediff_core.store.layout import ArraySpec, Grid, StageSpec, Unit
from negfacediff_core.store.records import Record
from negfacediff_core.store.shards import commit, read_arrays
from negfacediff_core.store.tables import rows_of

VERSION = 2
# `negative` and `cosine` of a row are those of the first; the arrays hold all.
COLUMNS = (("identity", "int64"), ("negative", "int64"), ("rule", "string"), ("cosine", "float32"))

# What each rule depends on beside the contexts; the rest must not move its results to another place.
OPTIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "null": (),
    "rand": ("pool", "count", "rand", "seed"),
    "close": ("pool", "count"),
    "mid": ("pool", "count", "mid"),
    "far": ("pool", "count"),
}


def plan(build: BuildConfig, store: str, upstream: Mapping[str, StageSpec]) -> StageSpec:
    """Describe the stage; `build.negatives.pool` must have been resolved to a number of identities."""
    settings, contexts = build.negatives, upstream["contexts"]
    options = {option: getattr(settings, option) for option in OPTIONS[settings.rule]}
    if options.get("rand") == "ring":
        del options["seed"]  # nothing is drawn
    count = options.get("count", 1)
    if options and settings.pool < count + 1:
        raise ConfigError(
            f"negatives.pool is {settings.pool}, but the rule {settings.rule} picks {count} other "
            f"identit{'ies' if count > 1 else 'y'} out of it; set it to {count + 1} or more"
            + (", or negatives.count to fewer." if count > 1 else ".")
        )
    if count > 1:
        options["weights"] = settings.weights
    grid = contexts.grid
    return StageSpec(
        store=store,
        name="negatives",
        version=VERSION,
        config={"rule": settings.rule, **options},
        inputs={"contexts": contexts.fingerprint},
        grid=Grid(build.identities, 1, grid.block_identities, 1, grid.limit),
        arrays=(
            ArraySpec("negative", "i8", (count,)),
            ArraySpec("cosine", "f4", (count,)),
            ArraySpec("weight", "f4", (count,)),
        ),
        columns=COLUMNS,
        per_replicate=False,
    )


def run_unit(spec: StageSpec, unit: Unit, execution: ExecutionConfig) -> Record:
    """Mine the negatives of a unit's identities in the pool, which is read from the store block by block."""
    started, begun = time.time(), time.perf_counter()
    options = dict(spec.config)
    rule, pool, seed = options.pop("rule"), options.pop("pool", 0), options.pop("seed", 0)
    identities = np.array(spec.grid.identities_of(unit), np.int64)
    stored = spec.input("contexts")
    candidates = StoredPool(stored, pool) if pool else None
    found = mine(contexts_of(stored, identities), candidates, rule, seed, identities=identities, **options)
    rows = rows_of(
        spec,
        {
            "identity": identities,
            "negative": found.index[:, 0],
            "rule": [rule] * len(identities),
            "cosine": found.cosine[:, 0],
        },
    )
    return commit(
        spec,
        unit,
        arrays={"negative": found.index, "cosine": found.cosine, "weight": found.weight},
        rows=rows,
        started=started,
        seconds={"mine": time.perf_counter() - begun},
        device="cpu",
    )


@dataclass(frozen=True)
class StoredPool:
    """The first `identities` stored contexts as a pool to mine in: reads what is asked for, and no more."""

    contexts: StageSpec
    identities: int

    @property
    def shape(self) -> tuple[int, int]:
        """Identities and width."""
        return self.identities, self.contexts.arrays[0].item[0]

    def __getitem__(self, rows: slice) -> NDArray[np.float32]:
        return contexts_of(self.contexts, np.arange(*rows.indices(self.identities)))


def stored_negatives(spec: StageSpec, identities: NDArray[np.int64]) -> Negatives:
    """Return the stored negatives `(N, count)` of identity numbers `(N,)`.

    Raises StoreError if a unit is not committed or is damaged, ContextsError if its map points outside the
    pool or an identity at itself.
    """
    blocks, rows = np.divmod(identities, spec.grid.block_identities)
    values = {array.name: np.empty((len(rows), *array.item), array.dtype) for array in spec.arrays}
    for block in np.unique(blocks):
        chosen = blocks == block
        for name, stored in read_arrays(spec, Unit(int(block), 0)).items():
            values[name][chosen] = stored[rows[chosen]]
    check_negatives(values["negative"], identities, spec.config.get("pool", 0))
    return Negatives(values["negative"], values["cosine"], values["weight"])

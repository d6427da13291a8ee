"""How large the stages of a build are: units, rows and bytes, before any of it is made."""

from dataclasses import dataclass, replace

import numpy as np

from negfacediff_core.config import BuildConfig
from negfacediff_core.stages import aligned, contexts, embeddings, evaluation, negatives, samples, scores
from negfacediff_core.stages.build import STAGES
from negfacediff_core.store.layout import ArraySpec, Grid, StageSpec
from negfacediff_core.store.records import committed

# What is on disk of an array's bytes, by stage: measured on the images of the demo pack, of 64 x 64 pixels
# (samples .983-.989, aligned .90-.91, embeddings .90-.92). Contexts drawn at random hardly shrink; negatives
# are mostly zeros.
COMPRESSED = {"contexts": 0.92, "negatives": 0.22, "samples": 0.985, "aligned": 0.91, "embeddings": 0.92}
# Of a unit's rows and record (measured: a record has 490 to 1,050 bytes): bytes of a column whatever it
# holds, of a row of numbers, and of the record.
COLUMN_BYTES, VALUE_BYTES, RECORD_BYTES = 230, 3.5, 600
# A unit's further files (measured): the report and pictures of the evaluation, the bins of a part's scores.
FILES_BYTES = {"evaluation": 1_200_000, "scores": 700_000}
# What the first part of a band has besides (measured): moments of embeddings of 512 numbers.
FIRST_PART_BYTES = {"scores": 2_200_000}
# The share by which the bytes on disk may differ from what is foretold.
BYTES_TOLERANCE = 0.2

# The sizes of a release of IDiff-Face and of recognisers as they are used with it (arXiv 2308.04995).
WIDTH, IMAGE_SIZE = 512, 128

Columns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class StageSize:
    """A stage of a build: its `units` and `rows`, `bytes` on disk, and how many units are `done`."""

    stage: str
    units: int
    rows: int
    bytes: int
    done: int


def size_of(spec: StageSpec, known: bool = True) -> StageSize:
    """Return the size of a stage, and what of it the store holds already (nothing where it is not `known`
    which directory that would be).
    """
    units = spec.grid.units()
    rows = sum(map(len, map(spec.grid.identities_of, units)))
    if spec.per_replicate:
        rows *= spec.grid.block_replicates
    shard = sum(unit_bytes(spec).values()) * COMPRESSED.get(spec.name, 1.0)
    table = len(spec.columns) * (COLUMN_BYTES + VALUE_BYTES * rows / max(1, len(units)))
    first_parts = sum(unit.replicate_block == 0 for unit in units)
    files = len(units) * FILES_BYTES.get(spec.name, 0) + first_parts * FIRST_PART_BYTES.get(spec.name, 0)
    done = len(set(committed(spec)).intersection(units)) if known else 0
    total = len(units) * (shard + table + RECORD_BYTES) + files
    return StageSize(spec.name, len(units), rows, round(total), done)


def unit_bytes(spec: StageSpec) -> dict[str, int]:
    """Bytes of a unit's whole shard of each array, as it is in memory."""
    cells = spec.grid.block_identities * (spec.grid.block_replicates if spec.per_replicate else 1)
    return {
        array.name: cells * int(np.prod(array.item)) * np.dtype(array.dtype).itemsize for array in spec.arrays
    }


def assumed_specs(build: BuildConfig, store: str) -> list[StageSpec]:
    """Describe the stages as far as they can be without weights: places are not known, sizes are.

    They are those of the published generator and of recognisers of its time: images of 128 x 128 pixels,
    contexts and embeddings of 512 numbers. Raises ConfigError for settings that do not go together.
    """
    pool = build.negatives.pool or build.identities
    build = build.model_copy(update={"negatives": build.negatives.model_copy(update={"pool": pool})})
    grid = Grid(build.identities, build.images, build.block_identities, build.block_images)
    end = grid.identities_of(grid.units()[-1]).stop  # a last block is filled beyond the extent
    drawn = Grid(max(end, pool), 1, contexts.BLOCK, 1)

    def assumed(name: str, grid: Grid, array: ArraySpec, columns: Columns) -> StageSpec:
        return StageSpec(
            store=store,
            name=name,
            version=0,
            config={},
            inputs={},
            grid=grid,
            arrays=(array,),
            columns=columns,
            per_replicate=name != "contexts",
        )

    picture = ArraySpec("image", "u1", (IMAGE_SIZE, IMAGE_SIZE, 3))
    crop = ArraySpec("image", "u1", (aligned.SIZE, aligned.SIZE, 3))
    specs = {
        "contexts": assumed("contexts", drawn, ArraySpec("context", "f4", (WIDTH,)), contexts.COLUMNS),
        "samples": assumed("samples", grid, picture, samples.COLUMNS),
        "aligned": assumed("aligned", grid, crop, aligned.COLUMNS),
        "embeddings": assumed("embeddings", grid, ArraySpec("embedding", "f4", (WIDTH,)), embeddings.COLUMNS),
    }
    # These ask their inputs for nothing but grids and names.
    mined = negatives.plan(build, store, specs)
    specs["negatives"] = replace(mined, grid=replace(mined.grid, identities=end))
    for name, stage in (("scores", scores), ("evaluation", evaluation)):
        specs[name] = stage.plan(build, store, specs)
    return [specs[name] for name in STAGES]

"""A stage that needs no networks, for the tests of the store."""

import time
from dataclasses import replace

import numpy as np

from negfacediff_core.store import shards, tables
from negfacediff_core.store.layout import ArraySpec, Grid, StageSpec, Weight


def make_spec(store, identities=6, replicates=4, limit=None, **changes):
    """A stage of small images and embeddings in units of 4 x 4, with other fields where given."""
    spec = StageSpec(
        store=str(store),
        name="samples",
        version=1,
        config={"w": 0.5},
        inputs={"contexts": "0" * 16},
        grid=Grid(identities, replicates, block_identities=4, block_replicates=4, limit=limit),
        weights={"generator": Weight(__file__, {"unet": "ab"})},
        arrays=(ArraySpec("image", "u1", (5, 5, 3)), ArraySpec("embedding", "f4", (7,))),
        columns=(("identity", "int64"), ("replicate", "int64"), ("status", "string"), ("error", "string")),
    )
    return replace(spec, **changes)


def content_of(spec, unit):
    """What a deterministic stage would make of a unit; the first image is black and failed."""
    rng = np.random.default_rng([unit.identity_block, unit.replicate_block])
    identities, replicates = spec.grid.identities_of(unit), spec.grid.replicates_of(unit)
    images = rng.integers(0, 256, (len(identities), len(replicates), 5, 5, 3), np.uint8)
    images[0, 0] = 0
    embeddings = rng.standard_normal((len(identities), len(replicates), 7)).astype(np.float32)
    cells = [(i, r) for i in identities for r in replicates]
    rows = tables.rows_of(
        spec,
        {
            "identity": [i for i, _ in cells],
            "replicate": [r for _, r in cells],
            "status": ["failed"] + ["ok"] * (len(cells) - 1),
            "error": ["it is black"] + [None] * (len(cells) - 1),
        },
    )
    return {"image": images, "embedding": embeddings}, rows


def commit(spec, unit):
    """Commit what `content_of` makes of a unit."""
    arrays, rows = content_of(spec, unit)
    return shards.commit(
        spec, unit, arrays=arrays, rows=rows, started=time.time(), seconds={"sample": 1.0}, device="cpu"
    )

"""Stage `scores`: all comparison scores of a large dataset, counted band by band.

A unit is a band of identities and, in place of replicates, a part of the bands that it is compared with. Its
extent is part of its fingerprint, as in the stage `evaluation`, which adds the bands up. Sets whose
scores are few enough to be kept one by one, and the paper protocol, need no band: there the stage has no
unit, and the evaluation compares.
"""

import io
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.evaluation.bands import (
    BINS,
    TILE_ROWS,
    BandScores,
    Images,
    add_up,
    band_identities,
    partners,
    parts_of,
    score_band,
)
from negfacediff_core.evaluation.distributions import Comparisons
from negfacediff_core.evaluation.scores import EXACT_IMAGES
from negfacediff_core.stages.models import describe_device, scores_device_of, scoring_on
from negfacediff_core.store.layout import Grid, StageSpec, Unit
from negfacediff_core.store.records import Record
from negfacediff_core.store.shards import commit, read_arrays, read_file, read_rows
from negfacediff_core.store.tables import rows_of

VERSION = 1
COLUMNS = (("identity", "int64"), ("images", "int64"))
# Images that a band is compared with at a time.
_PIECE = 4 * TILE_ROWS


class Judged(NamedTuple):
    """What the judge says of `identities` `(B,)`: embeddings `(B, R, D)` float32, and the valid `(B, R)`."""

    identities: NDArray[np.int64]
    embeddings: NDArray[np.float32]
    valid: NDArray[np.bool_]


def plan(build: BuildConfig, store: str, upstream: Mapping[str, StageSpec]) -> StageSpec:
    """Describe the stage: bands are of whole blocks of embeddings; no unit where no band is needed."""
    banded = build.evaluation.protocol == "full" and build.identities * build.images > EXACT_IMAGES
    embeddings = upstream["embeddings"]
    band = band_identities(build.images, embeddings.grid.block_identities)
    parts = parts_of(-(-build.identities // band))
    return StageSpec(
        store=store,
        name="scores",
        version=VERSION,
        config={"identities": build.identities, "images": build.images, "parts": parts} if banded else {},
        inputs={"embeddings": embeddings.fingerprint},
        grid=Grid(build.identities, parts, band, 1, limit=build.identities) if banded else Grid(0, 1, 1, 1),
        columns=COLUMNS,
        per_replicate=False,
    )


def run_unit(spec: StageSpec, unit: Unit, execution: ExecutionConfig) -> Record:
    """Compare a band with some of itself and the half of the others that follows it."""
    started, begun = time.time(), time.perf_counter()
    device = scores_device_of(execution.device)
    embeddings, extent, bands = spec.input("embeddings"), _extent(spec), _bands(spec)
    band = unit.identity_block
    own = list(judged(embeddings, extent, np.array(bands[band])))
    seconds = {"read": time.perf_counter() - begun}

    begun = time.perf_counter()
    compared = partners_of(spec, unit)
    others = (
        block
        for other in compared
        if other != band
        for block in judged(embeddings, extent, np.array(bands[other]))
    )
    with scoring_on(device):
        scores = score_band(_together(own), _pieces(others), inside=band in compared, device=device)
    seconds["score"] = time.perf_counter() - begun
    return commit(
        spec,
        unit,
        arrays={},
        rows=rows_of(
            spec,
            {
                "identity": np.concatenate([part.identities for part in own]),
                "images": np.concatenate([part.valid.sum(axis=1) for part in own]),
            },
        ),
        started=started,
        seconds=seconds,
        device=describe_device(device),
        files={_file(unit): _encode(scores)},
    )


def partners_of(spec: StageSpec, unit: Unit) -> list[int]:
    """The bands that a unit compares its band with: its part of `partners`, as `spec` has cut them."""
    bands, parts = _grid(spec).blocks
    each = -(-(bands // 2 + 1) // parts)
    first = each * unit.replicate_block
    return partners(unit.identity_block, bands)[first : first + each]


def stored_comparisons(spec: StageSpec) -> Comparisons | None:
    """The scores of the whole extent, from those of all bands, read one by one; None where there are none.

    Raises:
        StoreError: if a band is not committed, or is damaged.
    """
    if not spec.config:
        return None
    return add_up(_decode(read_file(spec, unit, _file(unit))) for unit in _grid(spec).units())


def judged(embeddings: StageSpec, extent: tuple[int, int], identities: NDArray[np.int64]) -> Iterator[Judged]:
    """Yield ascending `identities` with their images, as far as the extent goes, a block at a time.

    Raises:
        StoreError: if a unit of theirs is not committed, or is damaged.
    """
    grid = replace(embeddings.grid, identities=extent[0], replicates=extent[1])
    wanted = set(identities // grid.block_identities)
    units = (unit for unit in grid.units() if unit.identity_block in wanted)
    for _, block in groupby(units, key=lambda unit: unit.identity_block):
        pieces = [_piece(embeddings, unit) for unit in block]
        here = np.intersect1d(identities, pieces[0].identities)
        rows = here - pieces[0].identities[0]
        values, valid = (
            np.concatenate([getattr(piece, name) for piece in pieces], axis=1)[rows, : extent[1]]
            for name in ("embeddings", "valid")
        )
        yield Judged(here, values, valid)


def read_judged(
    embeddings: StageSpec, extent: tuple[int, int], identities: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return embeddings `(I, R, D)` of ascending `identities`, and which are valid `(I, R)`; raises as
    `judged`.
    """
    parts = list(judged(embeddings, extent, identities))
    return np.concatenate([part.embeddings for part in parts]), np.concatenate([part.valid for part in parts])


def _piece(embeddings: StageSpec, unit: Unit) -> Judged:
    rows = read_rows(embeddings, unit)
    identities, replicates = embeddings.grid.identities_of(unit), embeddings.grid.replicates_of(unit)
    valid = np.zeros((len(identities), len(replicates)), bool)
    place = rows.column("identity").to_numpy() - identities.start
    image = rows.column("replicate").to_numpy() - replicates.start
    valid[place, image] = np.array(rows.column("status").to_pylist()) == "ok"
    return Judged(np.array(identities, np.int64), read_arrays(embeddings, unit)["embedding"], valid)


def _together(parts: list[Judged]) -> Images:
    """The valid images of consecutive parts."""
    identity = [part.identities[np.nonzero(part.valid)[0]] for part in parts]
    return Images(np.concatenate([part.embeddings[part.valid] for part in parts]), np.concatenate(identity))


def _pieces(blocks: Iterator[Judged]) -> Iterator[Images]:
    """Join blocks of identities to pieces of at least _PIECE images, but for the last."""
    held: list[Judged] = []
    for block in blocks:
        held.append(block)
        if sum(part.valid.size for part in held) >= _PIECE:
            yield _together(held)
            held = []
    if held:
        yield _together(held)


def _encode(scores: BandScores) -> bytes:
    """Write a band's scores as .npz, of the counts only those that are not 0."""
    held = scores._asdict()
    for kind in ("genuine", "impostor"):
        counts = held.pop(kind)
        held[f"{kind}_bins"] = np.flatnonzero(counts).astype(np.uint32)
        held[f"{kind}_counts"] = counts[held[f"{kind}_bins"]]
    file = io.BytesIO()
    np.savez_compressed(file, **held)
    return file.getvalue()


def _decode(content: bytes) -> BandScores:
    with np.load(io.BytesIO(content), allow_pickle=False) as held:
        counts = np.zeros((2, BINS), np.int64)
        for row, kind in zip(counts, ("genuine", "impostor"), strict=True):
            row[held[f"{kind}_bins"]] = held[f"{kind}_counts"]
        return BandScores(
            genuine=counts[0],
            impostor=counts[1],
            genuine_sums=held["genuine_sums"],
            images=int(held["images"]),
            total=held["total"],
            gram=held["gram"],
        )


def _file(unit: Unit) -> str:
    return f"bands/{unit.name}.npz"


def _extent(spec: StageSpec) -> tuple[int, int]:
    return spec.config["identities"], spec.config["images"]


def _bands(spec: StageSpec) -> list[range]:
    """The identities of each band."""
    grid = replace(_grid(spec), replicates=1)
    return [grid.identities_of(unit) for unit in grid.units()]


def _grid(spec: StageSpec) -> Grid:
    """The units of the extent; the bands of older stores were compared in one part each."""
    return replace(spec.grid, identities=spec.config["identities"], replicates=spec.config.get("parts", 1))

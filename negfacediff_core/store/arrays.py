"""The Zarr v3 arrays of a stage directory: one shard a unit, written whole or not at all."""

import math
from collections.abc import Mapping

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from negfacediff_core.errors import StoreError
from negfacediff_core.store import faults
from negfacediff_core.store.layout import ArraySpec, StageSpec, Unit, array_path

# Pixels barely compress and must be quick; numbers compress once bits or bytes are sorted by place.
_CODECS = {
    "u1": BloscCodec(cname="lz4", clevel=5, shuffle="noshuffle"),
    "f4": BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"),
    "i8": BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"),
}


def grow(spec: StageSpec) -> None:
    """Create the arrays of a stage, or enlarge them to its extent; they never shrink. Hold the stage's lock.

    Resizing rewrites the array's metadata, so it happens here, before units are handed out, and nowhere else.
    """
    if not spec.arrays:
        return
    with spec.location.explained("write", "arrays.zarr"):
        group = zarr.open_group(spec.location.zarr_store("arrays.zarr"), mode="a")
        for array in spec.arrays:
            _grow_array(spec, group, array)
            spec.location.sync(f"arrays.zarr/{array.name}/zarr.json")
    spec.location.sync("arrays.zarr/zarr.json")
    spec.location.sync("stage.json")


def _grow_array(spec: StageSpec, group: zarr.Group, array: ArraySpec) -> None:
    wanted = _shape(spec, array, spec.grid.blocks)
    if array.name not in group:
        shard = _shape(spec, array, (1, 1))
        group.create_array(
            array.name,
            shape=wanted,
            shards=shard,
            chunks=(_inner_chunk(spec), *shard[1:]),
            dtype=array.dtype,
            compressors=_CODECS[array.dtype],
            fill_value=0,
            # A flat folder: the usual nested one costs seven directories, each to be synced, for every shard.
            chunk_key_encoding={"name": "default", "separator": "."},
        )
        return
    stored = _open(spec, array, mode="r+")
    enlarged = tuple(max(old, new) for old, new in zip(stored.shape, wanted, strict=True))
    if enlarged != stored.shape:
        stored.resize(enlarged)


def write_unit(spec: StageSpec, unit: Unit, arrays: Mapping[str, NDArray]) -> None:
    """Write a unit's whole shard of every array of the stage, durably.

    Args:
        spec: the stage.
        unit: the unit.
        arrays: by name, `(identities, replicates, *item)` of the unit; no replicates if the stage has none.

    Raises:
        StoreError: if an array is missing, unknown, or has another shape or dtype than the whole shard.
    """
    if set(arrays) != {array.name for array in spec.arrays}:
        raise StoreError(f"{spec.path} holds {[a.name for a in spec.arrays]}, not {sorted(arrays)}.")
    for array in spec.arrays:
        values = arrays[array.name]
        expected = _unit_shape(spec, array, unit)
        if values.shape != expected or values.dtype != np.dtype(array.dtype):
            raise StoreError(
                f"unit {unit.name} of {spec.path} takes the whole {array.name} as {expected} {array.dtype}, "
                f"not {values.shape} {values.dtype.str[1:]}: a part of a shard would erase the rest of it."
            )
        shard = values
        if missing := spec.grid.block_identities - values.shape[0]:
            # The block ends at the last identity that exists, but only a whole shard is written unread.
            shard = np.concatenate([values, np.zeros((missing, *values.shape[1:]), values.dtype)])
        path = array_path(spec, array, unit)
        faults.reached(f"write {path}")
        with spec.location.explained("write", path):
            stored = _open(spec, array, mode="r+").with_config({"write_empty_chunks": True})
            stored[_region(spec, array, unit)] = shard
        spec.location.sync(path)


def read_unit(spec: StageSpec, unit: Unit, array: ArraySpec) -> NDArray:
    """Read a unit's region of an array; the caller has checked that the shard is there and whole."""
    with spec.location.explained("read", array_path(spec, array, unit)):
        values = np.asarray(_open(spec, array, mode="r")[_region(spec, array, unit)])
    return values[: len(spec.grid.identities_of(unit))]


def _open(spec: StageSpec, array: ArraySpec, mode: str) -> zarr.Array:
    stored = zarr.open_group(spec.location.zarr_store("arrays.zarr"), mode=mode)[array.name]  # type: ignore[arg-type]
    assert isinstance(stored, zarr.Array)
    return stored


def _shape(spec: StageSpec, array: ArraySpec, blocks: tuple[int, int]) -> tuple[int, ...]:
    identities = blocks[0] * spec.grid.block_identities
    replicates = (blocks[1] * spec.grid.block_replicates,) if spec.per_replicate else ()
    return (identities, *replicates, *array.item)


def _unit_shape(spec: StageSpec, array: ArraySpec, unit: Unit) -> tuple[int, ...]:
    replicates = (spec.grid.block_replicates,) if spec.per_replicate else ()
    return (len(spec.grid.identities_of(unit)), *replicates, *array.item)


def _region(spec: StageSpec, array: ArraySpec, unit: Unit) -> tuple[slice, ...]:
    identity = unit.identity_block * spec.grid.block_identities
    replicate = unit.replicate_block * spec.grid.block_replicates
    identities = slice(identity, identity + spec.grid.block_identities)
    replicates = slice(replicate, replicate + spec.grid.block_replicates)
    return (identities, replicates) if spec.per_replicate else (identities,)


def _inner_chunk(spec: StageSpec) -> int:
    """Identities in an inner chunk: one with all its replicates, or up to 64 plain vectors."""
    return 1 if spec.per_replicate else math.gcd(spec.grid.block_identities, 64)

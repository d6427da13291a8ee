"""The Zarr v3 arrays of a stage directory: one shard a unit, written whole or not at all.

Zarr encodes and decodes in memory; whole files go to and from the place by the store's own verbs, so that
shards are written as everything else is, and what is decoded is what was checked.
"""

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.buffer import Buffer
from zarr.buffer import cpu
from zarr.codecs import BloscCodec
from zarr.storage import MemoryStore

from negfacediff_core.errors import StoreError
from negfacediff_core.store.layout import ArraySpec, StageSpec, Unit, array_path, damaged, parse_json

# Pixels barely compress and must be quick; numbers compress once bits or bytes are sorted by place.
_CODECS = {
    "u1": BloscCodec(cname="lz4", clevel=5, shuffle="noshuffle"),
    "f4": BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"),
    "i8": BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"),
}

_FOLDER = "arrays.zarr"


def grow(spec: StageSpec, anew: Collection[str] = ()) -> None:
    """Create the arrays of a stage, or enlarge them to its extent; they never shrink. Hold the stage's lock.

    Resizing rewrites the array's metadata, so it happens here, before units are handed out, and nowhere else.
    The metadata `anew`, by their paths in the stage directory, are written as if they were not there.
    """
    if not spec.arrays:
        return
    paths = ["zarr.json", *(f"{array.name}/zarr.json" for array in spec.arrays)]
    stored = {
        path: spec.location.read_bytes(f"{_FOLDER}/{path}")
        for path in paths
        if f"{_FOLDER}/{path}" not in anew and spec.location.exists(f"{_FOLDER}/{path}")
    }
    for path, data in _grown(spec, stored).items():
        if data != stored.get(path):
            spec.location.write_atomic(f"{_FOLDER}/{path}", data)


def damaged_metadata(spec: StageSpec, units: Iterable[Unit]) -> dict[str, StoreError]:
    """Return what is wrong with metadata that are not what `grow` writes for arrays that hold `units`.

    By path: a DamagedError, or another StoreError where one cannot be read.
    """
    if not spec.arrays:
        return {}
    problems: dict[str, StoreError] = {}
    for name, wanted in _grown(covering(spec, units), {}).items():
        path = f"{_FOLDER}/{name}"
        try:
            _check_describes(spec, path, json.loads(wanted))
        except StoreError as error:
            problems[path] = error
    return problems


def _check_describes(spec: StageSpec, path: str, wanted: dict[str, Any]) -> None:
    """Raise DamagedError unless stored metadata are `wanted` but for a larger shape of whole shards."""
    where = f"{spec.directory}/{path}"
    if not spec.location.exists(path):
        raise damaged(where)
    stored = parse_json(spec.location.read_bytes(path), where)
    sizes, least = stored.pop("shape", []), wanted.pop("shape", [])
    shard = wanted["chunk_grid"]["configuration"]["chunk_shape"] if least else []
    try:
        whole = all(
            size >= low and size % step == 0 for size, low, step in zip(sizes, least, shard, strict=True)
        )
    except (ValueError, TypeError) as error:
        raise damaged(where) from error
    if not whole or stored != wanted:
        raise damaged(where)


def covering(spec: StageSpec, units: Iterable[Unit]) -> StageSpec:
    """Return `spec` with the smallest extent of whole blocks that holds `units`; one block at least."""
    blocks = [max(places) + 1 for places in zip(Unit(0, 0), *units, strict=True)]
    grid = spec.grid
    extent = blocks[0] * grid.block_identities, blocks[1] * grid.block_replicates
    return replace(spec, grid=replace(grid, identities=extent[0], replicates=extent[1]))


def _grown(spec: StageSpec, stored: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the `stored` metadata of the group and the arrays by path, created or enlarged to the extent."""
    held: dict[str, Buffer] = {path: cpu.Buffer.from_bytes(data) for path, data in stored.items()}
    with _damage_named(f"{spec.directory}/{_FOLDER}/zarr.json"):
        group = zarr.open_group(MemoryStore(held), mode="a")
    for array in spec.arrays:
        with _damage_named(_metadata_place(spec, array)):
            _grow_array(spec, group, array)
    return {path: metadata.to_bytes() for path, metadata in held.items()}


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
    stored = group[array.name]
    assert isinstance(stored, zarr.Array)
    if stored.shards != _shape(spec, array, (1, 1)):
        raise StoreError(
            f"{spec.directory} was made in shards of {stored.shards}, not {_shape(spec, array, (1, 1))}: set "
            "block_identities and block_images to those of the build that made it."
        )
    enlarged = tuple(max(old, new) for old, new in zip(stored.shape, wanted, strict=True))
    if enlarged != stored.shape:
        stored.resize(enlarged)


def encode_unit(spec: StageSpec, unit: Unit, arrays: Mapping[str, NDArray]) -> dict[str, bytes]:
    """Return a unit's whole shard of every array of the stage, by its path in the stage directory.

    Args:
        spec: the stage, prepared.
        unit: the unit.
        arrays: by name, `(identities, replicates, *item)` of the unit; no replicates if the stage has none.

    Raises:
        StoreError: if an array is missing, unknown, or has another shape or dtype than the whole shard, or if
            the metadata of the stored array is missing or damaged.
    """
    if set(arrays) != {array.name for array in spec.arrays}:
        raise StoreError(f"{spec.path} holds {[a.name for a in spec.arrays]}, not {sorted(arrays)}.")
    return {
        array_path(spec, array, unit): _encode(spec, unit, array, arrays[array.name]) for array in spec.arrays
    }


def _encode(spec: StageSpec, unit: Unit, array: ArraySpec, values: NDArray) -> bytes:
    expected = _unit_shape(spec, array, unit)
    if values.shape != expected or values.dtype != np.dtype(array.dtype):
        raise StoreError(
            f"unit {unit.name} of {spec.path} takes the whole {array.name} as {expected} {array.dtype}, "
            f"not {values.shape} {values.dtype.str[1:]}: a part of a shard would erase the rest of it."
        )
    if missing := spec.grid.block_identities - values.shape[0]:
        # The block ends at the last identity that exists, but only a whole shard is written unread.
        values = np.concatenate([values, np.zeros((missing, *values.shape[1:]), values.dtype)])
    held: dict[str, Buffer] = {}
    stored = _open(spec, unit, array, held).with_config({"write_empty_chunks": True})
    stored[_region(spec, array, unit)] = values
    return held[_key(spec, unit, array)].to_bytes()


def decode_unit(spec: StageSpec, unit: Unit, array: ArraySpec, shard: bytes) -> NDArray:
    """Return a unit's region of an array out of the bytes of its shard, which the caller has checked.

    Raises:
        StoreError: if the metadata of the stored array is missing or damaged.
    """
    held: dict[str, Buffer] = {_key(spec, unit, array): cpu.Buffer.from_bytes(shard)}
    stored = _open(spec, unit, array, held)
    with _damage_named(_metadata_place(spec, array)):
        values = np.asarray(stored[_region(spec, array, unit)])
    return values[: len(spec.grid.identities_of(unit))]


def _open(spec: StageSpec, unit: Unit, array: ArraySpec, held: dict[str, Buffer]) -> zarr.Array:
    """Return a stored array over `held`, shards by key, to which its metadata is added.

    Other metadata than `grow` makes might look elsewhere for the unit's shard, and read zeros.
    """
    held["zarr.json"] = cpu.Buffer.from_bytes(spec.location.read_bytes(f"{_FOLDER}/{array.name}/zarr.json"))
    with _damage_named(_metadata_place(spec, array)):
        stored = zarr.open_array(MemoryStore(held), mode="r+", zarr_format=3)
        region = _region(spec, array, unit)
        position = tuple(part.start // size for part, size in zip(region, stored.shards or (), strict=False))
        key = stored.metadata.encode_chunk_key((*position, *[0] * len(array.item)))
        inside = all(part.stop <= size for part, size in zip(region, stored.shape, strict=False))
        found = (key, stored.shards, stored.dtype, stored.fill_value, inside)
        wanted = (_key(spec, unit, array), _shape(spec, array, (1, 1)), np.dtype(array.dtype), 0, True)
        if found != wanted:
            raise ValueError(f"{found} instead of {wanted}")
    return stored


@contextmanager
def _damage_named(where: str) -> Iterator[None]:
    """Turn whatever Zarr raises for metadata that are not what was written, dozens of types, into one."""
    try:
        yield
    except Exception as error:
        raise damaged(where) from error


def _metadata_place(spec: StageSpec, array: ArraySpec) -> str:
    return f"{spec.directory}/{_FOLDER}/{array.name}/zarr.json"


def _key(spec: StageSpec, unit: Unit, array: ArraySpec) -> str:
    return array_path(spec, array, unit).rsplit("/", 1)[1]


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

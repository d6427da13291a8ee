"""Committing a unit, and reading committed units.

Order of a commit: whole shards, rows, further files, each read back and hashed, then the record. A process
killed anywhere before the last rename leaves a unit that is not done, and making it again overwrites what it
left.
"""

import hashlib
import socket
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager

import pyarrow as pa
from numpy.typing import NDArray

from negfacediff_core.errors import StoreError
from negfacediff_core.store import arrays as zarr_arrays
from negfacediff_core.store import tables
from negfacediff_core.store.layout import StageSpec, Unit, array_path, establish, part_path, repair_command
from negfacediff_core.store.place import Lock, gone
from negfacediff_core.store.records import Record, has_record, read_record, write_record

# The empty file whose age tells when a stage directory was last prepared.
PREPARED = ".prepared"
# Locks that the commits of a stage share, so that few wait for each other and few files lie there.
_LOCKS = 32


def prepare(spec: StageSpec) -> None:
    """Make the stage directory and its arrays ready for the units of the spec's extent."""
    with spec.location.lock("stage", make=True) as lock:
        # What was prepared a short while ago is in use, although no run names it yet.
        spec.location.touch(PREPARED)
        establish(spec)
        lock.check()
        zarr_arrays.grow(spec)


def commit(
    spec: StageSpec,
    unit: Unit,
    *,
    arrays: Mapping[str, NDArray],
    rows: pa.Table,
    started: float,
    seconds: Mapping[str, float],
    device: str,
    files: Mapping[str, bytes] | None = None,
) -> Record:
    """Write everything of a unit and then its record; a unit that has a record is left as it is.

    Args:
        spec: the stage, prepared.
        unit: the unit.
        arrays: whole shards by array name, as `negfacediff_core.store.arrays.encode_unit` takes them.
        rows: one row a sample with the stage's columns; `status`, where there is one, is "ok" or why not.
        started: unix time at which work on the unit began.
        seconds: time of each phase so far; the phase `write` is added.
        device: what computed it, for the record.
        files: further files by name, for stages whose result is more than arrays and rows.

    Returns:
        The record, or the one that was there.

    Raises:
        StoreError: if something has the wrong shape or columns, or cannot be written.
        PlaceError: if no unit could be committed there: the disk is full, read-only or gone.
    """
    if not spec.location.exists("stage.json"):
        # Without this the directory would be made anew, below the mount point of a disk that has gone.
        raise gone(spec.directory)
    begun = time.perf_counter()
    contents = {
        **zarr_arrays.encode_unit(spec, unit, arrays),
        part_path(unit): tables.encode_part(spec, rows),
        **(files or {}),
    }
    # One commit of a unit at a time: a worker thought dead must not overwrite what its successor recorded.
    with commit_lock(spec, unit) as lock:
        if has_record(spec, unit):
            return read_record(spec, unit)
        hashes = {path: _write(spec, path, content) for path, content in contents.items()}
        ok = count_ok(rows)
        record = Record(
            unit=unit,
            rows=rows.num_rows,
            ok=ok,
            failed=rows.num_rows - ok,
            sha256=hashes,
            seconds={**seconds, "write": time.perf_counter() - begun},
            started=started,
            # Clocks are set back at times; what ends before it began would have no rate.
            finished=max(started, time.time()),
            host=socket.gethostname(),
            device=device,
        )
        # Whoever took over the lock meanwhile may have committed the unit: their record stays.
        lock.check()
        write_record(spec, record)
        return record


def count_ok(rows: pa.Table) -> int:
    """Return how many rows are ok by their status; all where they have none."""
    return rows.column("status").to_pylist().count("ok") if "status" in rows.column_names else rows.num_rows


def commit_lock(spec: StageSpec, unit: Unit) -> AbstractContextManager[Lock]:
    """Hold the lock under which a unit is committed: meanwhile its files and its record stay as they are."""
    return spec.location.lock(f"commit-{sum(unit) % _LOCKS}")


def _write(spec: StageSpec, path: str, content: bytes) -> str:
    """Write a file and read it back; return its SHA-256."""
    spec.location.write_atomic(path, content)
    if spec.location.read_bytes(path) != content:
        raise StoreError(
            f"{spec.directory}/{path} does not hold what was just written there; check the disk, then run "
            "the same command again."
        )
    return hashlib.sha256(content).hexdigest()


def read_arrays(spec: StageSpec, unit: Unit) -> dict[str, NDArray]:
    """Read all arrays of a committed unit, checked against its record.

    Raises:
        StoreError: if the unit is not committed, or a shard is missing or not what was committed.
    """
    record = read_record(spec, unit)
    return {
        array.name: zarr_arrays.decode_unit(
            spec, unit, array, _checked(spec, record, array_path(spec, array, unit))
        )
        for array in spec.arrays
    }


def read_rows(spec: StageSpec, unit: Unit) -> pa.Table:
    """Read the rows of a committed unit, checked against its record; errors as `read_arrays`."""
    return tables.parse_part(spec, _checked(spec, read_record(spec, unit), part_path(unit)))


def read_file(spec: StageSpec, unit: Unit, name: str) -> bytes:
    """Read a further file of a committed unit, checked against its record; errors as `read_arrays`."""
    return _checked(spec, read_record(spec, unit), name)


def _checked(spec: StageSpec, record: Record, path: str) -> bytes:
    data = spec.location.read_bytes(path)
    if hashlib.sha256(data).hexdigest() != record.sha256.get(path):
        raise StoreError(
            f"{spec.directory}/{path} is not what was committed; {repair_command(spec.store)} has the unit "
            "made anew, and what was made from it."
        )
    return data

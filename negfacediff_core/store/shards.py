"""Committing a unit, and reading committed units.

Order of a commit: whole shards, rows, further files, hash of what was written, record. A process killed
anywhere before the last rename leaves a unit that is not done, and making it again overwrites what it left.
"""

import hashlib
import socket
import time
from collections.abc import Mapping

import pyarrow as pa
from numpy.typing import NDArray

from negfacediff_core.errors import StoreError
from negfacediff_core.store import arrays as zarr_arrays
from negfacediff_core.store import tables
from negfacediff_core.store.layout import StageSpec, Unit, array_path, establish, part_path
from negfacediff_core.store.records import Record, has_record, read_record, write_record

_LOCK = "stage"


def prepare(spec: StageSpec) -> None:
    """Make the stage directory and its arrays ready for the units of the spec's extent."""
    with spec.location.lock(_LOCK):
        establish(spec)
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
        arrays: whole shards by array name, as `negfacediff_core.store.arrays.write_unit` takes them.
        rows: one row a sample with the stage's columns; `status`, where there is one, is "ok" or why not.
        started: unix time at which work on the unit began.
        seconds: time of each phase so far; the phase `write` is added.
        device: what computed it, for the record.
        files: further files by name, for stages whose result is more than arrays and rows.

    Returns:
        The record, or the one that was there.

    Raises:
        StoreError: if something has the wrong shape or columns, or cannot be written.
    """
    # One commit at a time: a worker thought dead must not overwrite what its successor has recorded.
    with spec.location.lock(_LOCK):
        if has_record(spec, unit):
            return read_record(spec, unit)
        begun = time.perf_counter()
        zarr_arrays.write_unit(spec, unit, arrays)
        tables.write_part(spec, unit, rows)
        for name, content in (files or {}).items():
            spec.location.write_atomic(name, content)
        paths = [*(array_path(spec, array, unit) for array in spec.arrays), part_path(unit), *(files or {})]
        hashes = {path: hashlib.sha256(spec.location.read_bytes(path)).hexdigest() for path in paths}
        ok = rows.column("status").to_pylist().count("ok") if "status" in rows.column_names else rows.num_rows
        record = Record(
            unit=unit,
            rows=rows.num_rows,
            ok=ok,
            failed=rows.num_rows - ok,
            sha256=hashes,
            seconds={**seconds, "write": time.perf_counter() - begun},
            started=started,
            finished=time.time(),
            host=socket.gethostname(),
            device=device,
        )
        write_record(spec, record)
        return record


def read_arrays(spec: StageSpec, unit: Unit) -> dict[str, NDArray]:
    """Read all arrays of a committed unit, checked against its record.

    Raises:
        StoreError: if the unit is not committed, or a shard is missing or not what was committed.
    """
    record = read_record(spec, unit)
    for array in spec.arrays:
        _checked(spec, record, array_path(spec, array, unit))
    return {array.name: zarr_arrays.read_unit(spec, unit, array) for array in spec.arrays}


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
            f"{spec.directory}/{path} is not what was committed; delete done/{record.unit.name}.json there "
            "and run the build again: the unit is then made anew."
        )
    return data

"""What lies in a store that no run needs: found first, and removed only when asked.

Needed is what a run record names, and what that was made from. Whatever was touched in the last hour is
passed over: a build that is about to begin names its stages only after it has made their directories.
"""

import re
import time
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from negfacediff_core.errors import DamagedError, StoreError
from negfacediff_core.store.layout import StageSpec, Unit, array_path, part_path, read_spec
from negfacediff_core.store.location import Entry, locate
from negfacediff_core.store.records import has_record, records
from negfacediff_core.store.runs import read_runs
from negfacediff_core.store.shards import commit_lock
from negfacediff_core.store.status import check_store, directories, places, units_of
from negfacediff_core.store.verify import ABANDONED, is_temporary

# Parts and shards by their blocks; what follows the blocks in a shard's name is zero.
_FILE = re.compile(r"rows/part-(\d+)-(\d+)\.parquet|arrays\.zarr/[^/]+/c\.(\d+)(?:\.(\d+))?(?:\.0)*")


class Rubbish(NamedTuple):
    """What can go: a stage directory, or a single file; `unit` is the one that the file is a leftover of."""

    path: str
    why: str
    files: int
    size: int
    unit: Unit | None = None


def find_rubbish(store: str) -> list[Rubbish]:
    """Return what no run needs: stage directories first, then single files.

    Raises:
        StoreError: if `store` is none, or nothing tells what is needed: it has no run, or a run record or the
            description of a stage that a run needs cannot be read.
    """
    check_store(store)
    runs = read_runs(store)
    if not runs:
        raise StoreError(
            f"{store} has no run record, so that nothing tells what is needed there; if none of it is, "
            "remove the folder yourself."
        )
    needed = _needed(store, runs.values())
    entries = locate(store).walk("")
    old = {entry.path for entry in entries if time.time() - entry.modified > ABANDONED}
    by_directory: dict[str, list[Entry]] = {}
    for entry in entries:
        by_directory.setdefault("/".join(entry.path.split("/")[:2]), []).append(entry)
    rubbish, gone = [], set()
    for path in sorted(_unneeded(store, needed)):
        held = by_directory[path]
        if all(entry.path in old for entry in held):
            gone.add(path)
            size = sum(entry.size for entry in held)
            rubbish.append(Rubbish(path, "no run needs this stage", len(held), size))
    for path, held in by_directory.items():
        if path not in gone:
            spec = needed.get(path)
            leftovers = {} if spec is None else _leftovers(spec, runs.values(), held)
            rubbish += [
                Rubbish(entry.path, _why(entry, leftovers), 1, entry.size, leftovers.get(entry.path))
                for entry in held
                if entry.path in old and (is_temporary(entry.path) or entry.path in leftovers)
            ]
    return rubbish


def remove(store: str, rubbish: Rubbish) -> bool:
    """Remove what `find_rubbish` has found; tells whether it went, or had become needed meanwhile.

    Of a stage directory the records go first and `stage.json` last: killed in between, it holds units that
    are pending, and is found again.
    """
    location = locate(store)
    if rubbish.unit is not None:
        stage, digest, path = rubbish.path.split("/", 2)
        spec = read_spec(store, stage, digest)
        with commit_lock(spec, rubbish.unit):
            if has_record(spec, rubbish.unit):
                return False
            spec.location.remove(path)
    elif location.exists(f"{rubbish.path}/stage.json"):
        if rubbish.path in _needed(store, read_runs(store).values()):
            return False
        place = location.at(rubbish.path)
        with place.lock("stage"):
            others = {entry.path.split("/")[0] for entry in place.walk("")} - {"done", "stage.json"}
            for name in ["done", *sorted(others - {".stage.lock"}), "stage.json"]:
                place.remove(name)
        location.remove(rubbish.path)
    else:
        location.remove(rubbish.path)
    return True


def _needed(store: str, runs: Iterable[Mapping]) -> dict[str, StageSpec | None]:
    """Return the stages that runs name, and all that these were made from, by path; None if one is gone."""
    needed: dict[str, StageSpec | None] = {}
    waiting = [path for run in runs for path, _ in places(dict(run))]
    while waiting:
        path = waiting.pop()
        if path in needed:
            continue
        there = locate(store).exists(f"{path}/stage.json")
        spec = needed[path] = read_spec(store, *path.split("/")) if there else None
        if spec is not None:
            waiting += map("/".join, spec.inputs.items())
    return needed


def _unneeded(store: str, needed: Collection[str]) -> list[str]:
    """Return the paths of stage directories that are not needed, and are ours: their stage.json says so."""
    paths = []
    for stage, digest in directories(store):
        if f"{stage}/{digest}" not in needed:
            try:
                paths.append(read_spec(store, stage, digest).path)
            except DamagedError:
                continue
    return paths


def _leftovers(spec: StageSpec, runs: Iterable[Mapping], entries: Iterable[Entry]) -> dict[str, Unit]:
    """Return the shards and parts without a record, with their unit; none while a run lacks units there."""
    done = {record.unit: record for record in records(spec)}
    for run in runs:
        for path, place in places(dict(run)):
            if path == spec.path and not units_of(spec, place) <= done.keys():
                return {}
    recorded = {f"{spec.path}/{path}" for record in done.values() for path in record.sha256}
    unrecorded = {entry.path for entry in entries} - recorded
    return {path: unit for path in unrecorded if (unit := _unit_of_file(spec, path)) is not None}


def _unit_of_file(spec: StageSpec, path: str) -> Unit | None:
    """Return the unit whose shard or part has this path; None for any other file."""
    inside = path.removeprefix(f"{spec.path}/")
    match = _FILE.fullmatch(inside)
    if match is None:
        return None
    blocks = [int(number) for number in match.groups() if number is not None]
    unit = Unit(blocks[0], blocks[1] if len(blocks) > 1 else 0)
    files = [part_path(unit), *(array_path(spec, array, unit) for array in spec.arrays)]
    return unit if inside in files else None


def _why(entry: Entry, leftovers: Collection[str]) -> str:
    return "its unit was never committed" if entry.path in leftovers else "a killed writer left it"

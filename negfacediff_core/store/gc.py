"""What lies in a store that no run needs: found first, and removed only when asked.

Needed is what a run record names, and what that was made from. Whatever was touched in the last hour is
passed over: a build that is about to begin names its stages only after it has prepared their directories, and
leaves a fresh file in each. Both are looked at again under the lock that a build would have to wait for.
"""

import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from negfacediff_core.errors import DamagedError, StoreError
from negfacediff_core.store.layout import StageSpec, Unit, read_spec, unit_paths
from negfacediff_core.store.location import Entry, locate
from negfacediff_core.store.records import has_record, records
from negfacediff_core.store.runs import read_runs
from negfacediff_core.store.shards import commit_lock
from negfacediff_core.store.status import check_store, directories, places, units_of
from negfacediff_core.store.verify import ABANDONED, is_temporary

# Locks say nothing of what is in use: whoever looks under one has just taken it.
_LOCK = re.compile(r"\..*\.lock")
# Parts and shards by their blocks; what follows the blocks in a shard's name is zero.
_FILE = re.compile(r"rows/part-(\d+)-(\d+)\.parquet|arrays\.zarr/[^/]+/c\.(\d+)(?:\.(\d+))?(?:\.0)*")


class Rubbish(NamedTuple):
    """What can go: a stage directory, or a single file; `unit` is the one that the file is a leftover of."""

    path: str
    why: str
    files: int
    size: int
    unit: Unit | None = None


def find_rubbish(store: str, linked: Callable[[str], None] | None = None) -> list[Rubbish]:
    """Return what no run needs: stage directories first, then single files.

    A folder of stages, or a stage directory, that is a symbolic link is passed over, since other stores may
    use what it leads to; `linked` is called with its path.

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
    # Listed before the walk, which then sees what they hold: a stage that is made meanwhile is passed over.
    there = directories(store)
    entries = locate(store).walk("")
    old = {entry.path for entry in entries if _is_old(entry.modified)}
    by_directory: dict[str, list[Entry]] = {}
    for entry in entries:
        by_directory.setdefault("/".join(entry.path.split("/")[:2]), []).append(entry)
    if linked is not None:
        for path in _links(there, entries):
            linked(path)
    rubbish, gone = [], set()
    for path in sorted(_unneeded(store, there, needed)):
        # None of what lies behind a link, or of what was removed since.
        held = by_directory.get(path, [])
        if held and _is_abandoned(held):
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
    """Remove what `find_rubbish` has found; tells whether it went, or had come into use meanwhile."""
    location = locate(store)
    if rubbish.unit is not None:
        stage, digest, path = rubbish.path.split("/", 2)
        return _remove_leftover(read_spec(store, stage, digest), rubbish.unit, path)
    if location.exists(f"{rubbish.path}/stage.json"):
        return _remove_stage(store, rubbish.path)
    location.remove(rubbish.path)
    return True


def _remove_stage(store: str, path: str) -> bool:
    """Remove a stage directory, unless a run has come to need it or somebody has touched it.

    The records go first and `stage.json` last: killed in between, it holds units that are pending, and is
    found again.
    """
    place = locate(store).at(path)
    with place.lock("stage") as lock:
        entries = place.walk("")
        if path in _needed(store, read_runs(store).values()) or not _is_abandoned(entries):
            return False
        lock.check()
        others = {name for entry in entries if not _LOCK.fullmatch(name := entry.path.split("/")[0])}
        for name in ["done", *sorted(others - {"done", "stage.json"}), "stage.json"]:
            place.remove(name)
        # the folder, and the lock with it: a build that waits for it then makes both anew
        place.remove("")
    return True


def _remove_leftover(spec: StageSpec, unit: Unit, path: str) -> bool:
    """Remove a file of a unit, unless the unit has been committed or the file was written again."""
    with commit_lock(spec, unit) as lock:
        modified = spec.location.modified(path)
        if has_record(spec, unit) or (modified is not None and not _is_old(modified)):
            return False
        lock.check()
        spec.location.remove(path)
    return True


def _is_old(modified: float) -> bool:
    """Tell whether a file that was changed at a unix time has not been touched in the last hour."""
    return time.time() - modified > ABANDONED


def _is_abandoned(entries: Iterable[Entry]) -> bool:
    """Tell whether none of the files of a stage directory was touched in the last hour."""
    return all(_is_old(entry.modified) for entry in entries if not _LOCK.fullmatch(entry.path.split("/")[-1]))


def _needed(store: str, runs: Iterable[Mapping]) -> dict[str, StageSpec | None]:
    """Return the stages that runs name, and all that these were made from, by path; None if one is gone."""
    needed: dict[str, StageSpec | None] = {}
    waiting = [path for run in runs for path, _ in places(dict(run))]
    while waiting:
        path = waiting.pop()
        if path in needed:
            continue
        there = locate(store).exists(f"{path}/stage.json")
        spec = needed[path] = read_spec(store, *path.split("/", 1)) if there else None
        if spec is not None:
            waiting += map("/".join, spec.inputs.items())
    return needed


def _links(there: Iterable[tuple[str, str]], entries: Iterable[Entry]) -> list[str]:
    """Return what leads to the stage directories `there` and is a file to a walk: a symbolic link."""
    files = {entry.path for entry in entries}
    return sorted(files & {path for stage, digest in there for path in (stage, f"{stage}/{digest}")})


def _unneeded(store: str, there: Iterable[tuple[str, str]], needed: Collection[str]) -> list[str]:
    """Return the paths of those `there` that are not needed, and are ours: their stage.json says so."""
    paths = []
    for stage, digest in there:
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
    return unit if inside in unit_paths(spec, unit) else None


def _why(entry: Entry, leftovers: Collection[str]) -> str:
    return "its unit was never committed" if entry.path in leftovers else "a killed writer left it"

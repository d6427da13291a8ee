"""Checking a store against its records: every file of every committed unit, and what holds units together.

Nothing is written. `survey` looks at what describes the units (run records, `stage.json`, metadata of the
arrays) and lists the units; `check_units` reads and hashes all that they hold.
"""

import hashlib
import random
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import NamedTuple

from negfacediff_core.errors import DamagedError, StoreError
from negfacediff_core.store import arrays as zarr_arrays
from negfacediff_core.store import tables
from negfacediff_core.store.layout import (
    StageSpec,
    Unit,
    array_path,
    part_path,
    read_spec,
    record_path,
    unit_paths,
)
from negfacediff_core.store.location import Entry, locate
from negfacediff_core.store.records import Record, read_record, unit_of
from negfacediff_core.store.runs import check_run, read_run, run_names
from negfacediff_core.store.shards import count_ok
from negfacediff_core.store.status import directories, places, units_of

# Seconds after which a file that nobody has touched is taken for abandoned: no write of one takes as long.
ABANDONED = 3600.0
_TEMPORARY = re.compile(r"\..*\.tmp|.*\.partial|writable-[0-9a-f]{32}")


class Kind(StrEnum):
    """What a finding is about; it decides what mends it."""

    UNIT = "unit"
    """A file of a committed unit: the unit can be made again."""
    ARRAYS = "arrays"
    """Metadata of an array: they follow from `stage.json` and the committed units."""
    STAGE = "stage"
    """A `stage.json` that is damaged or missing: the next build of its run writes it again."""
    RUN = "run"
    """A run record: building the dataset again writes it again."""
    UNREADABLE = "unreadable"
    """A file that could not be read, now and from here, or is of another schema: it may be whole."""
    TEMPORARY = "temporary"
    """A file that a killed writer left: no damage."""


class Finding(NamedTuple):
    """What is wrong with the file `path` of the store; `stage` is its stage directory, if it is in one."""

    kind: Kind
    path: str
    problem: str
    stage: str = ""
    unit: Unit | None = None


@dataclass(frozen=True)
class StoredUnit:
    """A committed unit to check; `files` are those of its whole stage directory, by path, with their size.

    Where the metadata of the arrays are damaged, its shards are not `decodable`.
    """

    spec: StageSpec
    unit: Unit
    files: Mapping[str, int]
    decodable: bool

    @property
    def size(self) -> int:
        """Bytes of the unit's record, shards and rows."""
        paths = [record_path(self.unit), *unit_paths(self.spec, self.unit)]
        return sum(self.files.get(path, 0) for path in paths)


@dataclass(frozen=True)
class Survey:
    """What was found so far, and the units that are left to check."""

    findings: list[Finding]
    units: list[StoredUnit]


def survey(store: str, run: str | None = None, share: float = 1.0, seed: int = 0) -> Survey:
    """Check what describes the units of a store, and list them.

    Args:
        store: folder or URL.
        run: only the stages and units of this run.
        share: part of the units to list, in (0, 1]: at least one, drawn with `seed`.
        seed: another one draws other units.

    Raises:
        StoreError: if the place cannot be listed, or there is no run of that name.
    """
    if run is not None:
        check_run(store, run)
    findings: list[Finding] = []
    wanted, named = _runs(store, run, findings)
    specs = _specs(store, findings)
    findings += _missing_stages(specs, named)
    units = []
    for spec in specs.values():
        if spec is not None and (run is None or spec.path in wanted):
            units += _survey_stage(spec, wanted.get(spec.path) if run else None, findings)
    if run is None:
        findings += _temporaries("runs", locate(store).at("runs").walk(""))
    else:
        findings = [finding for finding in findings if not finding.stage or finding.stage in wanted]
    if share < 1 and units:
        chosen = random.Random(seed).sample(range(len(units)), max(1, round(share * len(units))))
        units = [units[index] for index in sorted(chosen)]
    return Survey(findings, units)


def check_units(
    units: Collection[StoredUnit], workers: int = 4, progress: Callable[[int, int], None] | None = None
) -> Iterator[Finding]:
    """Read, hash, decode and compare everything that the units hold; yield what is wrong, in their order.

    `workers` threads hold a file each. `progress` is told the bytes checked and all that there are.
    """
    total, done = sum(stored.size for stored in units), 0
    told: set[Finding] = set()
    if progress is not None:
        progress(0, total)
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        for stored, findings in zip(units, pool.map(_check_unit, units), strict=True):
            yield from (finding for finding in findings if finding not in told)
            told.update(finding for finding in findings if finding.unit is None)
            done += stored.size
            if progress is not None:
                progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)


def is_temporary(path: str) -> bool:
    """Tell whether a file is one that is written before it gets its name, or to try whether one can write."""
    return _TEMPORARY.fullmatch(path.rsplit("/", 1)[-1]) is not None


def _runs(
    store: str, run: str | None, findings: list[Finding]
) -> tuple[dict[str, dict[str, dict]], dict[str, str]]:
    """Read the run records.

    Returns what the runs hold for each stage directory, by its path and the name of the run, and for each
    directory the first run that names it.
    """
    wanted: dict[str, dict[str, dict]] = {}
    for name in run_names(store) if run is None else [run]:
        try:
            content = read_run(store, name) or {"stages": {}}
        except StoreError as error:
            kind = Kind.RUN if isinstance(error, DamagedError) else Kind.UNREADABLE
            findings.append(Finding(kind, f"runs/{name}.json", _reason(error, "it is damaged")))
            continue
        for path, place in places(content):
            wanted.setdefault(path, {})[name] = place
    return wanted, {path: f"the run {min(by_run)}" for path, by_run in wanted.items()}


def _specs(store: str, findings: list[Finding]) -> dict[str, StageSpec | None]:
    """Read every stage.json, by the path of its directory; None where it cannot be read."""
    specs: dict[str, StageSpec | None] = {}
    for stage, digest in directories(store):
        path = f"{stage}/{digest}"
        try:
            specs[path] = read_spec(store, stage, digest)
        except StoreError as error:
            specs[path] = None
            kind = Kind.STAGE if isinstance(error, DamagedError) else Kind.UNREADABLE
            findings.append(Finding(kind, f"{path}/stage.json", _reason(error, "it is damaged"), path))
    return specs


def _missing_stages(specs: Mapping[str, StageSpec | None], named: Mapping[str, str]) -> list[Finding]:
    """What runs or stages name although it is not there."""
    needed = dict(named)
    for spec in filter(None, specs.values()):
        for path in map("/".join, spec.inputs.items()):
            needed.setdefault(path, spec.path)
    return [
        Finding(Kind.STAGE, f"{path}/stage.json", f"it is missing, but {who} names it", path)
        for path, who in needed.items()
        if path not in specs
    ]


def _survey_stage(
    spec: StageSpec, wanted: Mapping[str, dict] | None, findings: list[Finding]
) -> list[StoredUnit]:
    """Check one stage directory but for what its units hold; `wanted` are the extents to keep to."""
    try:
        entries = spec.location.walk("")
    except StoreError as error:
        findings.append(Finding(Kind.UNREADABLE, spec.path, str(error), spec.path))
        return []
    files = {entry.path: entry.size for entry in entries}
    names = [path.removeprefix("done/") for path in files if path.startswith("done/")]
    units = sorted(unit for name in names if (unit := unit_of(name)) is not None)
    broken = zarr_arrays.damaged_metadata(spec, units)
    findings += [
        Finding(
            Kind.ARRAYS if isinstance(error, DamagedError) else Kind.UNREADABLE,
            f"{spec.path}/{path}",
            _reason(error, "it is not what describes the committed units"),
            spec.path,
        )
        for path, error in broken.items()
    ]
    findings += _temporaries(spec.path, entries)
    if wanted is not None:
        inside = set().union(*(units_of(spec, place) for place in wanted.values()))
        units = [unit for unit in units if unit in inside]
    return [StoredUnit(spec, unit, files, decodable=not broken) for unit in units]


def _temporaries(folder: str, entries: Iterable[Entry]) -> list[Finding]:
    now = time.time()
    return [
        Finding(Kind.TEMPORARY, f"{folder}/{one.path}", "a killed writer left it")
        for one in entries
        if is_temporary(one.path) and now - one.modified > ABANDONED
    ]


def _check_unit(stored: StoredUnit) -> list[Finding]:
    """Return what is wrong with a unit."""
    spec, unit = stored.spec, stored.unit

    def found(kind: Kind, path: str, problem: str) -> Finding:
        return Finding(kind, f"{spec.path}/{path}", problem, spec.path, unit)

    try:
        record = read_record(spec, unit)
    except StoreError as error:
        kind = Kind.UNIT if isinstance(error, DamagedError) else Kind.UNREADABLE
        return [found(kind, record_path(unit), _reason(error, "the record is damaged"))]
    findings = []
    for path in sorted({*unit_paths(spec, unit), *record.sha256}):
        try:
            # what was listed before a unit was committed beside us is not missing
            if path not in stored.files and not spec.location.exists(path):
                findings.append(found(Kind.UNIT, path, "it is missing"))
                continue
            data = spec.location.read_bytes(path)
        except StoreError as error:
            findings.append(found(Kind.UNREADABLE, path, str(error)))
            continue
        if path not in record.sha256:
            findings.append(found(Kind.UNIT, path, "the record does not name it"))
        elif hashlib.sha256(data).hexdigest() != record.sha256[path]:
            findings.append(found(Kind.UNIT, path, "it is not what was committed"))
        elif path == part_path(unit) and (problem := _row_problem(spec, unit, record, data)):
            findings.append(found(Kind.UNIT, path, problem))
        elif stored.decodable:
            findings += _decoded(spec, unit, path, data)
    return findings


def _decoded(spec: StageSpec, unit: Unit, path: str, data: bytes) -> list[Finding]:
    """Decode a shard whose bytes are right; other files than shards are passed over."""
    for array in spec.arrays:
        if array_path(spec, array, unit) == path:
            try:
                zarr_arrays.decode_unit(spec, unit, array, data)
            except StoreError as error:
                metadata = f"{spec.path}/arrays.zarr/{array.name}/zarr.json"
                kind = Kind.ARRAYS if isinstance(error, DamagedError) else Kind.UNREADABLE
                problem = _reason(error, "shards that are whole cannot be decoded with it")
                return [Finding(kind, metadata, problem, spec.path)]
    return []


def _row_problem(spec: StageSpec, unit: Unit, record: Record, data: bytes) -> str | None:
    """Return what is wrong with rows whose bytes are right; None if nothing is."""
    try:
        rows = tables.parse_part(spec, data)
    except DamagedError as error:
        return str(error).rstrip(".")
    axes = [axis for axis in ("identity", "replicate") if axis in rows.column_names]
    spans = {"identity": spec.grid.identities_of(unit), "replicate": spec.grid.replicates_of(unit)}
    expected = set(product(*(spans[axis] for axis in axes)))
    found = list(zip(*(rows.column(axis).to_pylist() for axis in axes), strict=True))
    if len(found) != len(expected) or set(found) != expected:
        return f"its {len(found)} rows are not the unit's {len(expected)} samples, each once"
    ok = count_ok(rows)
    if (record.rows, record.ok, record.failed) != (rows.num_rows, ok, rows.num_rows - ok):
        return "the record counts other rows"
    return None


def _reason(error: StoreError, damaged: str) -> str:
    """Say what a file's damage is in few words, and in its own words why it could not be read."""
    return damaged if isinstance(error, DamagedError) else str(error)

"""Making units pending, together with all that was made from them, so that the next build makes them again.

Records are removed, never data. What was made last is forgotten first: killed in between, whatever is still
committed was made from what is still committed, and a second call finds the rest.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from negfacediff_core.errors import StoreError
from negfacediff_core.store import arrays as zarr_arrays
from negfacediff_core.store.layout import StageSpec, Unit
from negfacediff_core.store.location import locate
from negfacediff_core.store.records import committed, forget, read_record
from negfacediff_core.store.runs import read_run, run_names
from negfacediff_core.store.shards import read_rows
from negfacediff_core.store.status import places, stages, wanted_units
from negfacediff_core.store.verify import Finding, Kind

# Stages, with an input of which each of their units reads everything: scores compare all identities, and what
# the gallery has in their place are its images, which are not those of the run.
_READ_WHOLE = frozenset({("scores", "embeddings"), ("neighbours", "gallery"), ("leakage", "gallery")})

Units = dict[str, set[Unit]]


@dataclass
class Repair:
    """What a repair has done: files mended, and by stage directory the units that are pending again.

    `damaged` are those with a finding, `derived` those that were made from them, `left` the findings that
    only a person can mend, or that wait until something else is.
    """

    files: list[str] = field(default_factory=list)
    damaged: Units = field(default_factory=dict)
    derived: Units = field(default_factory=dict)
    left: list[Finding] = field(default_factory=list)


def repair(store: str, findings: Iterable[Finding]) -> Repair:
    """Mend what was found, as far as that is safe; no build of the store may be running.

    A damaged unit becomes pending. Metadata of arrays are written again. A damaged `stage.json` is removed if
    a run names it: the next build of that run writes it again, and finds the committed units. While one is
    missing nobody knows what was made from what, so that damaged units stay as they are until then.
    """
    done = Repair()
    by_kind: dict[Kind, list[Finding]] = {kind: [] for kind in Kind}
    for finding in findings:
        by_kind[finding.kind].append(finding)
    unknown = _drop_descriptions(store, by_kind[Kind.STAGE], done.files)
    done.left += by_kind[Kind.RUN] + by_kind[Kind.UNREADABLE]
    done.left += [finding for finding in by_kind[Kind.STAGE] if finding.path not in done.files]
    if unknown or any(finding.path.endswith("stage.json") for finding in by_kind[Kind.UNREADABLE]):
        done.left += by_kind[Kind.ARRAYS] + by_kind[Kind.UNIT]
        return done
    by_path = {spec.path: spec for spec in stages(store)}
    unreadable = {finding.stage for finding in by_kind[Kind.UNREADABLE] if finding.unit is None}
    for path in dict.fromkeys(finding.stage for finding in by_kind[Kind.ARRAYS]):
        broken = [finding for finding in by_kind[Kind.ARRAYS] if finding.stage == path]
        if path in unreadable:  # they are written with those that could not be read, or not at all
            done.left += broken
            continue
        _write_metadata(by_path[path], [finding.path.removeprefix(f"{path}/") for finding in broken])
        done.files += [finding.path for finding in broken]
    for finding in by_kind[Kind.UNIT]:
        assert finding.unit is not None
        done.damaged.setdefault(finding.stage, set()).add(finding.unit)
    done.derived = forget_units(store, done.damaged)
    return done


def forget_units(store: str, units: Mapping[str, Collection[Unit]]) -> Units:
    """Make units of stage directories, by path, pending, and all that was made from them.

    A unit was made from those of its input stages that share identities with it and, where both stages have
    replicates, replicates; so an evaluation is made anew as a whole, and with any unit of a gallery all that
    was compared with it. Units that only looked for a negative among the contexts of other blocks are kept:
    on one kind of device these come out the same again.

    Returns the units that were made from the given ones, by the path of their stage directory.
    """
    specs = stages(store)
    by_path = {spec.path: spec for spec in specs}
    lost: Units = {path: set(given) for path, given in units.items()}
    for spec in specs:
        for path in map("/".join, spec.inputs.items()):
            if path in lost:
                derived = _made_from(spec, by_path[path], lost[path])
                lost.setdefault(spec.path, set()).update(derived)
    for spec in reversed(specs):
        # The units that were given come last in their stage: while their records stand, they are found again.
        given = units.get(spec.path, ())
        for unit in sorted(lost.get(spec.path, ()), key=lambda unit: (unit in given, unit)):
            forget(spec, unit)
    derived_units = {path: found - set(units.get(path, ())) for path, found in lost.items()}
    return {path: found for path, found in derived_units.items() if found}


def failed_units(store: str, run: str) -> dict[str, dict[Unit, int]]:
    """Return the committed units of a run with rows that failed, and how many, by stage directory.

    Images without a face have not failed. Raises StoreError if a record or rows are damaged.
    """
    specs = stages(store)
    wanted = wanted_units(store, specs)
    failed: dict[str, dict[Unit, int]] = {}
    for spec in specs:
        for unit in sorted(wanted[spec.path].get(run, set()).intersection(committed(spec))):
            if count := _failed_rows(spec, unit):
                failed.setdefault(spec.path, {})[unit] = count
    return failed


def _failed_rows(spec: StageSpec, unit: Unit) -> int:
    if not read_record(spec, unit).failed:
        return 0
    return read_rows(spec, unit).column("status").to_pylist().count("failed")


def _made_from(spec: StageSpec, source: StageSpec, lost: Collection[Unit]) -> Iterator[Unit]:
    """Yield the committed units of a stage that read one of the `lost` units of its input `source`."""
    if (spec.name, source.name) in _READ_WHOLE:
        yield from committed(spec) if lost else ()
        return
    lost_blocks = {unit.identity_block for unit in lost}
    for unit in committed(spec):
        identities = _blocks(spec.grid.identities_of(unit), source.grid.block_identities)
        near = lost_blocks.intersection(identities)
        if near and spec.per_replicate and source.per_replicate:
            replicates = _blocks(spec.grid.replicates_of(unit), source.grid.block_replicates)
            near = {block for block in near if any(Unit(block, one) in lost for one in replicates)}
        if near:
            yield unit


def _blocks(numbers: range, size: int) -> range:
    """The blocks of `size` that hold `numbers`."""
    return range(numbers.start // size, (numbers.stop - 1) // size + 1)


def _drop_descriptions(store: str, findings: Iterable[Finding], dropped: list[str]) -> bool:
    """Remove each damaged stage.json that a run names, and note it in `dropped`.

    Returns whether some units are known to be committed of which nobody knows what they were made from.
    """
    named = set()
    for name in run_names(store):
        with suppress(StoreError):  # a damaged run record is a finding of its own
            named |= {path for path, _ in places(read_run(store, name) or {"stages": {}})}
    location, unknown = locate(store), False
    for finding in findings:
        there = location.exists(finding.path)
        if there and finding.stage in named:
            location.remove(finding.path)
            dropped.append(finding.path)
        unknown |= bool(location.names(f"{finding.stage}/done")) or (there and finding.stage not in named)
    return unknown


def _write_metadata(spec: StageSpec, paths: Collection[str]) -> None:
    """Write damaged metadata of a stage's arrays over what is there: in the extent of what is committed."""
    with spec.location.lock("stage") as lock:
        covering = zarr_arrays.covering(spec, committed(spec))
        lock.check()
        zarr_arrays.grow(covering, anew=paths)

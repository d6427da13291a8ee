"""What stands in a store, from disk alone."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from negfacediff_core.errors import StoreError
from negfacediff_core.store.layout import StageSpec, Unit, read_spec
from negfacediff_core.store.location import locate
from negfacediff_core.store.records import Record, committed, each_record
from negfacediff_core.store.runs import read_runs, run_names


@dataclass(frozen=True)
class StageStatus:
    """How far one stage directory is.

    `done` and `pending` count units, `rows` and `failed` the rows of the units done; `pending` covers the
    extents of the runs named. `rate` is rows a second while units were being worked on, None before the first
    is done; `seconds_left` takes that rate for what is pending.
    """

    stage: str
    fingerprint: str
    runs: tuple[str, ...]
    done: int
    pending: int
    rows: int
    failed: int
    rate: float | None
    seconds_left: float | None


def status(store: str) -> list[StageStatus]:
    """Return the status of every stage directory of a store, inputs before what is made of them.

    A stage directory is a folder that holds a `stage.json`; whatever else lies there is passed over, so
    that a place that is no store has none.
    """
    specs = stages(store)
    wanted = wanted_units(store, specs)
    return [_stage_status(spec, wanted[spec.path]) for spec in specs]


def directories(store: str) -> list[tuple[str, str]]:
    """Return stage and fingerprint of every stage directory of a store, whatever its `stage.json` holds."""
    location = locate(store)
    return [
        (stage, digest)
        for stage in location.names("")
        for digest in location.names(stage)
        if location.exists(f"{stage}/{digest}/stage.json")
    ]


def stages(store: str) -> list[StageSpec]:
    """Return every stage of a store, inputs before what is made of them; their grids have no extent."""
    return inputs_first([read_spec(store, *directory) for directory in directories(store)])


def inputs_first(specs: Iterable[StageSpec]) -> list[StageSpec]:
    """Sort stages so that each comes after those that it reads."""
    by_path = {spec.path: spec for spec in specs}
    return sorted(by_path.values(), key=lambda spec: (_depth(spec, by_path), spec.path))


def check_store(store: str) -> None:
    """Raise StoreError unless `store` is one: it holds a stage directory or a run record."""
    if not directories(store) and not run_names(store):
        raise StoreError(f"There is no store at {store}: no stage directory lies there. Check the path.")


def unfinished(store: str) -> dict[str, int]:
    """Return the runs that have not come to their end, by name, with the number of units that they lack.

    The units of a stage directory that is gone are not counted.
    """
    by_path = {spec.path: spec for spec in stages(store)}
    done = {path: set(committed(spec)) for path, spec in by_path.items()}
    left = {}
    for name, run in read_runs(store).items():
        wanted = {path: units_of(by_path[path], place) for path, place in places(run) if path in by_path}
        lacking = sum(len(units - done[path]) for path, units in wanted.items())
        if lacking or len(wanted) < len(run["stages"]) or run.get("seconds") is None:
            left[name] = lacking
    return left


def units_of(spec: StageSpec, place: dict[str, Any]) -> set[Unit]:
    """Return the units of a stage that a run covers; `place` is what its record holds for the stage."""
    extent = {axis: place[axis] for axis in ("identities", "replicates")}
    return set(replace(spec.grid, **extent).units())


def rate(done: Iterable[Record]) -> float | None:
    """Return rows a second of the wall-clock time in which some unit was being worked on; None of nothing."""
    rows, spans = 0, []
    for record in done:
        rows += record.rows
        spans.append((record.started, record.finished))
    return _rate(rows, spans)


def seconds_worked(done: Iterable[Record]) -> float:
    """Return the wall-clock time in which some unit was being worked on, whatever lay between."""
    return _covered((record.started, record.finished) for record in done)


def _rate(rows: int, spans: Iterable[tuple[float, float]]) -> float | None:
    seconds = _covered(spans)
    return rows / seconds if seconds > 0 else None


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return how much time lies in one or more of the spans `(start, end)`."""
    seconds, until = 0.0, float("-inf")
    for started, finished in sorted(spans):
        seconds += max(0.0, finished - max(started, until))
        until = max(until, finished)
    return seconds


def wanted_units(store: str, specs: Iterable[StageSpec]) -> dict[str, dict[str, set[Unit]]]:
    """By stage path and run name, the units of the run's extent; a directory since deleted wants nothing."""
    by_path = {spec.path: spec for spec in specs}
    wanted: dict[str, dict[str, set[Unit]]] = {path: {} for path in by_path}
    for run, content in read_runs(store).items():
        for path, place in places(content):
            if path in by_path:
                wanted[path][run] = units_of(by_path[path], place)
    return wanted


def places(run: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The stage directories of a run record, with what it says of each."""
    return [(f"{stage}/{place['fingerprint']}", place) for stage, place in run["stages"].items()]


def _stage_status(spec: StageSpec, wanted: dict[str, set[Unit]]) -> StageStatus:
    done, spans, rows, failed = set(), [], 0, 0
    for record in each_record(spec):
        done.add(record.unit)
        spans.append((record.started, record.finished))
        rows += record.rows
        failed += record.failed
    pending = len(set().union(*wanted.values()) - done)
    speed = _rate(rows, spans)
    left = pending * rows / len(done) / speed if speed and done else None
    return StageStatus(
        stage=spec.name,
        fingerprint=spec.fingerprint,
        runs=tuple(sorted(wanted)),
        done=len(done),
        pending=pending,
        rows=rows,
        failed=failed,
        rate=speed,
        seconds_left=left,
    )


def _depth(spec: StageSpec, by_path: dict[str, StageSpec]) -> int:
    """Longest way from a stage to one without inputs; an input that was deleted counts as such."""
    above = [by_path[path] for name, digest in spec.inputs.items() if (path := f"{name}/{digest}") in by_path]
    return 1 + max((_depth(stage, by_path) for stage in above), default=0)

"""What stands in a store, from disk alone."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from negfacediff_core.store.layout import StageSpec, Unit, read_spec
from negfacediff_core.store.location import locate
from negfacediff_core.store.records import Record, records
from negfacediff_core.store.runs import read_runs


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
    location = locate(store)
    specs = [
        read_spec(store, stage, digest)
        for stage in location.names("")
        for digest in location.names(stage)
        if location.exists(f"{stage}/{digest}/stage.json")
    ]
    by_path = {spec.path: spec for spec in specs}
    specs.sort(key=lambda spec: (_depth(spec, by_path), spec.path))
    wanted = _wanted_units(store, by_path)
    return [_stage_status(spec, wanted[spec.path]) for spec in specs]


def rate(done: Iterable[Record]) -> float | None:
    """Return rows a second of the wall-clock time in which some unit was being worked on; None of nothing."""
    rows, seconds, until = 0, 0.0, float("-inf")
    for record in sorted(done, key=lambda record: record.started):
        rows += record.rows
        seconds += max(0.0, record.finished - max(record.started, until))
        until = max(until, record.finished)
    return rows / seconds if seconds > 0 else None


def _wanted_units(store: str, by_path: dict[str, StageSpec]) -> dict[str, dict[str, set[Unit]]]:
    """By stage path and run name, the units of the run's extent; a directory since deleted wants nothing."""
    wanted: dict[str, dict[str, set[Unit]]] = {path: {} for path in by_path}
    for run, content in read_runs(store).items():
        for stage, place in content["stages"].items():
            path = f"{stage}/{place['fingerprint']}"
            if path in by_path:
                extent = {axis: place[axis] for axis in ("identities", "replicates")}
                wanted[path][run] = set(replace(by_path[path].grid, **extent).units())
    return wanted


def _stage_status(spec: StageSpec, wanted: dict[str, set[Unit]]) -> StageStatus:
    done = records(spec)
    pending = len(set().union(*wanted.values()) - {record.unit for record in done})
    speed = rate(done)
    rows = sum(record.rows for record in done)
    left = pending * rows / len(done) / speed if speed and done else None
    return StageStatus(
        stage=spec.name,
        fingerprint=spec.fingerprint,
        runs=tuple(sorted(wanted)),
        done=len(done),
        pending=pending,
        rows=rows,
        failed=sum(record.failed for record in done),
        rate=speed,
        seconds_left=left,
    )


def _depth(spec: StageSpec, by_path: dict[str, StageSpec]) -> int:
    """Longest way from a stage to one without inputs; an input that was deleted counts as such."""
    above = [by_path[path] for name, digest in spec.inputs.items() if (path := f"{name}/{digest}") in by_path]
    return 1 + max((_depth(stage, by_path) for stage in above), default=0)

"""`negfacediff resume` and `retry-failed`: going on with runs as their records say."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from flows.command import DEFAULTS, Verbose, build_in, with_execution
from flows.words import command_text, count_text
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import StoreError

if TYPE_CHECKING:
    from flows.leakage import GateRecord
    from negfacediff_core.config import BuildConfig
    from negfacediff_core.store.layout import StageSpec, Unit

    # By stage directory the units with failed rows, and how many.
    Failed = Mapping[str, Mapping[Unit, int]]

Store = Annotated[str, typer.Argument(help="Folder or fsspec URL of a store.")]
Run = Annotated[
    str | None, typer.Argument(help="Name of the run; may be left out where only one comes into question.")
]


class Resumption(NamedTuple):
    """A run that can go on: its failed rows, and the units that it lacks, None if it is complete."""

    run: str
    failed: "Failed"
    lacking: int | None


@with_execution("approve_above_hours")
def resume(
    store: Store,
    run: Run = None,
    execution: ExecutionConfig = DEFAULTS,
    verbose: Verbose = False,
) -> None:
    """Go on with a build or a leakage gate that was interrupted, as its record says; what is done stays."""
    found = find_open(store, run)
    if found is None:
        print(complete_text(store))
        return
    _go_on(store, recorded(store, found.run, execution), execution, verbose)


@with_execution("approve_above_hours")
def retry_failed(
    store: Store,
    run: Run = None,
    execution: ExecutionConfig = DEFAULTS,
    verbose: Verbose = False,
) -> None:
    """Make units of a run that failed, or have failed rows, and what was made from them again, and finish it.

    Images without a face have not failed. What failed for a lasting reason fails in the same way again. Stop
    builds into the store first: records are removed without waiting for them, and one that just reads such a
    unit fails, to be run again. The deployment resume-failed waits for its turn before.
    """
    found = find_failed(store, run)
    if found is None:
        print(f"No unit has failed rows. {complete_text(store)}")
        return
    made_by = recorded(store, found.run, execution)
    for sentence in forget_failed(store, found):
        print(sentence)
    _go_on(store, made_by, execution, verbose)


def complete_text(store: str) -> str:
    """Say that there is nothing to go on with."""
    return f"Every run in {store} is complete."


def find_open(store: str, run: str | None) -> Resumption | None:
    """Return the run that was interrupted, the only one unless it is named; None if there is none.

    Raises StoreError if there are several, naming the command for each, or there is no such store.
    """
    from negfacediff_core.store.status import check_store, unfinished

    check_store(store)
    if run is not None:
        return Resumption(run, {}, None)
    open_runs = unfinished(store)
    if not open_runs:
        return None
    run = _only("resume", store, {name: _state({}, units) for name, units in open_runs.items()})
    return Resumption(run, {}, open_runs[run])


def find_failed(store: str, run: str | None) -> Resumption | None:
    """Return the run that was interrupted or has failed rows, the only one unless it is named; None likewise.

    Raises StoreError as `find_open`, and if there is no such run.
    """
    from negfacediff_core.store.runs import check_run, read_runs
    from negfacediff_core.store.status import check_store, unfinished

    check_store(store)
    if run is not None:
        check_run(store, run)
    names = sorted(read_runs(store)) if run is None else [run]
    failed = {name: stages for name in names if (stages := _failed(store, name, named=run is not None))}
    lacking = unfinished(store)
    if run is None:
        if not failed and not lacking:
            return None
        candidates = {
            name: _state(failed.get(name, {}), lacking.get(name)) for name in sorted({*failed, *lacking})
        }
        run = _only("retry-failed", store, candidates)
    return Resumption(run, failed.get(run, {}), lacking.get(run))


def forget_failed(store: str, found: Resumption) -> list[str]:
    """Make the units with failed rows, and what was made from them, pending; say what is to be made."""
    from negfacediff_core.store.repair import forget_units
    from negfacediff_core.store.status import unfinished

    derived = forget_units(store, {path: set(counts) for path, counts in found.failed.items()})
    said = []
    if found.lacking is not None:
        said.append(f"Missing: {count_text(found.lacking, 'unit')}.")
    if found.failed or found.lacking is None:
        besides = count_text(sum(map(len, derived.values())), "unit")
        said.append(f"Pending again: {_rows_text(found.failed)}, and {besides} made from them.")
    others = [command_text("resume", store, name) for name in unfinished(store) if name != found.run]
    if others:
        said.append("Other runs are not complete; afterwards: " + "; ".join(others))
    return said


def recorded(store: str, run: str, execution: ExecutionConfig) -> "GateRecord | BuildConfig":
    """Return the build or the leakage gate that made a run, checked so that it can go on.

    Raises StoreError if there is no such run, or if it would now make another dataset, and as the build or
    the gate does that made it.
    """
    from flows.leakage import on_cpu, read_gate, stages_of_gate
    from negfacediff_core.stages.build import plan_build
    from negfacediff_core.store.runs import check_run
    from tasks.executors import check_available

    check_run(store, run)
    gate = read_gate(store, run)
    if gate is not None:
        check_available(on_cpu(execution))
        check_same(stages_of_gate(store, run, gate), store, run, "leakage")
        return gate
    build = build_of(store, run)
    check_available(execution, build.samples.precision)
    check_same(plan_build(build, store), store, run, "build")
    return build


def _go_on(
    store: str, made_by: "GateRecord | BuildConfig", execution: ExecutionConfig, verbose: bool
) -> None:
    """Bring a run to its end with what made it."""
    from flows.leakage import GateRecord, gate_in, on_cpu

    if isinstance(made_by, GateRecord):
        gate_in(store, made_by.run, made_by.settings, on_cpu(execution), verbose)
    else:
        build_in(store, made_by, execution, verbose)


def build_of(store: str, run: str) -> "BuildConfig":
    """Return the build that a run record holds; StoreError if there is none, or it is not a build's."""
    from flows.presets import check_build
    from negfacediff_core.store.runs import check_run, read_run

    check_run(store, run)
    record = read_run(store, run) or {}
    if "gate" in record:
        raise StoreError(f"The run {run} in {store} was made by negfacediff leakage and not by a build.")
    if not isinstance(record.get("config"), dict):
        again = command_text("build", "PRESET", "--store", store, "--set", f"name={run}")
        raise StoreError(
            f"The run {run} in {store} does not say how it was built; build it again as it was: {again}"
        )
    return check_build(record["config"], f"the run {run} in {store}")


def check_same(specs: "Iterable[StageSpec]", store: str, run: str, command: str) -> None:
    """Raise StoreError if the planned stages of a run are not where its record says.

    Weights that were exchanged, or a newer version of the code, move a stage to another place.
    """
    from negfacediff_core.store.runs import read_run

    recorded = (read_run(store, run) or {"stages": {}})["stages"]
    for spec in specs:
        place = recorded.get(spec.name)
        if place is not None and place["fingerprint"] != spec.fingerprint:
            raise StoreError(
                f"The run {run} would not go on but begin anew from its {spec.name}: its weights, files or "
                f"version of the code are not those that it was made with ({place['fingerprint']} is "
                f"now {spec.fingerprint}). Bring those back; to make it anew, use negfacediff {command} with "
                "the settings in its record."
            )


def _failed(store: str, run: str, named: bool) -> "Failed":
    """Return the failed rows of a run that are its own.

    What a leakage gate has kept are copies: they are made again with the run that the gate looked at.
    StoreError says so if it was `named`.
    """
    from flows.leakage import holds_kept, read_gate
    from negfacediff_core.store.repair import failed_units

    failed = failed_units(store, run)
    gate = read_gate(store, run)
    if not failed or gate is None or not holds_kept(run, gate):
        return failed
    if named:
        raise StoreError(
            f"What failed in {run} is a copy of what failed in {gate.run}: "
            f"{command_text('retry-failed', store, gate.run)}; afterwards: "
            f"{command_text('resume', store, run)}"
        )
    return {}


def _state(failed: "Failed", lacking: int | None) -> str:
    """Say what a run has that failed, and what it lacks; None where it is complete."""
    parts = [f"has {_rows_text(failed)}"] if failed else []
    parts += [] if lacking is None else [f"lacks {count_text(lacking, 'unit')}"]
    return " and ".join(parts)


def _rows_text(failed: "Failed") -> str:
    """Count failed rows and their units over stages."""
    rows = count_text(sum(sum(counts.values()) for counts in failed.values()), "failed row")
    return f"{rows} in {count_text(sum(map(len, failed.values())), 'unit')}"


def _only(command: str, store: str, runs: Mapping[str, str]) -> str:
    """Return the only run; StoreError that lists them with the command for each if there are several."""
    if len(runs) == 1:
        return next(iter(runs))
    choices = "; ".join(f"{name} {what}: {command_text(command, store, name)}" for name, what in runs.items())
    raise StoreError(f"{len(runs)} runs in {store} come into question, name one: {choices}")

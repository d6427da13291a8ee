"""`negfacediff resume` and `retry-failed`: going on with builds as their run records say."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from flows.command import DEFAULTS, Verbose, build_in, with_execution
from flows.words import command_text, count_text, names_text
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import StoreError

if TYPE_CHECKING:
    from negfacediff_core.config import BuildConfig
    from negfacediff_core.store.layout import Unit

Store = Annotated[str, typer.Argument(help="Folder or fsspec URL of a store.")]
Run = Annotated[
    str | None, typer.Argument(help="Name of the run; may be left out where only one comes into question.")
]


@with_execution("approve_above_hours")
def resume(
    store: Store,
    run: Run = None,
    execution: ExecutionConfig = DEFAULTS,
    verbose: Verbose = False,
) -> None:
    """Go on with a build that was interrupted, as its run record says; what is committed stays."""
    from negfacediff_core.store.status import check_store, unfinished

    check_store(store)
    if run is None:
        open_runs = unfinished(store)
        if not open_runs:
            print(f"Every run in {store} is complete.")
            return
        lacking = {name: f"lacks {count_text(units, 'unit')}" for name, units in open_runs.items()}
        run = _only("resume", store, lacking)
    build = build_of(store, run)
    check_same(build, store, run)
    build_in(store, build, execution, verbose)


@with_execution("approve_above_hours")
def retry_failed(
    store: Store,
    run: Run = None,
    execution: ExecutionConfig = DEFAULTS,
    verbose: Verbose = False,
) -> None:
    """Make the units of a run again that have failed rows, and what was made from them, and finish the run.

    Images without a face have not failed. What failed for a lasting reason fails in the same way again.
    """
    from negfacediff_core.store.repair import failed_units, forget_units
    from negfacediff_core.store.runs import read_runs
    from negfacediff_core.store.status import check_store, unfinished
    from tasks.executors import check_available

    check_store(store)
    names = sorted(read_runs(store)) if run is None else [run]
    failed = {name: stages for name in names if (stages := failed_units(store, name))}
    if run is None:
        if not failed:
            left = "; ".join(command_text("resume", store, name) for name in unfinished(store))
            print(f"No unit has failed rows.{' For units that are missing: ' + left if left else ''}")
            return
        counted = {name: f"has {_rows_text(stages)}" for name, stages in failed.items()}
        run = _only("retry-failed", store, counted)
    build = build_of(store, run)
    check_available(execution, build.samples.precision)
    check_same(build, store, run)
    retried = failed.get(run, {})
    derived = forget_units(store, {path: set(counts) for path, counts in retried.items()})
    besides = count_text(sum(map(len, derived.values())), "unit")
    print(f"Pending again: {_rows_text(retried)}, and {besides} made from them.")
    others = [command_text("resume", store, name) for name in unfinished(store) if name != run]
    if others:
        print("Other runs share these units; afterwards: " + "; ".join(others))
    build_in(store, build, execution, verbose)


def check_same(build: "BuildConfig", store: str, run: str) -> None:
    """Plan a build, and raise StoreError if it would now make another dataset than its run's record names.

    Weights that were exchanged, or a newer version of the code, move a stage to another place.
    """
    from negfacediff_core.stages import plan_build
    from negfacediff_core.store.runs import read_run

    recorded = (read_run(store, run) or {"stages": {}})["stages"]
    for spec in plan_build(build, store):
        place = recorded.get(spec.name)
        if place is not None and place["fingerprint"] != spec.fingerprint:
            raise StoreError(
                f"The run {run} would not go on but begin anew from its {spec.name}: its weights, files or "
                f"version of the code are not those that it was made with ({place['fingerprint']} is "
                f"now {spec.fingerprint}). Bring those back; to make it anew, use negfacediff build with the "
                "settings in its record."
            )


def build_of(store: str, run: str) -> "BuildConfig":
    """Return the build that a run record holds; StoreError if there is none, or it is not a build's."""
    from flows.presets import check_build
    from negfacediff_core.store.runs import read_run, run_names

    record = read_run(store, run)
    if record is None:
        raise StoreError(f"There is no run {run} in {store}; runs there: {names_text(run_names(store))}.")
    if not isinstance(record.get("config"), dict):
        again = command_text("build", "PRESET", "--store", store, "--set", f"name={run}")
        raise StoreError(
            f"The run {run} in {store} does not say how it was built; build it again as it was: {again}"
        )
    return check_build(record["config"], f"the run {run} in {store}")


def _rows_text(failed: "Mapping[str, Mapping[Unit, int]]") -> str:
    """Count failed rows and their units over stages."""
    rows = count_text(sum(sum(counts.values()) for counts in failed.values()), "failed row")
    return f"{rows} in {count_text(sum(map(len, failed.values())), 'unit')}"


def _only(command: str, store: str, runs: Mapping[str, str]) -> str:
    """Return the only run; StoreError that lists them with the command for each if there are several."""
    if len(runs) == 1:
        return next(iter(runs))
    choices = "; ".join(f"{name} {what}: {command_text(command, store, name)}" for name, what in runs.items())
    raise StoreError(f"{len(runs)} runs in {store} come into question, name one: {choices}")

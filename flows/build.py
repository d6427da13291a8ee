"""The flow `build_dataset`: contexts, negatives, samples, aligned, embeddings, evaluation, in rounds.

What is done is known from the store alone. Every round plans the pending units from disk, hands them out and
waits for them all; running the same build again after any interruption is therefore how one goes on with it.
"""

import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, pairwise
from time import sleep
from typing import Any, cast

from prefect import flow
from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectFuture
from prefect.states import Completed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from prefect.utilities.annotations import quote
from rich.console import Console

from flows.acknowledgement import acknowledged, licence_text
from flows.approval import approve_in_prefect
from flows.artifacts import (
    RESUME,
    progress_artifacts,
    publish,
    publish_failed_images,
    publish_failures,
)
from flows.form import STORE
from flows.launch import stop_embedded_server
from flows.progress import Meter, clock_text, show_progress
from flows.results import (
    failed_images,
    figures_of,
    record_run,
    recorded_energy,
    report_of,
    seconds_of,
    why_failed,
    write_page,
)
from flows.rounds import GROUPS, chunk_size
from flows.turns import turn
from flows.words import command_text, count_text
from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.errors import BuildError, PlaceError, StoreError
from negfacediff_core.stages.build import plan_build
from negfacediff_core.store.layout import StageSpec, Unit
from negfacediff_core.store.records import committed, pending
from negfacediff_core.store.shards import prepare
from tasks.chunks import Crew, Failure, Line, UnitsFailed, run_chunk, size_of
from tasks.energy import measured
from tasks.executors import check_available, open_pool
from tasks.worker_logs import run_logger
from tasks.workers import check_workers

#: What runs the chunks of every flow that makes units. Two overlap: while one waits for its last units, the
#: other keeps the workers busy. Prefect declares its runners for the exact kind of future that they hand out,
#: its flows for any.
CHUNK_RUNNER = cast("TaskRunner[PrefectFuture[Any]]", ThreadPoolTaskRunner(max_workers=2))
# Failed units that an error names; the rest are counted.
NAMED = 3
# Seconds that a process which is told to end has for telling Prefect so. A unit in the midst of sampling
# would hold it for minutes; it has committed nothing, and the next run makes it.
LEAVE = 4.0
# Seconds between two questions to a store that does not answer: ten minutes in all, then the build ends.
PAUSES = (5, 10, 20, 40, 80, 160, 285)
DEFAULT_EXECUTION = ExecutionConfig()


@flow(
    name="build-dataset",
    flow_run_name="{build.name}",
    task_runner=CHUNK_RUNNER,
)
def build_dataset(
    build: BuildConfig, execution: ExecutionConfig = DEFAULT_EXECUTION, store: str = STORE
) -> dict[str, Any]:
    """Build one dataset, or finish one, in `store` (a folder or an fsspec URL).

    Whatever can be is checked before work starts (ConfigError, WeightsError, ContextsError, StoreError).
    BuildError, naming units and logs, if some still fail when the rounds (`execution.retries`) are used up.
    Returns `name`, the `stages`' directories, the evaluation's `figures`, and the `seconds` that work on its
    units took, in this run or others.
    """
    return make_dataset(lambda: build, execution, store)


def make_dataset(settle: Callable[[], BuildConfig], execution: ExecutionConfig, store: str) -> dict[str, Any]:
    """Make, in the flow run at hand, the dataset whose settings `settle` returns, as `build_dataset` does.

    It is asked before, so that what cannot be is refused at once, and again when the store is this run's:
    the run that it waited for may have changed what is there. Nothing is written until then.
    """
    build = settle()
    check_available(execution, build.samples.precision)
    acknowledged(store, build.name, stages_of(build, store), execution)
    if execution.approve_above_hours:
        approve_in_prefect(build, store, execution)
    with turn(store):
        build = settle()
        return _make(build, stages_of(build, store), execution, store)


def _make(
    build: BuildConfig, specs: Mapping[str, StageSpec], execution: ExecutionConfig, store: str
) -> dict[str, Any]:
    """Make what the planned stages lack, and record, write and publish what came of it."""
    accepted = acknowledged(store, build.name, specs, execution)
    run_logger().info(licence_text(specs))
    for spec in specs.values():
        prepare(spec)
    # only images that are all made here, in one go, tell what they took
    whole = not execution.elsewhere and not committed(specs["samples"])
    joules = None if whole else recorded_energy(build, specs, store)
    record_run(build, specs, store, joules=joules, acknowledged=accepted)
    with measured() as energy:
        _run_stages(build.name, store, specs, execution)
    seconds = seconds_of(specs.values())
    record_run(build, specs, store, seconds, energy.joules if whole else joules, accepted)
    figures = figures_of(build.name, specs)
    report = report_of(f"Dataset {build.name}", [figures], [specs], seconds)
    summary = _summary(build, specs, store, seconds)
    pictures = write_page(specs, report)
    publish(build.name, report, pictures, f"{specs['evaluation'].directory}/report.html", summary)
    result = {
        "name": build.name,
        "stages": {name: spec.directory for name, spec in specs.items()},
        "figures": figures,
        "seconds": seconds,
    }
    # Prefect shows the state's message with the flow run, and hands its data to the caller.
    return cast("dict[str, Any]", Completed(message=summary, data=result))


def stages_of(build: BuildConfig, store: str) -> dict[str, StageSpec]:
    """Plan the stages of a build, by name, in order; checks everything, and raises as `build_dataset`."""
    return {spec.name: spec for spec in plan_build(build, store)}


def _summary(build: BuildConfig, specs: Mapping[str, StageSpec], store: str, seconds: float) -> str:
    """Say in a sentence or two what was built, and what of it failed; the images that did are listed."""
    made = f"{count_text(build.identities * build.images, 'image')} of {build.identities:,} identities"
    done = f"{made}, from {clock_text(seconds)} of work."
    failed = failed_images(specs["samples"])
    if not failed:
        return done
    publish_failed_images(build.name, store, failed, why_failed(specs["samples"], next(iter(failed))))
    again = command_text("retry-failed", store, build.name)
    return f"{done} {count_text(sum(failed.values()), 'image')} failed: to make them again, {again}"


def _run_stages(run: str, store: str, specs: Mapping[str, StageSpec], execution: ExecutionConfig) -> None:
    by_stage = {name: meter_of(spec) for name, spec in specs.items()}
    for before, stage in chain.from_iterable(map(pairwise, GROUPS)):
        by_stage[stage].follows = by_stage[before]
    groups = [[specs[stage] for stage in group] for group in GROUPS]
    run_groups(run, store, groups, list(by_stage.values()), execution, f"Building {run} in {store}")


def run_groups(
    run: str,
    store: str,
    groups: Sequence[Sequence[StageSpec]],
    meters: Sequence[Meter],
    execution: ExecutionConfig,
    title: str,
) -> None:
    """Bring groups of stages to their end, one after the other; starts no workers where nothing is left.

    `meters` are those of all the stages, and show on the console under `title`, and in Prefect. BuildError,
    which says how to go on with `run`, as `finish` raises it.
    """
    if all(meter.complete for meter in meters):
        return
    stop = threading.Event()
    with (
        open_pool(execution) as pool,
        show_progress(title, meters, Console(stderr=True)) as reporter,
        progress_artifacts(run, meters),
    ):
        check_workers(pool, chain.from_iterable(groups), execution)
        crew = Crew(pool, execution, reporter.started, reporter.committed, stop)
        try:
            for specs in groups:
                finish(specs, crew)
        except BaseException as error:
            # the chunks' threads end at their next look, before the pool is closed
            stop.set()
            if isinstance(error, TerminationSignal):
                threading.Thread(target=_leave, daemon=True).start()
            if isinstance(error, BuildError):
                failures = error.failures if isinstance(error, UnitsFailed) else ()
                publish_failures(run, store, str(error), failures)
                raise BuildError(f"{error} {_how_to_go_on(run, store)}") from error
            raise


def _leave() -> None:
    """End this process soon, whatever its threads are at."""
    threading.Event().wait(LEAVE)
    stop_embedded_server()
    os._exit(128 + signal.SIGTERM)


def _how_to_go_on(run: str, store: str) -> str:
    return (
        "What is committed stays. Mend the cause and run the same again, in Prefect by Retry; or go on with "
        f"{command_text('resume', store, run)}, in Prefect the deployment {RESUME}."
    )


def finish(specs: Sequence[StageSpec], crew: Crew) -> None:
    """Run rounds over the units that the stages `specs` lack.

    A store that does not answer, as in an outage, is waited for between rounds.

    Raises:
        BuildError: when the rounds are used up, or the store has not answered for too long (UnitsFailed); at
            once where nothing can be written.
    """
    failures: list[Failure] = []
    rounds = crew.execution.retries + 1
    for attempt in range(rounds):
        lines = _lines_left(specs, failures)
        if not lines:
            return
        # A unit that kills its worker takes along what runs beside it: in the end each has a chance alone.
        last = attempt == rounds - 1
        suspects = {failure.unit for failure in failures if failure.worker_died and last}
        alone = [line for line in lines if line.unit.name in suspects]
        together = [line for line in lines if line.unit.name not in suspects]
        try:
            failures = _run_round(together, attempt, crew) + _run_alone(alone, attempt, crew)
        except PlaceError as error:
            raise BuildError(f"The build stopped. {error}") from error
    if left := _lines_left(specs, failures):
        raise UnitsFailed(_describe_failures(failures, len(left), rounds), failures)


def _lines_left(specs: Sequence[StageSpec], failures: Sequence[Failure]) -> list[Line]:
    """Return `pending_lines`; a store that does not answer is asked again after each of PAUSES.

    Raises BuildError as `finish`, with the `failures` of the round before.
    """
    pauses = iter(PAUSES)
    while True:
        try:
            return pending_lines(specs)
        except PlaceError as error:
            raise BuildError(f"The build stopped. {error}") from error
        except StoreError as error:
            pause = next(pauses, None)
            if pause is None:
                said = f"The store has not answered for {clock_text(sum(PAUSES))}. {error}"
                raise UnitsFailed(said, failures) from error
            run_logger().warning("%s Asking again in %d s.", error, pause)
            sleep(pause)


def pending_lines(specs: Sequence[StageSpec]) -> list[Line]:
    """Return every unit that lacks some of the stages, with those that it lacks, in order: read from disk."""
    missing: dict[Unit, list[StageSpec]] = {}
    for spec in specs:
        for unit in pending(spec):
            missing.setdefault(unit, []).append(spec)
    return [Line(unit, tuple(missing[unit])) for unit in sorted(missing)]


def _run_round(lines: Sequence[Line], attempt: int, crew: Crew) -> list[Failure]:
    size = chunk_size(len(lines), crew.pool.workers)
    chunks = [lines[start : start + size] for start in range(0, len(lines), size)]
    stages = "+".join(dict.fromkeys(spec.name for line in lines for spec in line.specs))
    futures = [
        run_chunk.submit(
            f"{stages} {number}/{len(chunks)}" + (f" round {attempt + 1}" if attempt else ""),
            quote(chunk),
            attempt,
            quote(crew),
            return_state=False,  # the default, but only so is it known what is returned
        )
        for number, chunk in enumerate(chunks, start=1)
    ]
    return [failure for future in futures for failure in future.result()]


def _run_alone(lines: Sequence[Line], attempt: int, crew: Crew) -> list[Failure]:
    """Run lines one after the other in one chunk, when nothing else runs."""
    if not lines:
        return []
    label = f"{len(lines)} alone"
    return run_chunk.submit(label, quote(lines), attempt, quote(crew), window=1, return_state=False).result()


def _describe_failures(failures: Sequence[Failure], left: int, rounds: int) -> str:
    named = "; ".join(f"{one.error.rstrip('.')} (log {one.log})" for one in failures[:NAMED])
    more = f"; and {len(failures) - NAMED} more" if len(failures) > NAMED else ""
    return (
        f"{count_text(left, 'unit')} {'is' if left == 1 else 'are'} not done after "
        f"{count_text(rounds, 'round')}: {named or 'they ran, but left no record'}{more}."
    )


def meter_of(spec: StageSpec) -> Meter:
    """Return the progress meter of a stage: what its extent covers, and what of that is committed already."""
    left = sum(size_of(spec, unit) for unit in pending(spec))
    total = sum(size_of(spec, unit) for unit in spec.grid.units())
    parts = spec.grid.replicates > 1
    noun = "images" if spec.per_replicate else "parts" if parts else "identities"
    return Meter(spec.name, noun, total, before=total - left)

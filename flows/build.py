"""The flow `build_dataset`: contexts, negatives, samples, aligned, embeddings, evaluation, in rounds.

What is done is known from the store alone. Every round plans the pending units from disk, hands them out and
waits for them all; running the same build again after any interruption is therefore how one goes on with it.
"""

import threading
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, cast

from prefect import flow
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from prefect.utilities.annotations import quote
from rich.console import Console

from flows.approval import approve_in_prefect
from flows.progress import Meter, show_progress
from flows.results import (
    figures_of,
    publish,
    record_run,
    recorded_energy,
    report_of,
    seconds_of,
    write_page,
)
from flows.rounds import GROUPS, chunk_size
from flows.words import count_text
from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.errors import BuildError, PlaceError
from negfacediff_core.stages import plan_build
from negfacediff_core.store.layout import StageSpec, Unit
from negfacediff_core.store.records import committed, pending
from negfacediff_core.store.shards import prepare
from tasks.chunks import Crew, Failure, Line, run_chunk, size_of
from tasks.energy import measured
from tasks.executors import check_available, open_pool

# Two chunks overlap: while one waits for its last units, the other keeps the workers busy.
CHUNKS_AT_ONCE = 2
# Failed units that an error names; the rest are counted.
NAMED = 3
DEFAULT_EXECUTION = ExecutionConfig()


@flow(
    name="build-dataset",
    flow_run_name="{build.name}",
    # Prefect declares its runners for the exact kind of future that they hand out, its flows for any.
    task_runner=cast("TaskRunner[PrefectFuture[Any]]", ThreadPoolTaskRunner(max_workers=CHUNKS_AT_ONCE)),
)
def build_dataset(
    build: BuildConfig, execution: ExecutionConfig = DEFAULT_EXECUTION, store: str = "store"
) -> dict[str, Any]:
    """Build one dataset, or finish one, in `store` (a folder or an fsspec URL).

    Whatever can be is checked before work starts (ConfigError, WeightsError, ContextsError, StoreError).
    BuildError, naming units and logs, if some still fail when the rounds (`execution.retries`) are used up.
    Returns `name`, the `stages`' directories, the evaluation's `figures`, and the `seconds` that work on its
    units took, in this run or others.
    """
    check_available(execution, build.samples.precision)
    specs = stages_of(build, store)
    if execution.approve_above_hours:
        approve_in_prefect(build, store, execution)
    for spec in specs.values():
        prepare(spec)
    # only images that are all made here, in one go, tell what they took
    whole = "://" not in execution.executor and not committed(specs["samples"])
    joules = None if whole else recorded_energy(build, specs, store)
    record_run(build, specs, store, joules=joules)
    with measured() as energy:
        _run_stages(specs, execution, f"Building {build.name} in {store}")
    seconds = seconds_of(specs.values())
    record_run(build, specs, store, seconds, energy.joules if whole else joules)
    figures = figures_of(build.name, specs)
    report = report_of(f"Dataset {build.name}", [figures], [specs], seconds)
    publish(build.name, report, write_page(specs, report))
    return {
        "name": build.name,
        "stages": {name: spec.directory for name, spec in specs.items()},
        "figures": figures,
        "seconds": seconds,
    }


def stages_of(build: BuildConfig, store: str) -> dict[str, StageSpec]:
    """Plan the stages of a build, by name, in order; checks everything, and raises as `build_dataset`."""
    return {spec.name: spec for spec in plan_build(build, store)}


def _run_stages(specs: Mapping[str, StageSpec], execution: ExecutionConfig, title: str) -> None:
    """Bring every stage to its end, with progress on the console; starts no workers where nothing is left."""
    by_stage = {name: meter_of(spec) for name, spec in specs.items()}
    meters = list(by_stage.values())
    if all(meter.complete for meter in meters):
        return
    for before, stage in chain.from_iterable(map(pairwise, GROUPS)):
        by_stage[stage].follows = by_stage[before]
    stop = threading.Event()
    with (
        open_pool(execution) as pool,
        show_progress(title, meters, Console(stderr=True)) as reporter,
    ):
        crew = Crew(pool, execution, reporter.started, reporter.committed, stop)
        try:
            for group in GROUPS:
                finish([specs[stage] for stage in group], crew)
        except BaseException:
            # the chunks' threads end at their next look, before the pool is closed
            stop.set()
            raise


def finish(specs: Sequence[StageSpec], crew: Crew) -> None:
    """Run rounds over the units that the stages `specs` lack.

    Raises:
        BuildError: when the rounds are used up, or at once where nothing can be written any more.
    """
    failures: list[Failure] = []
    rounds = crew.execution.retries + 1
    for attempt in range(rounds):
        lines = pending_lines(specs)
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
    if left := pending_lines(specs):
        raise BuildError(_describe_failures(failures, len(left), rounds))


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
        f"{count_text(rounds, 'round')}: {named or 'they ran, but left no record'}{more}. "
        "Mend the cause and run the same command again: what is committed stays."
    )


def meter_of(spec: StageSpec) -> Meter:
    """Return the progress meter of a stage: what its extent covers, and what of that is committed already."""
    left = sum(size_of(spec, unit) for unit in pending(spec))
    total = sum(size_of(spec, unit) for unit in spec.grid.units())
    noun = "images" if spec.per_replicate else "identities"
    return Meter(spec.name, noun, total, before=total - left)

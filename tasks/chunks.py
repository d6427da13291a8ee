"""One Prefect task run handles a chunk of work units: it feeds them to a pool and holds a window of them.

A unit is taken through consecutive stages as a `Line`: its next stage starts as soon as its input unit is
committed, whatever the other units do. A unit that fails is logged beside its stage and named; others go on.
"""

import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import BuildError, NegFaceDiffError, PlaceError, StoreError, WorkerError
from negfacediff_core.stages.build import run_unit
from negfacediff_core.store.layout import StageSpec, Unit, fingerprint
from negfacediff_core.store.location import without_credentials
from tasks.pools import Pool
from tasks.units import make_unit
from tasks.workers import wants_gpu

# Units that wait in the pool for each worker, so that no worker idles while the driver looks elsewhere.
WINDOW_PER_WORKER = 2
# Seconds between two looks at the request to stop.
TICK = 0.2


@dataclass(frozen=True)
class Line:
    """One unit and the stages that it has yet to go through, in order."""

    unit: Unit
    specs: tuple[StageSpec, ...]


@dataclass(frozen=True)
class Failure:
    """A unit that failed: in which stage, which and why in one line, and where its traceback is."""

    stage: str
    unit: str
    error: str
    log: str
    worker_died: bool
    """Its worker died under it, which another unit of that worker may have caused."""


class UnitsFailed(BuildError):
    """Units that still fail when the rounds are used up: `failures` are those of the last round."""

    def __init__(self, message: str, failures: Sequence[Failure]) -> None:
        super().__init__(message)
        self.failures = failures


@dataclass(frozen=True)
class Crew:
    """What all chunks of a build share: where units run, how, whom to tell, and the request to stop."""

    pool: Pool
    execution: ExecutionConfig
    started: Callable[[str], None]
    """Called with the stage when one of its units is handed to the pool."""
    committed: Callable[[str, int], None]
    """Called with the stage and the `size_of` the unit when one is committed."""
    stop: threading.Event


@task(name="chunk", task_run_name="{label}", cache_policy=NO_CACHE)
def run_chunk(
    label: str, lines: Sequence[Line], attempt: int, crew: Crew, window: int | None = None
) -> list[Failure]:
    """Take every line through its stages and return those that failed, in the order in which they did.

    `label` is shown by Prefect; the rest is as `drive` takes it.
    """
    failures = drive(lines, attempt, crew, window)
    for failure in failures:
        get_run_logger().error("%s (%s)", failure.error, failure.log)
    return failures


def drive(lines: Sequence[Line], attempt: int, crew: Crew, window: int | None = None) -> list[Failure]:
    """Do what `run_chunk` does, without Prefect.

    Args:
        lines: units with the stages that they lack.
        attempt: the round; a unit that comes back is new work to the pool.
        crew: what runs them.
        window: lines that are at their first stage at a time; None keeps every worker busy.

    Returns:
        The units that failed; the line of each ends there.

    Raises:
        CancelledError: when asked to stop.
        PlaceError: when a unit could not be committed for a reason that holds for all of them.
        WorkerError: when a worker is unfit for the build, or no worker is left.
    """
    waiting = deque(lines)
    flights: dict[Future[None], tuple[Line, int]] = {}
    failures: list[Failure] = []
    while waiting or flights:
        if crew.stop.is_set():
            _cancel(flights)
            raise CancelledError("the build was asked to stop")
        # Only lines at their first stage count: a GPU never waits because later stages lag behind.
        entered = sum(position == 0 for _, position in flights.values())
        # asked each time: workers come and go
        room = (window or WINDOW_PER_WORKER * crew.pool.workers) - entered
        for _ in range(min(room, len(waiting))):
            line = waiting.popleft()
            flights[_launch(line, 0, attempt, crew)] = (line, 0)

        done, _ = wait(flights, timeout=TICK, return_when=FIRST_COMPLETED)
        for future in done:
            line, position = flights.pop(future)
            spec = line.specs[position]
            error = future.exception()
            if isinstance(error, PlaceError | WorkerError):
                # the others would be computed, for minutes each, and then be lost as well
                _cancel(flights)
                raise error
            if error is not None:
                failures.append(_log_failure(spec, line.unit, error))
                continue
            crew.committed(spec.name, size_of(spec, line.unit))
            if position + 1 < len(line.specs):
                flights[_launch(line, position + 1, attempt, crew)] = (line, position + 1)
    return failures


def size_of(spec: StageSpec, unit: Unit) -> int:
    """Return how many images a unit covers, or identities in a stage that is not per replicate.

    Where such a stage works on its identities in several parts, as `scores` does, a unit is one of them.
    """
    if not spec.per_replicate and spec.grid.replicates > 1:
        return 1
    return len(spec.grid.identities_of(unit)) * len(spec.grid.replicates_of(unit))


def _cancel(flights: Iterable["Future[None]"]) -> None:
    for future in flights:
        future.cancel()


def _launch(line: Line, position: int, attempt: int, crew: Crew) -> "Future[None]":
    spec = line.specs[position]
    crew.started(spec.name)
    return crew.pool.submit(
        make_unit,
        run_unit,
        spec,
        line.unit,
        crew.execution,
        # the same unit of another store is other work to a scheduler that both builds use
        key=f"{spec.name}-{fingerprint({'place': spec.directory})}-{line.unit.name}-{attempt}",
        gpu=wants_gpu(spec),
    )


def _log_failure(spec: StageSpec, unit: Unit, error: BaseException) -> Failure:
    """Write the traceback to `<stage directory>/logs/<unit>.txt`, over that of the unit's failure before."""
    text = without_credentials("".join(traceback.format_exception(error)))
    path = f"logs/{unit.name}.txt"
    log = f"{spec.directory}/{path}"
    try:
        if spec.location.exists("stage.json"):
            spec.location.write_atomic(path, text.encode())
        else:  # a disk that was unmounted: nothing is made anew where it was
            log = f"none: {spec.directory} is gone"
    except StoreError as trouble:
        # what stopped the unit matters more than what kept its log from being written
        log = f"none: {trouble}"
    kind = type(error).__name__
    worker_died = kind == "KilledWorker"
    cause = "its worker died: out of memory, a crash, or a lost machine" if worker_died else str(error)
    # errors of the project name their unit
    what = str(error) if isinstance(error, NegFaceDiffError) else f"{spec.name} {unit.name}: {kind}: {cause}"
    return Failure(spec.name, unit.name, what, log, worker_died)

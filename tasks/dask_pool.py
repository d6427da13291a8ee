"""A pool on a Dask cluster whose workers may come and go.

A unit is handed to Dask when a worker has a slot free for it, and waits here until then: so a worker thread
has one unit at a time, and one that dies takes no other along. Only a cluster that grows by its load
(adaptive) is shown more than it has room for.
"""

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from negfacediff_core.errors import WorkerError
from tasks.clusters import Cluster
from tasks.machine import installed_versions
from tasks.pools import Pool
from tasks.worker_logs import logs_received
from tasks.workers import GPU, Roster, Worker, look, on_worker

if TYPE_CHECKING:
    from distributed import Future as DaskFuture

# Seconds between two looks at who is there.
LOOK = 2.0
# Seconds for a look that is under way when the pool closes; a scheduler that is gone does not answer it.
LAST_LOOK = 5.0
# Modules of the project that a worker may turn out not to have.
PACKAGES = ("negfacediff_core", "tasks")

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Unit:
    """A unit on its way: its call, what its submitter holds, and its flight on the cluster, if it has one."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    key: str
    future: "Future[None]"
    flight: "DaskFuture | None" = None
    places: tuple[str, ...] = ()
    """Addresses of the workers that the flight is bound to; none: any."""
    flights: int = 0


@dataclass
class _Lane:
    """Units of one kind, those that want a GPU or all others: those that wait, and those on the cluster."""

    waiting: deque[_Unit] = field(default_factory=deque)
    flying: set[_Unit] = field(default_factory=set)
    idle_since: float | None = None
    """When it was first seen that they have no worker to run on."""


@contextmanager
def dask_pool(cluster: Cluster) -> Iterator[Pool]:
    """Yield a pool on the workers of a cluster, which has one at least; what they log reaches the run."""
    run = uuid.uuid4().hex
    pool = _DaskPool(cluster, run)
    with logs_received(cluster.client, run):
        watch = threading.Thread(target=pool.watch, name="workers", daemon=True)
        watch.start()
        try:
            yield Pool(pool.submit, pool.capacity, pool.ask)
        finally:
            pool.close()
            watch.join(LAST_LOOK)


class _DaskPool:
    """Hands units to a cluster, as many at a time as its workers have slots for."""

    def __init__(self, cluster: Cluster, run: str):
        self._cluster, self._client, self._run = cluster, cluster.client, run
        self._versions = installed_versions()
        self._roster = look(self._client)
        # Once there were GPUs, what wants one waits for one: sampling on CPUs instead would take weeks.
        self._gpus = bool(self._roster.accelerated)
        self._lanes = {False: _Lane(), True: _Lane()}
        self._lock = threading.RLock()
        self._closed = threading.Event()

    def submit(self, function: Callable[..., Any], *args: Any, key: str, gpu: bool = False) -> "Future[None]":
        unit = _Unit(function, args, key, Future())
        with self._lock:
            kind = gpu and self._gpus
            self._lanes[kind].waiting.append(unit)
            self._fill(kind)
        return unit.future

    def capacity(self) -> int:
        with self._lock:
            return max(1, *(self._scaled(self._roster.slots(kind)) for kind in self._lanes))

    def ask(self, function: Callable[..., Any], *args: Any) -> list[tuple[Worker, Any]]:
        answers = self._client.run(function, *args)
        return [
            (worker, answers[worker.address])
            for worker in look(self._client).workers
            if worker.address in answers
        ]

    def watch(self) -> None:
        """Follow who is there until the pool is closed."""
        while not self._closed.wait(LOOK):
            try:
                roster = look(self._client)
                coming = bool(self._starving(roster)) and self._cluster.coming()
            except OSError:
                continue  # Dask tells every flight if the scheduler is lost for good
            with self._lock:
                self._roster = roster
                self._gpus = self._gpus or bool(roster.accelerated)
                self._move_stranded()
                self._give_up(coming)
                for kind in self._lanes:
                    self._fill(kind)

    def close(self) -> None:
        """Hand out nothing more, and end what is on the cluster."""
        self._closed.set()
        with self._lock:
            for lane in self._lanes.values():
                for unit in lane.waiting:
                    unit.future.cancel()
                lane.waiting.clear()
                for unit in lane.flying:
                    self._leave(unit)

    def _scaled(self, slots: int) -> int:
        """Return how many slots there will be when all workers that were asked for are there."""
        here = len(self._roster.workers)
        if here >= self._cluster.planned:
            return slots
        return -(-slots * self._cluster.planned // here) if here else self._cluster.planned

    def _fill(self, gpu: bool) -> None:
        """Hand out units of a kind while there is room for them."""
        lane, slots = self._lanes[gpu], self._roster.slots(gpu)
        room = self._scaled(slots) if self._cluster.adaptive else slots
        while lane.waiting and len(lane.flying) < room:
            unit = lane.waiting.popleft()
            if unit.future.set_running_or_notify_cancel():
                lane.flying.add(unit)
                self._launch(unit, gpu)

    def _launch(self, unit: _Unit, gpu: bool) -> None:
        # A plain unit that any worker could take would keep one with a GPU from sampling.
        bound = self._roster.mixed and not gpu
        unit.places = tuple(worker.address for worker in self._roster.plain) if bound else ()
        unit.flights += 1
        # what Dask knows by a key it does not run again
        flight = self._client.submit(
            on_worker,
            self._run,
            self._versions,
            unit.function,
            unit.args,
            key=unit.key if unit.flights == 1 else f"{unit.key}-{unit.flights}",
            pure=False,
            resources={GPU: 1} if gpu else None,
            workers=list(unit.places) or None,
        )
        unit.flight = flight
        flight.add_done_callback(lambda landed: self._land(unit, gpu, landed))

    def _land(self, unit: _Unit, gpu: bool, landed: "DaskFuture") -> None:
        """Tell how a unit's flight ended, and let the next one start."""
        error = self._error_of(landed)
        with self._lock:
            if unit.flight is not landed:
                return  # it is on another flight, or nobody waits for it any more
            self._leave(unit)
            self._lanes[gpu].flying.discard(unit)
            self._fill(gpu)
        if error is None:
            unit.future.set_result(None)
        else:
            unit.future.set_exception(error)

    def _error_of(self, landed: "DaskFuture") -> BaseException | None:
        if landed.status == "cancelled":
            return WorkerError(
                f"The connection to {self._cluster.where} was lost; see why its scheduler ended, then run "
                "the same again: what is committed stays."
            )
        error = landed.exception()
        if error is None:
            return None
        if isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] in PACKAGES:
            return WorkerError(
                f"A worker of {self._cluster.where} cannot import {error.name}: install the same negfacediff "
                "there."
            )
        return error.with_traceback(landed.traceback())

    def _leave(self, unit: _Unit) -> None:
        """End a flight, wherever it is: a unit that is under way ends at its next step."""
        flight, unit.flight = unit.flight, None
        if flight is not None:
            flight.release()

    def _move_stranded(self) -> None:
        """Let units fly again whose flights are bound to workers of which none is left."""
        here = {worker.address for worker in self._roster.workers}
        lane = self._lanes[False]
        for unit in lane.flying:
            if unit.places and not here & set(unit.places) and self._roster.workers:
                self._leave(unit)
                self._launch(unit, gpu=False)

    def _starving(self, roster: Roster) -> list[bool]:
        """Return the kinds of units that are there and have no worker."""
        return [
            kind
            for kind, lane in self._lanes.items()
            if (lane.waiting or lane.flying) and not roster.slots(kind)
        ]

    def _give_up(self, coming: bool) -> None:
        """Fail units that have had no worker for too long, unless workers are on their way."""
        starving = self._starving(self._roster)
        for kind, lane in self._lanes.items():
            if kind not in starving or coming:
                lane.idle_since = None
                continue
            now = time.monotonic()
            lane.idle_since = lane.idle_since or now
            if now - lane.idle_since >= self._cluster.patience:
                error = self._cluster.deserted(gpu=kind)
                for unit in [*lane.flying, *lane.waiting]:
                    self._leave(unit)
                    if not unit.future.cancelled():
                        unit.future.set_exception(error)
                lane.flying.clear()
                lane.waiting.clear()

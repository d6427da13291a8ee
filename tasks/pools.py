"""What hands units to where they run. A `Pool` hides whether that is a thread here or a process elsewhere.

Pools hand out `concurrent.futures.Future` objects: whoever waits for a unit does not know where it runs. Only
what names a unit travels, and what went wrong with it; results go to the store.
"""

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, Protocol

from tasks.worker_logs import logs_sent, run_logger
from tasks.workers import Worker

# Units that a GPU has in hand: while one is sampled, the other is read, or encoded and written. The engine
# lets one at a time onto the GPU.
UNITS_PER_GPU = 2


class Submit(Protocol):
    """How work is handed to a pool."""

    def __call__(
        self, function: Callable[..., Any], *args: Any, key: str, gpu: bool = False
    ) -> "Future[None]":
        """Start `function(*args)`; `key` names it, once and for all; `gpu`: it wants the accelerator.

        The future ends when the call has ended, or raises what that raised. What it returned stays where it
        ran: fetching it would double the messages that a unit costs, and the store holds all that counts.
        """


class Ask(Protocol):
    """How a question is put to every worker at once."""

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[tuple[Worker, Any]]:
        """Call `function(*args)` on every worker and return what each said."""


def ask_nobody(function: Callable[..., Any], *args: Any) -> list[tuple[Worker, Any]]:
    """Ask the workers of a pool that has none but this process, which knows."""
    return []


@dataclass(frozen=True)
class Pool:
    """A place where units run. `ask` asks its other processes, where it has any."""

    submit: Submit
    capacity: Callable[[], int]
    ask: Ask = ask_nobody

    @property
    def workers(self) -> int:
        """How many units run at a time, now or as soon as all workers that were asked for are there."""
        return self.capacity()


@contextmanager
def thread_pool(workers: int, gpu_units: int) -> Iterator[Pool]:
    """Yield a pool of `workers` threads, and `gpu_units` more (0: none) for what wants a GPU alone."""
    plain = ThreadPoolExecutor(workers, thread_name_prefix="unit")
    accelerated = ThreadPoolExecutor(gpu_units, thread_name_prefix="gpu-unit") if gpu_units else plain
    run, send = uuid.uuid4().hex, run_logger().log

    def call(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        with logs_sent(run, send):
            function(*args)

    def submit(function: Callable[..., Any], *args: Any, key: str, gpu: bool = False) -> "Future[None]":
        # with the context of who submits, so that what logs by itself to Prefect's run finds it
        return (accelerated if gpu else plain).submit(copy_context().run, call, function, args)

    try:
        yield Pool(submit, lambda: workers)
    finally:
        for lane in (plain, accelerated):
            lane.shutdown(wait=False, cancel_futures=True)

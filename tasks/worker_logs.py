"""What units log reaches the run: the project's messages, and warnings and errors of every library.

Where a unit runs, a handler stands while it runs: in a thread of this process it hands on to the run's
logger, on a Dask worker to Dask's event log, from which the driver's client takes it to the run's logger.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed import Client

# Whose messages matter although they are no warnings.
PROJECT = ("negfacediff_core", "tasks")
# What logs for a run: Prefect, or, outside of any, this.
OUTSIDE = "negfacediff"
RUNS = ("prefect", OUTSIDE)
# Loggers that pass nothing to the root, where they are set up.
APART = ("distributed",)
# One topic for all runs of a scheduler: it keeps the last messages of each topic for ever.
TOPIC = "negfacediff-logs"

Send = Callable[[int, str], None]
"""Takes the level and the text of a message."""

# The run whose unit this thread is at. Threads that units start have none: they speak to every run here.
_run: ContextVar[str | None] = ContextVar("run", default=None)
_installed: Counter[str] = Counter()
_handlers: dict[str, logging.Handler] = {}
_lock = threading.Lock()


class _Forwarder(logging.Handler):
    """Hands the messages of one run on."""

    def __init__(self, run: str, send: Send):
        super().__init__(logging.INFO)
        self.run, self.send = run, send

    def filter(self, record: logging.LogRecord) -> bool:
        family = record.name.partition(".")[0]
        # what logs for a run, here or beside this, is not to be sent again; nor a unit of another run
        if family in RUNS or _run.get() not in (None, self.run):
            return False
        return record.levelno >= logging.WARNING or family in PROJECT

    def emit(self, record: logging.LogRecord) -> None:
        # formatted: arguments and tracebacks need not be known where this is read
        self.send(record.levelno, self.format(record))


@contextmanager
def logs_sent(run: str, send: Send) -> Iterator[None]:
    """Send what is logged in this process while the block runs, by it or by threads that it starts."""
    token = _run.set(run)
    _install(run, send)
    try:
        yield
    finally:
        _uninstall(run)
        _run.reset(token)


def _install(run: str, send: Send) -> None:
    """Add the run's handler, unless another of its units is running here and has."""
    with _lock:
        _installed[run] += 1
        if _installed[run] > 1:
            return
        _handlers[run] = _Forwarder(run, send)
        for name in ("", *APART):
            if not name or not logging.getLogger(name).propagate:
                logging.getLogger(name).addHandler(_handlers[run])
        for name in PROJECT:
            logger = logging.getLogger(name)
            if not logger.level:
                logger.setLevel(logging.INFO)


def _uninstall(run: str) -> None:
    with _lock:
        _installed[run] -= 1
        if not _installed[run]:
            del _installed[run]
            handler = _handlers.pop(run)
            for name in ("", *APART):
                logging.getLogger(name).removeHandler(handler)


def run_logger() -> "logging.Logger | logging.LoggerAdapter[Any]":
    """Return the logger of the Prefect run that this is called in, or this project's outside of any."""
    from prefect import get_run_logger
    from prefect.exceptions import MissingContextError

    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger(OUTSIDE)


def send_from_worker(run: str) -> Send:
    """Return what sends messages from this Dask worker to the driver of a run."""
    from distributed import get_worker

    worker = get_worker()
    # a worker that was given no name has its address for one
    name = f"worker {worker.name}"

    def send(level: int, text: str) -> None:
        worker.log_event(TOPIC, {"run": run, "level": level, "name": name, "text": text})

    return send


@contextmanager
def logs_received(client: "Client", run: str) -> Iterator[None]:
    """Log what workers send for a run with the logger of the Prefect run that this is called in."""
    logger = run_logger()

    # in Dask's thread, which knows of no run: the logger does
    def receive(event: tuple[float, dict[str, Any]]) -> None:
        _, message = event
        if message["run"] == run:
            logger.log(message["level"], "%s: %s", message["name"], message["text"])

    client.subscribe_topic(TOPIC, receive)
    try:
        yield
    finally:
        client.unsubscribe_topic(TOPIC)

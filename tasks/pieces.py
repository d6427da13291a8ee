"""Pieces of an export, encoded in processes of this machine and handed back in their order."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from negfacediff_core.errors import BuildError
from negfacediff_core.stages.exported import Job, Piece, write_piece
from tasks.machine import shielded_from_interrupts

# Pieces that wait for each worker: while one is put in its place, the others go on.
_AHEAD = 2
# What a piece gives: what is to be appended to files by path, and the sums of the files that it wrote.
Result = tuple[dict[str, bytes], list[str]]


@contextmanager
def written_pieces(job: Job, folder: Path, workers: int, pieces: list[Piece]) -> Iterator[Iterator[Result]]:
    """Yield what the pieces give, in order: encoded in processes, as encoders hold the interpreter's lock.

    Raises as `write_piece`; BuildError if a process dies.
    """
    if workers == 1 or len(pieces) < 2:
        yield (write_piece(job, piece, folder) for piece in pieces)
        return
    context = multiprocessing.get_context("forkserver")
    # imported once, in the process that all workers are copies of
    context.set_forkserver_preload([__name__])
    with shielded_from_interrupts(), _main_put_aside():
        pool = ProcessPoolExecutor(
            min(workers, len(pieces)), context, initializer=_begin_worker, initargs=(job, folder)
        )
        waiting = deque(pool.submit(_write_here, piece) for piece in pieces[: _AHEAD * workers])
    try:
        yield _in_order(pool.submit, waiting, pieces[_AHEAD * workers :])
    except BrokenProcessPool as error:
        raise BuildError(
            "A process that encodes images died, perhaps for want of memory; what is exported so far stays: "
            "run the same command again, with fewer --workers."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _main_put_aside() -> Iterator[None]:
    """Keep processes that the block starts from importing the program's main module.

    That is Prefect's engine, or whatever the flow was called from: seconds for what they do not use.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _in_order(
    submit: Callable[..., Future[Any]], waiting: deque[Future[Any]], rest: list[Piece]
) -> Iterator[Result]:
    """Yield results in the order of the pieces, handing out another as each one comes."""
    following = iter(rest)
    while waiting:
        result = waiting.popleft().result()
        if (piece := next(following, None)) is not None:
            waiting.append(submit(_write_here, piece))
        yield result


# What a worker process works at: sent once, as it is large.
_AT: dict[str, Any] = {}


def _begin_worker(job: Job, folder: Path) -> None:
    """Get a worker process ready; it ends with the process that started it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _AT.update(job=job, folder=folder)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write_here(piece: Piece) -> Result:
    return write_piece(_AT["job"], piece, _AT["folder"])

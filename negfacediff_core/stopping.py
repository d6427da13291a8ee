"""A request to end work that takes long, heeded between two steps of a sampler, two batches or two tiles.

Who runs the work says around it when nobody wants it any more; the work asks wherever it can end. Nothing is
left half done by it: what is not committed does not exist.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from negfacediff_core.errors import StoppedError


def _never() -> bool:
    return False


_unwanted: ContextVar[Callable[[], bool]] = ContextVar("unwanted", default=_never)


@contextmanager
def ended_when(asked: Callable[[], bool]) -> Iterator[None]:
    """Have the work of this thread end, while the block runs, as soon as `asked` returns True.

    It is asked at each step, and so must answer at once.
    """
    token = _unwanted.set(asked)
    try:
        yield
    finally:
        _unwanted.reset(token)


def unwanted() -> bool:
    """Tell whether nobody wants the work any more that this is a part of."""
    return _unwanted.get()()


def heed() -> None:
    """Raise StoppedError if nobody wants the work any more that this is a part of."""
    if unwanted():
        raise StoppedError("Nobody waits for this work any more: its build was stopped.")

"""Signals that ask a process to end, kept until its work has come to where it can end without loss."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_KEPT = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def kept_signals() -> Iterator[Callable[[], bool]]:
    """Keep the first SIGINT or SIGTERM that comes while the block runs; it takes effect behind the block.

    What is yielded tells whether one has come, so that the block can end. A second one takes effect at once.
    Outside the main thread, which alone hears signals, none is kept.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in _KEPT}
    before = {number: one for number, one in handlers.items() if one not in (None, signal.SIG_IGN)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def keep(number: int, frame: FrameType | None) -> None:
        came.append(number)
        restore()

    for number in before:
        signal.signal(number, keep)
    try:
        yield lambda: bool(came)
    finally:
        restore()
        if came:
            signal.raise_signal(came[0])

"""Work done by threads ahead of whoever takes it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Done = TypeVar("_Done")
# Items beyond one a thread that are done, or waited for, before they are asked for.
_AHEAD = 2


def done_ahead(work: Callable[[_Item], _Done], items: Iterable[_Item], threads: int) -> Iterator[_Done]:
    """Yield what `work` returns for each of the items, in order; threads are a few items ahead.

    Raises what `work` raises, where its result would be.
    """
    waiting: deque[Future[_Done]] = deque()
    with ThreadPoolExecutor(threads, "ahead") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= threads + _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

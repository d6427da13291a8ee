"""Locks on an S3 store: one small object a lock, put on the condition that nobody else has put it.

The holder renews its lock. One that stays the same for `LEASE` seconds belongs to a process that has died,
and whoever waits takes it over. Clocks of two machines are never compared: who waits counts its own seconds.
"""

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fsspec import AbstractFileSystem

#: Seconds without a renewal after which a lock is free; a renewal comes three times as often.
LEASE = 30.0
# Pause between two looks at a lock that another holds, in seconds: the first, and the longest.
PAUSES = (0.05, 1.0)
# How S3 says that the condition of a put does not hold: met, met by a put under way, nothing there to match.
_REFUSED = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "404", "409", "412"})


@contextmanager
def held(files: AbstractFileSystem, path: str) -> Iterator[None]:
    """Hold the lock that is the object `path` of an S3 client, waiting while another holds it.

    Raises what the client raises. A holder that was cut off for longer than `LEASE` may have lost the lock
    without knowing; what it then writes must do no harm.
    """
    holder = uuid.uuid4().hex
    tag = _take(files, path, holder)
    done, lost = threading.Event(), threading.Event()
    keeper = threading.Thread(target=_keep, args=(files, path, holder, tag, done, lost), daemon=True)
    keeper.start()
    try:
        yield
    finally:
        done.set()
        keeper.join()
        if not lost.is_set():
            with suppress(Exception):  # what stays behind is taken over
                files.rm_file(path)


def _take(files: AbstractFileSystem, path: str, holder: str) -> str:
    """Put the lock as soon as it is free; return its tag."""
    pause, longest = PAUSES
    seen, since = None, time.monotonic()
    while True:
        if taken := _put(files, path, holder, IfNoneMatch="*"):
            return taken
        if (tag := _tag(files, path)) != seen:
            seen, since = tag, time.monotonic()
        elif (
            tag
            and time.monotonic() - since > LEASE
            and (taken := _put(files, path, f"{holder} took over", IfMatch=tag))
        ):
            return taken
        time.sleep(pause)
        pause = min(2 * pause, longest)


def _keep(
    files: AbstractFileSystem,
    path: str,
    holder: str,
    tag: str,
    done: threading.Event,
    lost: threading.Event,
) -> None:
    """Renew the lock until `done`; set `lost` and end if another has it."""
    renewals = 0
    while not done.wait(LEASE / 3):
        renewals += 1
        with suppress(Exception):  # while the link is down the lock may run out; the next renewal tells
            renewed = _put(files, path, f"{holder} {renewals}", IfMatch=tag)
            if renewed is None:
                lost.set()
                return
            tag = renewed


def _put(files: AbstractFileSystem, path: str, content: str, **condition: str) -> str | None:
    """Put an object if the condition holds and return its tag; None if it does not."""
    try:
        return files.pipe_file(path, content.encode(), **condition)["ETag"]
    except OSError as error:
        answer = getattr(error.__cause__, "response", {})
        if answer.get("Error", {}).get("Code") not in _REFUSED:
            raise
    # A put whose answer was lost is sent again by the client, and then refused because of itself.
    with suppress(FileNotFoundError):
        if files.cat_file(path) == content.encode():
            return _tag(files, path)
    return None


def _tag(files: AbstractFileSystem, path: str) -> str | None:
    """Return the tag of an object as it stands; None if it is not there."""
    try:
        return files.info(path)["ETag"]
    except FileNotFoundError:
        return None

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


class Lease:
    """A lock that was taken and is this process's until `renew` says otherwise; threads may share it."""

    def __init__(self, files: AbstractFileSystem, path: str, holder: str, tag: str) -> None:
        self._files, self._path, self._holder = files, path, holder
        # None once another has the lock
        self._tag: str | None = tag
        self._renewals = 0
        self._turn = threading.Lock()

    def renew(self) -> bool:
        """Renew the lock if it is still held, and tell whether it was: then it is for `LEASE` more seconds.

        Raises what the client raises; whether the lock is held is then not known.
        """
        with self._turn:
            if self._tag is None:
                return False
            self._renewals += 1
            content = f"{self._holder} {self._renewals}"
            renewed = _put(self._files, self._path, content, IfMatch=self._tag)
            if renewed is None:
                tag, stands = _look(self._files, self._path)
                if tag and stands.startswith(self._holder):
                    # A renewal before has come through, although its answer was lost.
                    renewed = _put(self._files, self._path, content, IfMatch=tag)
            self._tag = renewed
            return renewed is not None


@contextmanager
def held(files: AbstractFileSystem, path: str) -> Iterator[Lease]:
    """Hold the lock that is the object `path` of an S3 client, waiting while another holds it.

    Raises what the client raises. A holder that was cut off for longer than `LEASE` may have lost the lock
    without knowing: what only one may do comes after a `renew`, and everything else must do no harm.
    """
    holder = uuid.uuid4().hex
    lease = Lease(files, path, holder, _take(files, path, holder))
    done = threading.Event()
    keeper = threading.Thread(target=_keep, args=(lease, done), daemon=True)
    keeper.start()
    try:
        yield lease
    finally:
        done.set()
        keeper.join()
        with suppress(Exception):  # what stays behind is taken over
            # S3 removes whatever is there: having just renewed, nobody else can have taken it meanwhile.
            if lease.renew():
                files.rm_file(path)


def _take(files: AbstractFileSystem, path: str, holder: str) -> str:
    """Put the lock as soon as it is free; return its tag."""
    pause, longest = PAUSES
    seen, since = None, time.monotonic()
    while True:
        if taken := _put(files, path, holder, IfNoneMatch="*"):
            return taken
        tag, stands = _look(files, path)
        if tag != seen:
            seen, since = tag, time.monotonic()
        # What is empty is nobody's: the file of a lock in a folder, which was copied here with its store.
        free = not stands or time.monotonic() - since > LEASE
        if tag and free and (taken := _put(files, path, f"{holder} took over", IfMatch=tag)):
            return taken
        time.sleep(pause)
        pause = min(2 * pause, longest)


def _keep(lease: Lease, done: threading.Event) -> None:
    """Renew a lock until `done`, or until another has it."""
    while not done.wait(LEASE / 3):
        with suppress(Exception):  # while the link is down the lock may run out; the next renewal tells
            if not lease.renew():
                return


def _put(files: AbstractFileSystem, path: str, content: str, **condition: str) -> str | None:
    """Put an object if the condition holds and return its tag; None if it does not."""
    try:
        return files.pipe_file(path, content.encode(), **condition)["ETag"]
    except OSError as error:
        answer = getattr(error.__cause__, "response", {})
        if answer.get("Error", {}).get("Code") not in _REFUSED:
            raise
    # A put whose answer was lost is sent again by the client, and then refused because of itself.
    tag, stands = _look(files, path)
    return tag if stands == content else None


def _look(files: AbstractFileSystem, path: str) -> tuple[str | None, str]:
    """Return the tag of an object, and what it holds, read after the tag; None and nothing without it."""
    with suppress(FileNotFoundError):
        tag = files.info(path)["ETag"]
        return tag, files.cat_file(path).decode(errors="replace")
    return None, ""

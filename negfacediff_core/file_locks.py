"""Advisory locks on files, which the kernel frees when their process dies."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from negfacediff_core.errors import StoreError
from negfacediff_core.explained import explained


@contextmanager
def locked(path: Path, busy: str = "") -> Iterator[None]:
    """Hold the lock of the file `path`, which is made as needed, with its folder, and stays behind.

    Raises StoreError with the text `busy` if another process holds it; without a text that is waited for.
    Raises StoreError (PlaceError) also if the file cannot be written or locked.
    """
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # for writing, without which NFS locks nothing
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with explained("lock", path):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
            except BlockingIOError as error:
                raise StoreError(busy) from error
        yield
    finally:
        os.close(handle)

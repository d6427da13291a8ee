"""Operating-system errors of files and folders, turned into ours, which say what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from negfacediff_core.errors import PlaceError, StoreError

_REMEDIES = {
    errno.EROFS: "the file system is read-only; choose a place that can be written",
    errno.EACCES: "permission is denied; allow writing there or choose another place",
    errno.EPERM: "permission is denied; allow writing there or choose another place",
    errno.ENOSPC: "the disk is full; free space and run the command again, what is done stays",
    errno.EDQUOT: "the disk quota is used up; free space and run the command again, what is done stays",
    errno.ENOTDIR: "a file stands where a folder is needed; move it away or choose another place",
    errno.EEXIST: "a file stands where a folder is needed; move it away or choose another place",
    errno.EISDIR: "a folder stands where a file is needed; move it away or choose another place",
    errno.ENOENT: "it is missing; if a disk was unmounted, mount it, otherwise check the path or build that "
    "stage again",
}
# What keeps every file from being written, not one.
_OF_THE_PLACE = (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM)


@contextmanager
def explained(doing: str, path: str | Path) -> Iterator[None]:
    """Turn an operating-system error while `doing` something at `path` into a StoreError.

    It says what to do, and is a PlaceError where no other file could be written there either.
    """
    try:
        yield
    except OSError as error:
        other = f"{error.strerror or error}; mend that and run the same command again"
        remedy = _REMEDIES.get(error.errno or 0, other)
        kind = PlaceError if error.errno in _OF_THE_PLACE else StoreError
        raise kind(f"cannot {doing} {path}: {remedy}.") from error

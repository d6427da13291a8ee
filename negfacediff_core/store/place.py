"""What a store needs of the place that it lies in: the verbs, and how it is said that the place has gone.

Paths are relative to the place and use `/`. Every failure is a `StoreError` of one sentence that names it.
"""

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from negfacediff_core.errors import PlaceError, StoreError


class Entry(NamedTuple):
    """A file of a place: its path in it, its bytes, and the unix time of its last change."""

    path: str
    size: int
    modified: float


class Lock(Protocol):
    """A lock that is held."""

    def check(self) -> None:
        """Make sure of the lock, right before what only its holder may do.

        Raises:
            StoreError: if it was lost, so that another process may have gone on with the same work.
        """


class Location(Protocol):
    """A folder, or a prefix of an object store."""

    url: str

    def at(self, path: str) -> "Location":
        """Return the place `path` below this one."""

    def read_bytes(self, path: str) -> bytes:
        """Return the content of the file `path`."""

    def write_atomic(self, path: str, data: bytes) -> None:
        """Make `path` hold `data`: whoever reads or dies meanwhile, it holds the old content or the new.

        Folders are made below the place. Where the place itself is not there, it is a `PlaceError`:
        `check_writable`, or a lock that makes it, comes first.
        """

    def touch(self, path: str) -> None:
        """Make the empty file `path`, or make it as new as if it had just been written."""

    def exists(self, path: str) -> bool:
        """Tell whether the file `path` is there."""

    def modified(self, path: str) -> float | None:
        """Return the unix time of the last change of the file `path`; None if it is not there."""

    def names(self, path: str) -> list[str]:
        """Return the sorted names in the folder `path`, no temporary files; none if it is no folder."""

    def walk(self, path: str) -> list[Entry]:
        """Return every file in the folder `path` and below, temporary ones too; none if it is no folder."""

    def remove(self, path: str) -> None:
        """Remove the file `path`, or the folder with all that it holds; nothing if it is not there.

        The path is literal, as everywhere here: `*`, `?` and `[` in it, or in the place's own name, match
        nothing but themselves.
        """

    def lock(self, name: str, *, make: bool = False) -> AbstractContextManager[Lock]:
        """Hold the lock `name`: one holder at a time, freed when its process dies.

        A place that is not there is made where `make` says so, and is otherwise a `PlaceError`.
        """

    def explained(self, doing: str, path: str) -> AbstractContextManager[None]:
        """Turn errors of another library that is `doing` something at `path` into a `StoreError`."""

    def check_writable(self) -> None:
        """Write and remove a small file, making the place if it is not there."""


def gone(url: str) -> PlaceError:
    """Return the error for a place that was there before. Making it anew might be below a mount point."""
    return PlaceError(f"{url} has gone; if a disk was unmounted, mount it, then run the same command again.")


def lost(where: str) -> StoreError:
    """Return the error for a lock that is no longer that of the process that took it."""
    return StoreError(
        f"the lock {where} was lost while it was held, and another process may have gone on with the same "
        "work; nothing more was written: run the same command again."
    )

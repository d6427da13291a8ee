"""A place that is a prefix of an object store, or any other address that fsspec knows."""

import re
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import datetime
from typing import Any

import fsspec

from negfacediff_core.errors import PlaceError, StoreError
from negfacediff_core.store import faults, leases
from negfacediff_core.store.place import Entry, Lock, lost

# Kinds of error of an fsspec client, the narrower first.
_REMOTE_REMEDIES: tuple[tuple[type[Exception], str], ...] = (
    (
        FileNotFoundError,
        "it is missing; check the address, and make the bucket if there is none, otherwise build that stage "
        "again",
    ),
    (PermissionError, "allow reading and writing there, or give other credentials or another place"),
    (
        Exception,
        "check the address, the credentials and the network, then run the same command again: what is done "
        "stays",
    ),
)
_S3 = ("s3://", "s3a://")
# Objects that are removed at a time, each by a request: one for many does not tell which it left there.
_REMOVALS = 16
# `user:password@` of an address, with the slashes before it.
_CREDENTIALS = re.compile(r"//\S*:\S*@")


class RemoteLocation:
    """A prefix of an object store, or any other fsspec URL. One put is the rename.

    Requests that fail in passing are sent again by the client with growing pauses: S3's makes five attempts
    (`AWS_MAX_ATTEMPTS`), and some rounds of them where the connection itself is lost. Endpoint and
    credentials are those that the client finds itself, in the environment or a profile.

    Raises:
        StoreError: for an address with a password or a query, or one that nothing installed can open.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        _check_no_secret(self.url)
        with _explained_remote("open", self.url):
            # A listing that is older than another worker's commit would hide its record. Without concurrency
            # within an object S3's client reads it in one request, not two, and whole again if it breaks off.
            options = {"max_concurrency": 1} if self.url.startswith(_S3) else {}
            self._files, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **options)
            if options:
                # Its own rounds are nested when it reads: five would be 250 requests and three minutes.
                self._files.retries = 3

    def at(self, path: str) -> "RemoteLocation":
        """Return the place `path` below this one."""
        return RemoteLocation(f"{self.url}/{path}")

    def read_bytes(self, path: str) -> bytes:
        """Return the content of the object `path`."""
        with self.explained("read", path):
            return self._files.cat_file(f"{self._root}/{path}")

    def write_atomic(self, path: str, data: bytes) -> None:
        """Put the object `path` in one request."""
        with self.explained("write", path):
            faults.reached(f"write {path}")
            self._files.pipe_file(f"{self._root}/{path}", data)
            # a put is writing and renaming in one: there is no half and no other name
            faults.reached(f"renamed {path}")

    def touch(self, path: str) -> None:
        """Put the empty object `path`."""
        with self.explained("write", path):
            self._files.pipe_file(f"{self._root}/{path}", b"")

    def exists(self, path: str) -> bool:
        """Tell whether the object `path` is there."""
        with self.explained("read", path):
            return self._files.exists(f"{self._root}/{path}")

    def modified(self, path: str) -> float | None:
        """Return the unix time of the last change of the object `path`; None if it is not there."""
        with self.explained("read", path):
            try:
                return _modified(self._files.info(f"{self._root}/{path}"))
            except FileNotFoundError:
                return None

    def names(self, path: str) -> list[str]:
        """Return the sorted names directly below `path`, no locks; none when there are none."""
        folder = f"{self._root}/{path}".rstrip("/")
        with self.explained("list", path):
            try:
                entries = self._files.ls(folder, detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        # An object that is listed gives itself, and a folder that a console has made its own empty marker.
        below = (entry.rstrip("/").removeprefix(f"{folder}/") for entry in entries)
        return sorted(name for name in below if "/" not in name and name[:1] not in ("", "."))

    def walk(self, path: str) -> list[Entry]:
        """Return every object below `path`; one listing."""
        with self.explained("list", path):
            found = self._files.find(f"{self._root}/{path}".rstrip("/"), detail=True)
            start = len(self._root) + 1
            return sorted(Entry(name[start:], one["size"], _modified(one)) for name, one in found.items())

    def remove(self, path: str) -> None:
        """Remove the object `path`, or all that lies below it; nothing if it is not there."""
        faults.reached(f"remove {path}")
        with self.explained("remove", path):
            # The client's `rm` takes `*` and `[1]` for patterns, and would remove what lies in other stores.
            try:
                found = self._files.find(f"{self._root}/{path}".rstrip("/"))
            except FileNotFoundError:
                return
            with ThreadPoolExecutor(_REMOVALS) as pool:
                list(pool.map(self._remove_object, found))

    def _remove_object(self, address: str) -> None:
        with suppress(FileNotFoundError):  # somebody else has removed it meanwhile
            self._files.rm_file(address)

    @contextmanager
    def lock(self, name: str, *, make: bool = False) -> Iterator[Lock]:
        """Hold the lock object `.<name>.lock` of an S3 store; a store of another kind has no locks."""
        path = f".{name}.lock"
        with ExitStack() as stack:
            lease = None
            if self.url.startswith(_S3):
                with self.explained("lock", path):
                    lease = stack.enter_context(leases.held(self._files, f"{self._root}/{path}"))
            yield _LeasedLock(self, path, lease)

    def explained(self, doing: str, path: str) -> AbstractContextManager[None]:
        """Turn any error while `doing` something at `path` into a `StoreError`."""
        return _explained_remote(doing, f"{self.url}/{path}")

    def check_writable(self) -> None:
        """Put and remove a small object."""
        probe = f"writable-{uuid.uuid4().hex}"
        self.write_atomic(probe, b"negfacediff")
        with _explained_remote("write", self.url):
            self._files.rm_file(f"{self._root}/{probe}")


class _LeasedLock:
    """A lease on a lock object of a place; none where the place has no locks."""

    def __init__(self, place: RemoteLocation, path: str, lease: leases.Lease | None) -> None:
        self._place, self._path, self._lease = place, path, lease

    def check(self) -> None:
        """Renew the lease; StoreError if another has it, or if nobody answers."""
        if self._lease is not None:
            with self._place.explained("lock", self._path):
                held = self._lease.renew()
            if not held:
                raise lost(f"{self._place.url}/{self._path}")


@contextmanager
def _explained_remote(doing: str, url: str) -> Iterator[None]:
    """Turn any error of an fsspec client, each of which raises its own kinds, into a `StoreError`."""
    try:
        yield
    except ImportError as error:
        # fsspec names the package that its client of this kind of address is in
        raise StoreError(
            f"cannot {doing} {url}: {error}. For s3:// that is the extra s3: pip install 'negfacediff[s3]', "
            "or NEGFACEDIFF_EXTRAS=s3 ./run ..."
        ) from error
    except Exception as error:
        reason = without_credentials(f"{type(error).__name__}: {error}").rstrip(".")
        remedies = (remedy for kind, remedy in _REMOTE_REMEDIES if isinstance(error, kind))
        raised = PlaceError if isinstance(error, PermissionError) else StoreError
        raise raised(f"cannot {doing} {url}: {reason}; {next(remedies)}.") from error


def without_credentials(text: str) -> str:
    """Return `text` with the user and password of every address in it left out."""
    return _CREDENTIALS.sub("//", text)


def _check_no_secret(url: str) -> None:
    """Refuse an address that carries a secret: it would stand in every record, log and report."""
    if _CREDENTIALS.search(url) or "?" in url:
        shown = without_credentials(url).partition("?")[0]
        raise StoreError(
            f"the address of the store {shown} was given with credentials or a query, which would be written "
            "into records and logs; leave them out and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE, instead."
        )


def _modified(details: dict[str, Any]) -> float:
    """Unix time of an object's last change; now where the client does not tell: it may be new."""
    told = details.get("LastModified") or details.get("created") or details.get("mtime")
    if isinstance(told, datetime):
        return told.timestamp()
    return float(told) if isinstance(told, int | float) else time.time()

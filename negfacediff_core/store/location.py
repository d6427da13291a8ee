"""A place that holds a store: a local folder or an fsspec URL, behind the same few verbs.

Paths are relative to the place and use `/`. Every failure is a `StoreError` of one sentence that names it.
"""

import errno
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import fsspec

from negfacediff_core.errors import PlaceError, StoreError
from negfacediff_core.store import faults, leases

_REMEDIES = {
    errno.EROFS: "the file system is read-only; choose a place that can be written",
    errno.EACCES: "permission is denied; allow writing there or choose another place",
    errno.EPERM: "permission is denied; allow writing there or choose another place",
    errno.ENOSPC: "the disk is full; free space and run the command again, what is done stays",
    errno.EDQUOT: "the disk quota is used up; free space and run the command again, what is done stays",
    errno.ENOTDIR: "a file stands where a folder is needed; move it away or choose another place",
    errno.EEXIST: "a file stands where a folder is needed; move it away or choose another place",
    errno.EISDIR: "a folder stands where a file is needed; move it away or choose another place",
    errno.ENOENT: "it is missing; if a disk was unmounted, mount it, otherwise build that stage again",
}
# What keeps every file from being written, not one.
_OF_THE_PLACE = (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM)


class Entry(NamedTuple):
    """A file of a place: its path in it, its bytes, and the unix time of its last change."""

    path: str
    size: int
    modified: float


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
# `user:password@` of an address, with the slashes before it.
_CREDENTIALS = re.compile(r"//\S*:\S*@")


class Location(Protocol):
    """What a store needs of the place that it lies in."""

    url: str

    def at(self, path: str) -> "Location":
        """Return the place `path` below this one."""

    def read_bytes(self, path: str) -> bytes:
        """Return the content of the file `path`."""

    def write_atomic(self, path: str, data: bytes) -> None:
        """Make `path` hold `data`: whoever reads or dies meanwhile, it holds the old content or the new."""

    def exists(self, path: str) -> bool:
        """Tell whether the file `path` is there."""

    def names(self, path: str) -> list[str]:
        """Return the sorted names in the folder `path`, no temporary files; none if it is no folder."""

    def walk(self, path: str) -> list[Entry]:
        """Return every file in the folder `path` and below, temporary ones too; none if it is no folder."""

    def remove(self, path: str) -> None:
        """Remove the file `path`, or the folder with all that it holds; nothing if it is not there."""

    def lock(self, name: str) -> AbstractContextManager[None]:
        """Hold the lock `name`: one holder at a time, freed when its process dies."""

    def explained(self, doing: str, path: str) -> AbstractContextManager[None]:
        """Turn errors of another library that is `doing` something at `path` into a `StoreError`."""

    def check_writable(self) -> None:
        """Write and remove a small file, making the place if it is not there."""


def locate(url: str) -> Location:
    """Return the place of `url`: a path or `file://` is local, any other scheme goes through fsspec."""
    if not url.strip():
        raise StoreError("The store has no name: give a folder, or an address such as s3://bucket/faces.")
    if "://" in url and not url.startswith("file://"):
        return RemoteLocation(url)
    return LocalLocation(url.removeprefix("file://"))


class LocalLocation:
    """A folder of a local or mounted file system."""

    def __init__(self, folder: str) -> None:
        self.root = Path(folder).absolute()
        self.url = str(self.root)

    def at(self, path: str) -> "LocalLocation":
        """Return the place `path` below this one."""
        return LocalLocation(str(self.root / path))

    def read_bytes(self, path: str) -> bytes:
        """Return the content of the file `path`."""
        # A stage may have 100,000 records: making `Path` objects takes longer than reading them.
        with self.explained("read", path), open(f"{self.url}/{path}", "rb") as file:  # noqa: PTH123
            return file.read()

    def write_atomic(self, path: str, data: bytes) -> None:
        """Write a temporary file beside `path`, fsync it, rename it over `path`, fsync the folder."""
        half = len(data) // 2
        target = self.root / path
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        with _explained("write", target):
            _make_folder(target.parent)
            faults.reached(f"write {path}")
            try:
                with temporary.open("wb") as file:
                    file.write(data[:half])
                    file.flush()
                    faults.reached(f"half {path}")
                    file.write(data[half:])
                    file.flush()
                    os.fsync(file.fileno())
                faults.reached(f"rename {path}")
                temporary.replace(target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            faults.reached(f"renamed {path}")
            _sync_folder(target.parent)

    def exists(self, path: str) -> bool:
        """Tell whether the file `path` is there."""
        with self.explained("read", path):
            return (self.root / path).exists()

    def names(self, path: str) -> list[str]:
        """Return the sorted names in the folder `path`, no temporary files; none if it is no folder."""
        with self.explained("list", path):
            try:
                return sorted(name for name in os.listdir(self.root / path) if name[0] != ".")  # noqa: PTH208
            except (FileNotFoundError, NotADirectoryError):
                return []

    def walk(self, path: str) -> list[Entry]:
        """Return every file in the folder `path` and below, temporary ones too; none if it is no folder."""
        with self.explained("list", path):
            return sorted(_walk(self.root / path, f"{path}/" if path else ""))

    def remove(self, path: str) -> None:
        """Remove the file `path`, or the folder with all that it holds; nothing if it is not there."""
        target = self.root / path
        faults.reached(f"remove {path}")
        with self.explained("remove", path):
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                _sync_folder(target.parent)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold an advisory lock on the file `.<name>.lock`; the kernel frees it when the process dies."""
        path = self.root / f".{name}.lock"
        with _explained("lock", path):
            _make_folder(self.root)
            handle = path.open("w")
        with handle:
            with _explained("lock", path):
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def explained(self, doing: str, path: str) -> AbstractContextManager[None]:
        """Turn operating-system errors while `doing` something at `path` into a `StoreError`."""
        return _explained(doing, f"{self.url}/{path}")

    def check_writable(self) -> None:
        """Write and remove a small file, making the folder if it is not there."""
        probe = f"writable-{uuid.uuid4().hex}"
        try:
            _make_folder(self.root)
        except FileNotFoundError as error:
            raise StoreError(
                f"cannot make the folder {self.root}: {error.strerror}; choose another place for the store."
            ) from error
        except OSError:
            pass  # the write below tells why
        self.write_atomic(probe, b"negfacediff")
        with _explained("write", self.root):
            (self.root / probe).unlink()


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

    def exists(self, path: str) -> bool:
        """Tell whether the object `path` is there."""
        with self.explained("read", path):
            return self._files.exists(f"{self._root}/{path}")

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
        with self.explained("remove", path), suppress(FileNotFoundError):
            self._files.rm(f"{self._root}/{path}", recursive=True)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the lock object `.<name>.lock` of an S3 store; a store of another kind has no locks."""
        with ExitStack() as stack:
            if self.url.startswith(_S3):
                with self.explained("lock", name):
                    stack.enter_context(leases.held(self._files, f"{self._root}/.{name}.lock"))
            yield

    def explained(self, doing: str, path: str) -> AbstractContextManager[None]:
        """Turn any error while `doing` something at `path` into a `StoreError`."""
        return _explained_remote(doing, f"{self.url}/{path}")

    def check_writable(self) -> None:
        """Put and remove a small object."""
        probe = f"writable-{uuid.uuid4().hex}"
        self.write_atomic(probe, b"negfacediff")
        with _explained_remote("write", self.url):
            self._files.rm_file(f"{self._root}/{probe}")


@contextmanager
def _explained(doing: str, path: str | Path) -> Iterator[None]:
    """Turn an operating-system error into a `StoreError` that says what to do."""
    try:
        yield
    except OSError as error:
        other = f"{error.strerror or error}; mend that and run the same command again"
        remedy = _REMEDIES.get(error.errno or 0, other)
        kind = PlaceError if error.errno in _OF_THE_PLACE else StoreError
        raise kind(f"cannot {doing} {path}: {remedy}.") from error


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


def _walk(folder: Path, prefix: str) -> Iterator[Entry]:
    """Yield the files below a folder that other processes may be changing; symbolic links are files here."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder / entry.name, f"{prefix}{entry.name}/")
            continue
        with suppress(FileNotFoundError):
            facts = entry.stat(follow_symlinks=False)
            yield Entry(f"{prefix}{entry.name}", facts.st_size, facts.st_mtime)


def _modified(details: dict[str, Any]) -> float:
    """Unix time of an object's last change; now where the client does not tell: it may be new."""
    told = details.get("LastModified") or details.get("created") or details.get("mtime")
    return told.timestamp() if isinstance(told, datetime) else time.time()


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, each safely on disk before anything is put into it."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

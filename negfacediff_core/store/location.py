"""A place that holds a store: a local folder or an fsspec URL, behind the same few verbs.

Paths are relative to the place and use `/`. Every failure is a `StoreError` of one sentence that names it.
"""

import errno
import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import fsspec
from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore

from negfacediff_core.errors import StoreError
from negfacediff_core.store import faults

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

    def sync(self, path: str) -> None:
        """Bring the file `path`, written by another library, safely to disk."""

    def lock(self, name: str) -> AbstractContextManager[None]:
        """Hold the lock `name`: one holder at a time, freed when its process dies."""

    def zarr_store(self, path: str) -> Store:
        """Return the Zarr store at `path`."""

    def explained(self, doing: str, path: str) -> AbstractContextManager[None]:
        """Turn errors of another library that is `doing` something at `path` into a `StoreError`."""

    def check_writable(self) -> None:
        """Write and remove a small file, making the place if it is not there."""


def locate(url: str) -> Location:
    """Return the place of `url`: a path or `file://` is local, any other scheme goes through fsspec."""
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
        with self.explained("read", path):
            return (self.root / path).read_bytes()

    def write_atomic(self, path: str, data: bytes) -> None:
        """Write a temporary file beside `path`, fsync it, rename it over `path`, fsync the folder."""
        target = self.root / path
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        with _explained("write", target):
            _make_folder(target.parent)
            faults.reached(f"write {path}")
            try:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                faults.reached(f"rename {path}")
                temporary.replace(target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
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

    def sync(self, path: str) -> None:
        """Fsync the file `path` and its folder."""
        target = self.root / path
        with self.explained("write", path):
            with target.open("rb") as file:
                os.fsync(file.fileno())
            _sync_folder(target.parent)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold an advisory lock on the file `.<name>.lock`; the kernel frees it when the process dies."""
        path = self.root / f".{name}.lock"
        with _explained("lock", path):
            _make_folder(self.root)
            handle = path.open("w")
            fcntl.flock(handle, fcntl.LOCK_EX)
        with handle:
            yield

    def zarr_store(self, path: str) -> Store:
        """Return the Zarr store at `path`."""
        return LocalStore(self.root / path)

    def explained(self, doing: str, path: str) -> AbstractContextManager[None]:
        """Turn operating-system errors while `doing` something at `path` into a `StoreError`."""
        return _explained(doing, self.root / path)

    def check_writable(self) -> None:
        """Write and remove a small file, making the folder if it is not there."""
        probe = f"writable-{uuid.uuid4().hex}"
        self.write_atomic(probe, b"negfacediff")
        with _explained("write", self.root):
            (self.root / probe).unlink()


class RemoteLocation:
    """A prefix of an object store, or any other fsspec URL. One put is the rename; there is no lock."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        with _explained_remote("open", self.url):
            # A listing that is older than another worker's commit would hide its record.
            self._files, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)

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
        """Return the sorted names directly below `path`; none when there are none."""
        with self.explained("list", path):
            try:
                entries = self._files.ls(f"{self._root}/{path}", detail=False)
            except FileNotFoundError:
                return []
            return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)

    def sync(self, path: str) -> None:
        """Do nothing: a finished put is durable."""

    def lock(self, name: str) -> AbstractContextManager[None]:
        """Do nothing: units never share an object, so only two plans of one store at once could meet."""
        return nullcontext()

    def zarr_store(self, path: str) -> Store:
        """Return the Zarr store at `path`."""
        return FsspecStore.from_url(f"{self.url}/{path}")

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
def _explained(doing: str, path: Path) -> Iterator[None]:
    """Turn an operating-system error into a `StoreError` that says what to do."""
    try:
        yield
    except OSError as error:
        other = f"{error.strerror or error}; mend that and run the same command again"
        remedy = _REMEDIES.get(error.errno or 0, other)
        raise StoreError(f"cannot {doing} {path}: {remedy}.") from error


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
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        raise StoreError(
            f"cannot {doing} {url}: {reason}; check the address, the credentials and the network, then run "
            "the same command again."
        ) from error


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

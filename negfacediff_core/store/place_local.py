"""A place that is a folder of a local or mounted file system."""

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from negfacediff_core.errors import StoreError
from negfacediff_core.explained import explained
from negfacediff_core.store import faults
from negfacediff_core.store.place import Entry, Lock, gone, lost

# Bytes that are read at a time of what does not tell its size.
_PIECE = 2**20


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
        # A stage may have 100,000 records: making `Path` and file objects takes longer than reading them.
        with self.explained("read", path):
            handle = os.open(f"{self.url}/{path}", os.O_RDONLY)
            try:
                # in one piece, which is not copied when it is joined
                size = os.fstat(handle).st_size or _PIECE
                return b"".join(iter(lambda: os.read(handle, size), b""))
            finally:
                os.close(handle)

    def write_atomic(self, path: str, data: bytes) -> None:
        """Write a temporary file beside `path`, fsync it, rename it over `path`, fsync the folder."""
        half = len(data) // 2
        target = self.root / path
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        with self._writing(path):
            _make_folder(target.parent, self.root)
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

    def touch(self, path: str) -> None:
        """Make the empty file `path`, or make it as new as if it had just been written."""
        with self._writing(path):
            (self.root / path).touch()

    def exists(self, path: str) -> bool:
        """Tell whether the file `path` is there."""
        with self.explained("read", path):
            return (self.root / path).exists()

    def modified(self, path: str) -> float | None:
        """Return the unix time of the last change of the file `path`; None if it is not there."""
        with self.explained("read", path):
            try:
                return (self.root / path).stat(follow_symlinks=False).st_mtime
            except (FileNotFoundError, NotADirectoryError):
                return None

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
    def lock(self, name: str, *, make: bool = False) -> Iterator[Lock]:
        """Hold an advisory lock on the file `.<name>.lock`; the kernel frees it when the process dies.

        Whoever removes the folder holds the lock meanwhile, and its file goes too: the others, who wait for a
        file that has no name any more, then begin anew.
        """
        path = self.root / f".{name}.lock"
        while True:
            with explained("lock", path):
                handle = self._open_lock(path, make)
            try:
                with explained("lock", path):
                    fcntl.flock(handle, fcntl.LOCK_EX)
                held = _FileLock(handle, path)
                if held.stands():
                    yield held
                    return
            finally:
                os.close(handle)

    def _open_lock(self, path: Path, make: bool) -> int:
        """Open the file of a lock, in a folder that is made, or must be there."""
        while True:
            if make:
                _make_folder(self.root)
            try:
                return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:
                if not make:  # otherwise it was removed since
                    raise gone(self.url) from None

    def explained(self, doing: str, path: str) -> AbstractContextManager[None]:
        """Turn operating-system errors while `doing` something at `path` into a `StoreError`."""
        return explained(doing, f"{self.url}/{path}")

    @contextmanager
    def _writing(self, path: str) -> Iterator[None]:
        """Explain errors of writing `path`; what is missing because the whole place is has gone."""
        with self.explained("write", path):
            try:
                yield
            except FileNotFoundError as error:
                if self.root.is_dir():
                    raise
                raise gone(self.url) from error

    def check_writable(self) -> None:
        """Write and remove a small file, making the folder if it is not there."""
        probe = f"writable-{uuid.uuid4().hex}"
        with explained("make", self.root):
            try:
                _make_folder(self.root)
            except FileNotFoundError as error:
                raise StoreError(
                    f"cannot make the folder {self.root}: {error.strerror}; choose another place for the "
                    "store."
                ) from error
        self.write_atomic(probe, b"negfacediff")
        with explained("write", self.root):
            (self.root / probe).unlink()


class _FileLock:
    """A lock of the kernel on an open file."""

    def __init__(self, handle: int, path: Path) -> None:
        self._handle, self._path = handle, path

    def stands(self) -> bool:
        """Tell whether the file that is locked is the one of this name, for which others wait."""
        with explained("lock", self._path):
            try:
                return os.path.samestat(os.fstat(self._handle), self._path.stat(follow_symlinks=False))
            except FileNotFoundError:
                return False

    def check(self) -> None:
        """Raise PlaceError if the folder has gone, and StoreError if somebody removed the lock."""
        if not self.stands():
            raise lost(str(self._path)) if self._path.parent.is_dir() else gone(str(self._path.parent))


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


def _make_folder(folder: Path, root: Path | None = None) -> None:
    """Make a folder and those above it, each safely on disk before anything is put into it.

    Only those below `root` where it is given: a place that has gone is not made anew.
    """
    if folder != root and not folder.is_dir():
        _make_folder(folder.parent, root)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""A folder that is written piece by piece, survives kills, and gets its name when it is whole.

`<out>.partial` holds what is there so far, and a state that says how many pieces that is and how long each
file that is appended to was then. Whoever goes on cuts what is longer back to that length, so that a piece
that was half written leaves nothing. The folder is renamed to `<out>` by one call, at the very end.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from negfacediff_core.errors import ConfigError, StoreError
from negfacediff_core.explained import explained
from negfacediff_core.export.manifest import (
    FileSum,
    Segments,
    holds,
    in_threads,
    is_whole,
    not_written,
    read_head,
)
from negfacediff_core.file_locks import locked

# Names that begin with a dot are of no finished export. The files that pieces have of their own, and what was
# put at the ends of others, a line each.
_STATE, _OWN, _SUMS, _LOCK = ".state.json", ".own", ".sums", ".lock"
_ANEW = os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Draft:
    """The beginning of an export in `folder`, of which the first `pieces` are written."""

    def __init__(self, out: Path, plan: str) -> None:
        self.out, self.plan = out, plan
        self.folder = out.with_name(f"{out.name}.partial")
        self.pieces = 0
        # files that the last piece was appended to, and the sizes of all others
        self._open: dict[str, BinaryIO] = {}
        self._sizes: dict[str, int] = {}

    @property
    def complete(self) -> bool:
        """Whether all that is left is to give the folder its name."""
        return not (self.folder / _STATE).exists() and is_done(self.folder, self.plan)

    def append(self, contents: Mapping[str, bytes], own: Iterable[str]) -> None:
        """Put the next piece's bytes at the ends of files; `own` are the lines of its whole files."""
        contents = {
            **contents,
            _SUMS: "".join(map(_sum_line, contents, contents.values())).encode(),
            _OWN: "".join([*own, "\n"]).encode(),
        }
        with explained("write", self.folder):
            # a set has thousands of shards, and a process may have so many files open
            for path in self._open.keys() - contents.keys():
                self._close(path)
            for path, content in contents.items():
                self._opened(path).write(content)
        self.pieces += 1

    def checkpoint(self) -> None:
        """Note that the pieces so far are there: whoever goes on begins behind them."""
        with explained("write", self.folder):
            for file in self._open.values():
                file.flush()
                os.fsync(file.fileno())
            sizes = {**self._sizes, **{path: file.tell() for path, file in self._open.items()}}
            _write_state(self.folder, {"plan": self.plan, "pieces": self.pieces, "sizes": sizes})

    def own_files(self) -> Iterator[FileSum]:
        """Yield the files that belong to one piece alone, as they were written, in order."""
        return (one for _, one in self._listed())

    def lost_pieces(self, progress: Callable[[int, int], None]) -> list[int]:
        """Return the pieces whose own files are no more what was written, as after a power failure.

        A checkpoint does not wait for these: to wait for half a million of them takes hours. `progress` is
        told how many pieces are looked at, and how many there are.
        """
        lost: set[int] = set()
        looked = -1
        for piece, intact in in_threads(lambda one: (one[0], holds(self.folder, one[1])), self._listed()):
            if piece > looked:
                progress(piece, self.pieces)
                looked = piece
            if not intact:
                lost.add(piece)
        return sorted(lost)

    def segments(self) -> Segments:
        """Return by path the lengths and CRC-32 of what was appended there, in order."""
        found: Segments = {}
        with (self.folder / _SUMS).open(encoding="utf-8") as lines:
            for line in lines:
                checksum, length, path = line.rstrip("\n").split(" ", 2)
                found.setdefault(path, []).append((int(length), int(checksum)))
        return {path: segments for path, segments in found.items() if path[0] != "."}

    def finish(self) -> None:
        """Give the folder its name; it holds the manifest by now, and whatever else belongs to it."""
        with explained("write", self.folder):
            # one call for all files: to wait for half a million of them one by one takes hours
            os.sync()
            # the state first: what is left of the others then holds nobody up who goes on
            (self.folder / _STATE).unlink(missing_ok=True)
            for path in {*self.folder.glob(".*")} - {self.folder / _LOCK}:
                path.unlink()
            self.folder.rename(self.out)
            (self.out / _LOCK).unlink()
            _sync(self.out.parent)

    def resume(self) -> None:
        """Read the state, and cut every file back to what it was then; raises as `draft`."""
        if not (self.folder / _STATE).exists():
            _write_state(self.folder, {"plan": self.plan, "pieces": 0, "sizes": {}})
        try:
            state = json.loads((self.folder / _STATE).read_bytes())
            plan, self.pieces, sizes = state["plan"], int(state["pieces"]), dict(state["sizes"])
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self.folder / _STATE} is damaged: remove {self.folder} and run the same command again."
            ) from error
        if plan != self.plan:
            raise ConfigError(
                f"{self.folder} is the beginning of another export (other images, or another format): remove "
                "it, or give another --out."
            )
        self._sizes = sizes
        for path in sizes:
            self._opened(path)
            self._close(path)

    def close(self) -> None:
        """Close the files that are appended to."""
        with explained("write", self.folder):
            for path in [*self._open]:
                self._sizes[path] = self._open[path].tell()
                self._open.pop(path).close()

    def _opened(self, path: str) -> BinaryIO:
        """Open a file to append to; what a killed run left behind its size does not count."""
        if path not in self._open:
            target, size = self.folder / path, self._sizes.get(path, 0)
            target.touch()
            self._open[path] = file = target.open("r+b")
            file.truncate(size)
            file.seek(size)
        return self._open[path]

    def _close(self, path: str) -> None:
        """Close a file for good: it is on the disk, and the state will say how long it is."""
        file = self._open.pop(path)
        with file:
            file.flush()
            os.fsync(file.fileno())
            self._sizes[path] = file.tell()

    def _listed(self) -> Iterator[tuple[int, FileSum]]:
        """Yield the pieces' own files, each with the number of its piece."""
        piece = 0
        with (self.folder / _OWN).open(encoding="utf-8") as lines:
            for line in lines:
                if line == "\n":
                    piece += 1
                    continue
                sha256, size, path = line.rstrip("\n").split(" ", 2)
                yield piece, FileSum(path, int(size), sha256)


@contextmanager
def draft(out: Path, plan: str) -> Iterator[Draft]:
    """Hold the draft of an export that goes to `out`, begun or gone on with.

    `plan` is a fingerprint of all that decides what is written: only the same export can be gone on with.

    Raises:
        ConfigError: if `out` is taken, or another export was begun there.
        StoreError: if another process is writing it, or the folder cannot be written.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(
            f"{out} is there already, and is not this export, or not all of it: remove it, or give another "
            "--out."
        )
    begun = Draft(out, plan)
    busy = f"another process is writing {begun.folder}: let it end."
    with locked(begun.folder / _LOCK, busy), closing(begun):
        if not begun.complete:
            begun.resume()
        yield begun


def is_done(out: Path, plan: str) -> bool:
    """Tell whether `out` holds this very export with all of its files, each of its size."""
    try:
        return read_head(out)["plan"] == plan and is_whole(out)
    except (StoreError, OSError):
        return False


def write_file(folder: Path, path: str, content: bytes) -> str:
    """Write a whole file of a piece, and read it back; returns its line for `Draft.append`.

    Raises:
        DamagedError: if it does not hold what was written.
        StoreError: if it cannot be written.
    """
    target = f"{folder}/{path}"
    with explained("write", folder):
        try:
            handle = os.open(target, _ANEW, 0o666)
        except FileNotFoundError:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(target, _ANEW, 0o666)
        try:
            # a write may take less than it is given, where the disk is nearly full
            left = memoryview(content)
            while left:
                left = left[os.write(handle, left) :]
            if os.pread(handle, len(content) + 1, 0) != content:
                raise not_written(folder, path)
        finally:
            os.close(handle)
    return f"{hashlib.sha256(content).hexdigest()} {len(content)} {path}\n"


def _sum_line(path: str, content: bytes) -> str:
    """The line that says what was put at the end of a file."""
    return f"{zlib.crc32(content)} {len(content)} {path}\n"


def _write_state(folder: Path, state: Mapping[str, Any]) -> None:
    temporary = folder / f"{_STATE}.tmp"
    with temporary.open("w") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / _STATE)
    # with the names of the files that are appended to
    _sync(folder)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""A folder that is written piece by piece, survives kills, and gets its name when it is whole.

`<out>.partial` holds what is there so far, and a state that says how many pieces that is and how long each
file was then. Whoever goes on cuts what is longer back to that length, so that a piece that was half written
leaves nothing. The folder is renamed to `<out>` by one call, at the very end.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from negfacediff_core.errors import ConfigError, PlaceError, StoreError
from negfacediff_core.export.manifest import MANIFEST, Segments

# Names that begin with a dot are of no finished export.
_STATE, _SUMS = ".state.json", ".sums"
_ANEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


class Draft:
    """The beginning of an export in `folder`, of which the first `pieces` are written."""

    def __init__(self, out: Path, plan: str) -> None:
        self.out, self.plan = out, plan
        self.folder = out.with_name(f"{out.name}.partial")
        self.pieces = 0
        self._files: dict[str, Any] = {}

    @property
    def complete(self) -> bool:
        """Whether all that is left is to give the folder its name."""
        return not (self.folder / _STATE).exists() and _plan_of(self.folder) == self.plan

    def append(self, contents: Mapping[str, bytes], sums: Iterable[str]) -> None:
        """Put the next piece's bytes at the ends of files; `sums` are the lines of its whole files."""
        lines = [*sums]
        for path, content in contents.items():
            lines.append(sum_line(content, path))
            self._open(path).write(content)
        self._open(_SUMS).write("".join(lines).encode())
        self.pieces += 1

    def checkpoint(self) -> None:
        """Note that the pieces so far are there: whoever goes on begins behind them."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        sizes = {path: file.tell() for path, file in self._files.items()}
        _write_state(self.folder, {"plan": self.plan, "pieces": self.pieces, "sizes": sizes})

    def segments(self) -> Segments:
        """Return by path the lengths and CRC-32 of what was written there, in order."""
        found: Segments = {}
        for line in (self.folder / _SUMS).read_text().splitlines():
            checksum, length, path = line.split(" ", 2)
            found.setdefault(path, []).append((int(length), int(checksum)))
        return found

    def finish(self) -> None:
        """Give the folder its name; it holds the manifest by now, and whatever else belongs to it."""
        # one call for all files: to wait for half a million of them one by one takes hours
        os.sync()
        for name in (_STATE, _SUMS):
            (self.folder / name).unlink(missing_ok=True)
        self.folder.rename(self.out)
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
        for path, size in sizes.items():
            self._open(path, size)

    def close_files(self) -> None:
        """Close the files that are appended to."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _open(self, path: str, size: int = 0) -> Any:
        """Open a file to append to; what a killed run left behind the `size` of its state does not count."""
        if path not in self._files:
            target = self.folder / path
            target.touch()
            self._files[path] = file = target.open("r+b")
            file.truncate(size)
            file.seek(size)
        return self._files[path]


@contextmanager
def draft(out: Path, plan: str) -> Iterator[Draft]:
    """Hold the draft of an export that goes to `out`, begun or gone on with.

    `plan` is a fingerprint of all that decides what is written: only the same export can be gone on with.

    Raises:
        ConfigError: if `out` is taken, or another export was begun there.
        StoreError: if another process is writing it, or the folder cannot be written (PlaceError).
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(
            f"{out} is there already, and is not this export: remove it, or give another --out."
        )
    begun = Draft(out, plan)
    with _explained(begun.folder):
        begun.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(begun.folder, os.O_RDONLY)
        try:
            try:
                # of the folder itself: there is no file of a lock to be left over
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StoreError(f"another process is writing {begun.folder}: let it end.") from error
            if not begun.complete:
                begun.resume()
            yield begun
        finally:
            begun.close_files()
            os.close(handle)


def is_done(out: Path, plan: str) -> bool:
    """Tell whether `out` holds this very export, whole."""
    return _plan_of(out) == plan


def write_file(folder: Path, path: str, content: bytes) -> str:
    """Write a whole file of a piece; returns its line for `Draft.append`."""
    target = f"{folder}/{path}"
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
    finally:
        os.close(handle)
    return sum_line(content, path)


def sum_line(content: bytes, path: str) -> str:
    """Return the line that says what was written to a file, or to its end."""
    return f"{zlib.crc32(content)} {len(content)} {path}\n"


def _plan_of(folder: Path) -> str | None:
    """Return the plan in the manifest of a folder; None where there is none."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return content.get("plan") if isinstance(content, dict) else None


def _write_state(folder: Path, state: Mapping[str, Any]) -> None:
    temporary = folder / f"{_STATE}.tmp"
    with temporary.open("w") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / _STATE)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn what the operating system says while an export is written into one sentence."""
    try:
        yield
    except OSError as error:
        raise PlaceError(
            f"cannot write {error.filename or folder}: {error.strerror or error}; what is exported so far "
            "stays: mend that and run the same command again."
        ) from error


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""`manifest.json`: every file with its SHA-256, and what all of it was made from.

Each file has a line of its own there, so that the manifest of millions is written and read line by line.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from negfacediff_core.errors import DamagedError, StoreError

MANIFEST = "manifest.json"
#: By path the lengths and CRC-32 of what was written there, one after the other.
Segments = dict[str, list[tuple[int, int]]]
# Bytes that are read at a time, and files that wait for the threads that hash.
_PIECE, _WAITING = 2**20, 4096
_HASHERS = 4
# The lines between which the files stand.
_FILES, _END = ' "files": {\n', " }\n"
MISSING = "is missing"
_A = TypeVar("_A")
_B = TypeVar("_B")


class FileSum(NamedTuple):
    """A file of an export: its path below the folder, its bytes, and its SHA-256 in hexadecimal."""

    path: str
    size: int
    sha256: str


def checksums(folder: Path, written: Segments, progress: Callable[[int, int], None]) -> list[FileSum]:
    """Read the files back that lie in a folder itself, but for a manifest and names that begin with a dot.

    `written` is what was written to them: where the disk does not hold it, it is not reported as whole.
    `progress` is told how many megabytes are done, and how many there are.

    Raises:
        DamagedError: if a file is missing or is not what was written.
    """
    sizes = {
        entry.name: entry.stat().st_size
        for entry in os.scandir(folder)
        if entry.is_file() and entry.name[0] != "." and entry.name != MANIFEST
    }
    if missing := written.keys() - sizes.keys():
        raise not_written(folder, min(missing))
    total, done = sum(sizes.values()) // 10**6 + 1, 0
    found: list[FileSum] = []
    for one in in_threads(lambda path: _checksum(folder, path, written.get(path, [])), sorted(sizes)):
        progress(min(done // 10**6, total - 1), total)
        found.append(one)
        done += one.size
    progress(total, total)
    return found


def in_threads(look: Callable[[_A], _B], items: Iterable[_A]) -> Iterator[_B]:
    """Yield what `look` returns for the items, in order, from threads; few items are held at a time."""
    left = iter(items)
    with ThreadPoolExecutor(_HASHERS) as pool:
        while batch := list(islice(left, _WAITING)):
            yield from pool.map(look, batch)


def write_manifest(
    folder: Path, plan: str, lineage: Mapping[str, Any], files: Callable[[], Iterable[FileSum]]
) -> None:
    """Write `manifest.json`: the `plan`'s fingerprint, the `lineage`, the total of files, and each of them.

    `files` returns them anew at each call.
    """
    count = size = 0
    for one in files():
        count += 1
        size += one.size
    head = {"schema": 1, "plan": plan, **lineage, "total": {"files": count, "bytes": size}}
    with (folder / MANIFEST).open("w", encoding="utf-8") as out:
        out.write(json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}") + ",\n" + _FILES)
        ending = ""
        for one in files():
            said = json.dumps({"bytes": one.size, "sha256": one.sha256})
            out.write(f"{ending}  {json.dumps(one.path)}: {said}")
            ending = ",\n"
        out.write(f"\n{_END}}}\n")


def read_head(folder: Path) -> dict[str, Any]:
    """Return what the manifest of an export says of all of it; not its files.

    Raises:
        StoreError: if there is none.
        DamagedError: if it is not as `write_manifest` writes it.
    """
    head, _ = _open(folder)
    return head


def read_files(folder: Path) -> Iterator[FileSum]:
    """Yield the files that the manifest of an export lists; raises as `read_head`."""
    _, lines = _open(folder)
    for line in lines:
        if line == _END:
            return
        try:
            ((path, said),) = json.loads("{" + line.strip().rstrip(",") + "}").items()
            yield FileSum(path, int(said["bytes"]), said["sha256"])
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(folder) from error
    raise _damaged(folder)


def is_whole(folder: Path) -> bool:
    """Tell whether every file of the manifest is there with its size; what is in them is not looked at."""
    return all(_size(folder, one.path) == one.size for one in read_files(folder))


def check_manifest(folder: Path, progress: Callable[[int, int], None]) -> Iterator[str]:
    """Yield what is wrong with an export, a sentence a file; nothing if all is as the manifest says.

    Every file is read. `progress` is told how many megabytes are done, and how many there are. Raises as
    `read_head`.
    """
    total = read_head(folder)["total"]["bytes"] // 10**6 + 1
    count = done = told = missing = 0
    for one, problem in in_threads(lambda one: (one, _problem(folder, one)), read_files(folder)):
        if done // 10**6 >= told:
            progress(done // 10**6, total)
            told = done // 10**6 + 1
        count += 1
        done += one.size
        missing += problem == MISSING
        if problem:
            yield f"{one.path} {problem}"
    progress(total, total)
    if sum(1 for _ in _paths(folder)) != count - missing:
        listed = {one.path for one in read_files(folder)}
        yield from (f"{path} is no part of the export" for path in _paths(folder) if path not in listed)


def holds(folder: Path, one: FileSum) -> bool:
    """Tell whether a file is there and has its SHA-256."""
    return _problem(folder, one) is None


def _problem(folder: Path, one: FileSum) -> str | None:
    """What is wrong with a file, None if nothing is."""
    try:
        return None if _checksum(folder, one.path, []) == one else "is not what was exported"
    except FileNotFoundError:
        return MISSING
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def not_written(folder: Path, path: str) -> DamagedError:
    """Say that a file does not hold what was written to it."""
    return DamagedError(
        f"{folder / path} does not hold what was written there: check the disk, remove {folder}, then run "
        "the same command again."
    )


def _open(folder: Path) -> tuple[dict[str, Any], Iterator[str]]:
    """Return the head of a manifest, and the lines behind it."""
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(f"{folder} is no export: there is no {MANIFEST} in it.")

    def lines() -> Iterator[str]:
        with path.open(encoding="utf-8") as file:
            yield from file

    following = lines()
    lines_before: list[str] = []
    try:
        for line in following:
            if line == _FILES:
                head = json.loads("".join(lines_before).rstrip(",\n") + "}")
                _ = head["plan"], head["licences"], head["total"]["files"], head["total"]["bytes"]
                return head, following
            lines_before.append(line)
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder) from error
    raise _damaged(folder)


def _damaged(folder: Path) -> DamagedError:
    return DamagedError(
        f"{folder / MANIFEST} is damaged or of an earlier version, so that nothing can be said of {folder}: "
        "export it anew, or copy it again."
    )


def _paths(folder: Path) -> Iterator[str]:
    """Yield the files of an export; with `Path` objects half a million of them take minutes.

    Names that begin with a dot are of none: what version control and file managers leave there.
    """
    start = len(f"{folder}/")
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in sorted(names):
            path = f"{place}/{name}"[start:]
            if name[0] != "." and path != MANIFEST:
                yield path


def _size(folder: Path, path: str) -> int | None:
    """The bytes of a file; None where it is not there."""
    try:
        return (folder / path).stat().st_size
    except OSError:
        return None


def _checksum(folder: Path, path: str, segments: list[tuple[int, int]]) -> FileSum:
    """Hash a file, and compare it with what was written to it piece by piece."""
    whole, size = hashlib.sha256(), 0
    handle = os.open(f"{folder}/{path}", os.O_RDONLY)
    try:
        for length, expected in segments:
            found = 0
            while length and (content := os.read(handle, min(length, _PIECE))):
                found = zlib.crc32(content, found)
                whole.update(content)
                size += len(content)
                length -= len(content)
            if length or found != expected:
                raise not_written(folder, path)
        while content := os.read(handle, _PIECE):
            whole.update(content)
            size += len(content)
    finally:
        os.close(handle)
    return FileSum(path, size, whole.hexdigest())

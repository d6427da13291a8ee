"""`manifest.json`: every file with its SHA-256, and what all of it was made from."""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from negfacediff_core.errors import DamagedError

MANIFEST = "manifest.json"
#: By path the lengths and CRC-32 of what was written there, one after the other.
Segments = dict[str, list[tuple[int, int]]]
# Bytes that are read at a time, and files that a thread takes at a time.
_PIECE, _GROUP = 2**20, 64


class FileSum(NamedTuple):
    """A file of an export: its path below the folder, its bytes, and its SHA-256 in hexadecimal."""

    path: str
    size: int
    sha256: str


def checksums(
    folder: Path, written: Segments, threads: int, progress: Callable[[int, int], None]
) -> list[FileSum]:
    """Read every file of a folder back and hash it, but for a manifest and names that begin with a dot.

    `written` is what was written: where the disk does not hold it, it is not reported as whole.
    `progress` is told how many megabytes are done, and how many were written.

    Raises:
        DamagedError: if a file is missing or is not what was written.
    """
    paths = _paths(folder)
    if missing := written.keys() - set(paths):
        raise _not_written(folder, min(missing))
    total = sum(length for segments in written.values() for length, _ in segments) // 10**6 + 1
    groups = [paths[start : start + _GROUP] for start in range(0, len(paths), _GROUP)]
    found: list[FileSum] = []
    done = 0
    with ThreadPoolExecutor(threads) as pool:
        for sums in pool.map(
            lambda group: [_checksum(folder, path, written.get(path, [])) for path in group], groups
        ):
            progress(min(done // 10**6, total - 1), total)
            found += sums
            done += sum(one.size for one in sums)
    progress(total, total)
    return found


def manifest(plan: str, files: list[FileSum], lineage: Mapping[str, Any]) -> bytes:
    """Return the content of `manifest.json`: the `plan`'s fingerprint, the `files`, and the `lineage`."""
    listed = {one.path: {"bytes": one.size, "sha256": one.sha256} for one in files}
    content = {"schema": 1, "plan": plan, **lineage, "files": listed}
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def check_manifest(folder: Path) -> Iterator[str]:
    """Yield what is wrong with an export, a sentence a file; nothing if all is as the manifest says."""
    files = json.loads((folder / MANIFEST).read_bytes())["files"]
    for path, said in files.items():
        if not (folder / path).is_file():
            yield f"{path} is missing"
        elif _checksum(folder, path, []).sha256 != said["sha256"]:
            yield f"{path} is not what was exported"
    yield from (f"{path} is no part of the export" for path in _paths(folder) if path not in files)


def _paths(folder: Path) -> list[str]:
    """Return the files of an export, sorted; with `Path` objects half a million of them take minutes."""
    start = len(f"{folder}/")
    return sorted(
        f"{place}/{name}"[start:]
        for place, _, names in os.walk(folder)
        for name in names
        if name[0] != "." and name != MANIFEST
    )


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
                raise _not_written(folder, path)
        while content := os.read(handle, _PIECE):
            whole.update(content)
            size += len(content)
    finally:
        os.close(handle)
    return FileSum(path, size, whole.hexdigest())


def _not_written(folder: Path, path: str) -> DamagedError:
    return DamagedError(
        f"{folder / path} does not hold what was written there: check the disk, remove {folder}, then run "
        "the same command again."
    )

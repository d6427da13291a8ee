"""What the crops of a training set are, so that other ones of the same names are not taken for them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from negfacediff_core.errors import DamagedError
from negfacediff_core.explained import explained
from negfacediff_core.export.manifest import MANIFEST, read_head
from negfacediff_core.file_hashes import file_sha256

# Of files without a manifest: so many blocks are looked at, of so many bytes.
_BLOCKS, _BLOCK = 256, 4096


class Origin(NamedTuple):
    """Where crops come from: the `digest` of what `kind` says.

    `aligned`: fingerprint of the stage of a store; `manifest`: SHA-256 of an export's manifest.json, which
    has that of every file; `files`: SHA-256 of names and sizes of files, and of a sample of what they hold.
    `samples` is the fingerprint of the stage that made the images in a store; empty where it is not known.
    """

    kind: str
    digest: str
    samples: str = ""


def origin_of(source: Path, files: Sequence[Path]) -> Origin:
    """Return the origin of crops in `files` of the folder `source`, by its manifest if there is one.

    Raises StoreError if they cannot be read.
    """
    path = source / MANIFEST
    if not path.exists():
        return Origin("files", _sampled(source, files))
    with explained("read", path):
        digest = file_sha256(path)
    try:
        samples = read_head(source)["stages"]["samples"]["fingerprint"]
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{path} is no manifest of an export: remove it, or export anew.") from error
    return Origin("manifest", digest, samples)


def _sampled(source: Path, files: Sequence[Path]) -> str:
    """SHA-256 of names, sizes, and blocks of bytes that lie evenly among all of them."""
    digest = hashlib.sha256()
    sizes = np.array([_size(path) for path in files], np.int64)
    for path, size in zip(files, sizes.tolist(), strict=True):
        digest.update(f"{path.relative_to(source)}\t{size}\n".encode())
    ends = np.cumsum(sizes)
    for place in np.linspace(0, max(ends[-1] - 1, 0), _BLOCKS).astype(np.int64):
        number = int(np.searchsorted(ends, place, side="right"))
        if number < len(files):
            with explained("read", files[number]), files[number].open("rb", buffering=0) as file:
                file.seek(int(place - ends[number] + sizes[number]))
                digest.update(file.read(_BLOCK) or b"")
    return digest.hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DamagedError(
            f"{path} cannot be read ({error.strerror}): copy or export the set anew."
        ) from error

"""Training sets: aligned 112x112 crops with identities, wherever they lie, read by number in any order."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import UnidentifiedImageError

from negfacediff_core.errors import ConfigError, DamagedError, PlaceError, StoreError
from negfacediff_core.explained import explained
from negfacediff_core.export.filter import check_source, read_filter
from negfacediff_core.file_locks import locked
from negfacediff_core.recognition.ahead import done_ahead
from negfacediff_core.recognition.backbones import INPUT_SIZE
from negfacediff_core.recognition.origins import Origin
from negfacediff_core.recognition.pixels import decode_rgb
from negfacediff_core.stopping import heed
from negfacediff_core.tensor_files import replacing

CROP = (INPUT_SIZE, INPUT_SIZE, 3)
Progress = Callable[[int, int], None]  # done, total
# Crops that a thread looks at in one go.
_LOOKED = 64


class Reader(Protocol):
    """Whatever holds crops by number. It travels to other processes, so that it opens files when it reads."""

    def read(self, row: int) -> NDArray[np.uint8]:
        """Return the crop `row`, `(112, 112, 3)` uint8 RGB."""
        ...


@dataclass(frozen=True)
class TrainingSet:
    """Crops of identities.

    Image i of `names` is crop `rows[i]` of the `reader`, and shows the identity `labels[i]` of
    0 .. classes-1. `origin` says what crops these are. `numbers` `(N, 2)` are identity and replicate in the
    store that the images come from; None where that is not known.
    """

    reader: Reader
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    rows: NDArray[np.int64]
    origin: Origin
    numbers: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def classes(self) -> int:
        """Number of identities."""
        return int(self.labels.max()) + 1 if len(self) else 0

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of which images there are, whom they show, and where they come from."""
        digest = hashlib.sha256("\n".join([self.origin.kind, self.origin.digest, *self.names]).encode())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def read(self, images: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return crops `(N, 112, 112, 3)` uint8 RGB of the `images` with these numbers."""
        crops = np.empty((len(images), *CROP), np.uint8)
        for place, image in enumerate(images):
            crops[place] = self.reader.read(int(self.rows[image]))
        return crops

    def chosen(self, images: NDArray[np.int64]) -> "TrainingSet":
        """Return the set of these images alone, its identities counted anew from 0."""
        return replace(
            self,
            names=tuple(self.names[image] for image in images),
            labels=np.unique(self.labels[images], return_inverse=True)[1].astype(np.int64),
            rows=self.rows[images],
            numbers=None if self.numbers is None else self.numbers[images],
        )


def decode(content: bytes, name: str) -> NDArray[np.uint8]:
    """Decode a crop; DamagedError, with its `name`, if that is no image, ConfigError for another size."""
    try:
        pixels = decode_rgb(content)
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow's decoders raise for damaged files
        # Pillow names what it was given, which is no file
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise DamagedError(f"{name} is no image that can be read: {reason}.") from error
    if pixels.shape != CROP:
        raise ConfigError(
            f"{name} has {pixels.shape[1]}x{pixels.shape[0]} pixels: training takes aligned crops of "
            f"{INPUT_SIZE}x{INPUT_SIZE}. Export a run's aligned images, or align these first."
        )
    return pixels


class FileReader:
    """A file a crop."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths

    def read(self, row: int) -> NDArray[np.uint8]:
        """As `Reader.read`."""
        path = self.paths[row]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DamagedError(f"{path} cannot be read ({error.strerror}).") from error
        return decode(content, str(path))


class SliceReader:
    """Crops that lie in larger files: image i is `places[i]`, the number of its file, offset and length."""

    def __init__(
        self, paths: Sequence[Path], places: NDArray[np.int64], unpack: Callable[[bytes, str], bytes]
    ):
        self.paths, self.places, self.unpack = paths, places, unpack

    def read(self, row: int) -> NDArray[np.uint8]:
        """As `Reader.read`."""
        file, offset, length = map(int, self.places[row])
        name = f"{self.paths[file]}, byte {offset}"
        return decode(self.unpack(_bytes_at(self.paths[file], offset, length), name), name)


class PackedReader:
    """Crops one behind the other in one file, not encoded: see `pack`."""

    def __init__(self, path: Path):
        self.path = path

    def read(self, row: int) -> NDArray[np.uint8]:
        """As `Reader.read`."""
        size = int(np.prod(CROP))
        return np.frombuffer(_bytes_at(self.path, row * size, size), np.uint8).reshape(CROP)


def pack(path: Path, count: int, parts: Iterator[NDArray[np.uint8]]) -> PackedReader:
    """Have `count` crops in a file: where it is not there yet, they are written `(N, 112, 112, 3)` by part.

    Whoever else packs into the same folder is waited for. Raises PlaceError if there is no room for them,
    DamagedError if there are more, or fewer.
    """
    size = count * int(np.prod(CROP))
    with locked(path.with_name(".packing.lock")):
        if path.exists() and path.stat().st_size == size:
            return PackedReader(path)
        _check_room(path, size)
        with replacing(path) as file:
            for part in parts:
                heed()
                file.write(np.ascontiguousarray(part).tobytes())
            if file.tell() != size:
                raise DamagedError(f"{path.name} is {file.tell():,} bytes long, and {size:,} were expected.")
    return PackedReader(path)


def _check_room(path: Path, size: int) -> None:
    with explained("write", path):
        free = shutil.disk_usage(path.parent).free
    if free < size:
        raise PlaceError(
            f"{path.parent} has {free / 1e9:,.1f} GB free, and the crops take {size / 1e9:,.1f} GB: free "
            "some, or keep them elsewhere (cache)."
        )


def unreadable(crops: TrainingSet, threads: int, progress: Progress) -> list[str]:
    """Read every crop once, and say of each that cannot be trained on what is wrong with it.

    Crops that were packed have been read. Raises StoppedError as `heed`.
    """
    if isinstance(crops.reader, PackedReader):
        return []

    def look(rows: NDArray[np.int64]) -> list[str]:
        found = []
        for row in rows:
            try:
                crops.reader.read(int(row))
            except (StoreError, ConfigError) as error:
                found.append(str(error))
        return found

    wrong: list[str] = []
    parts = [crops.rows[start : start + _LOOKED] for start in range(0, len(crops), _LOOKED)]
    progress(0, len(crops))
    for done, found in enumerate(done_ahead(look, parts, threads), start=1):
        heed()
        wrong += found
        progress(min(done * _LOOKED, len(crops)), len(crops))
    return wrong


def filtered(crops: TrainingSet, path: Path) -> TrainingSet:
    """Leave the images that a filter takes, by their numbers in the store, or else by their names.

    Raises ConfigError if there is none, it is of another run's images, or it names an image that the set has
    not.
    """
    wanted = read_filter(path)
    check_source(path, wanted, crops.origin.samples)
    known: list[Any] = list(crops.names)
    asked: list[Any] = list(wanted.names)
    if crops.numbers is not None and wanted.numbers is not None:
        known, asked = list(map(tuple, crops.numbers.tolist())), list(map(tuple, wanted.numbers.tolist()))
    places = {image: place for place, image in enumerate(known)}
    if missing := [name for name, image in zip(wanted.names, asked, strict=True) if image not in places]:
        raise ConfigError(
            f"The filter {path} takes {len(missing):,} images that the training set has not, such as "
            f"{missing[0]}: it is of another set."
        )
    return crops.chosen(np.sort([places[image] for image in set(asked)]))


def _bytes_at(path: Path, offset: int, length: int) -> bytes:
    with explained("read", path), path.open("rb", buffering=0) as file:
        file.seek(offset)
        content = file.read(length)
    if content is None or len(content) != length:
        raise DamagedError(f"{path} ends before byte {offset + length}.")
    return content

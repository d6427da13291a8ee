"""A strict reader of RecordIO image sets: what is not exactly as it should be is refused, with its place."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from negfacediff_core.errors import DamagedError

MAGIC = struct.pack("<I", 0xCED7230A)
FLAG_SHIFT = 29
# flag (number of further labels), label, and two ids
HEADER = struct.Struct("<IfQQ")
_FRAME = struct.Struct("<4sI")
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)


class ImageRecord(NamedTuple):
    """A record: its `key`, its labels, and an encoded image, empty where the record holds none."""

    key: int
    labels: tuple[float, ...]
    image: bytes


@dataclass(frozen=True)
class RecordSet:
    """A whole set: the records of its images in order, and by label the keys of its images.

    `ranges` are what the identities' records say of the header variant, empty in the headerless one.
    """

    images: list[ImageRecord]
    classes: int
    height: int
    width: int
    ranges: list[tuple[int, int]]


def read_set(folder: Path) -> RecordSet:
    """Read `train.rec`, `train.idx` and `property` of a folder, of either variant.

    Raises:
        DamagedError: for anything that is malformed, or where the three contradict each other.
    """
    classes, height, width = _read_property(folder / "property")
    index = _read_index(folder / "train.idx")
    found = list(read_records(folder / "train.rec"))
    if index != {key: offset for key, (offset, _) in enumerate(found)}:
        raise _malformed(folder / "train.idx", "it does not name the offset of every record by its key")
    records = [parse_image(payload, f"{folder / 'train.rec'}, byte {offset}") for offset, payload in found]
    for key, record in enumerate(records):
        if record.key != key:
            raise _malformed(folder / "train.rec", f"record {key} says that it is {record.key}")
    ranges: list[tuple[int, int]] = []
    if records and len(records[0].labels) > 1:
        images, ranges = _split(records, folder / "train.rec")
    else:
        images = records
    _check_images(images, classes, ranges, folder / "train.rec")
    return RecordSet(images, classes, height, width, ranges)


def read_records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the byte offset and the payload of every record of a file, its parts put together.

    Raises:
        DamagedError: for another magic number, parts out of order, other padding than zeros, or a file that
            ends within a record.
    """
    with path.open("rb") as file:
        while True:
            offset = file.tell()
            parts: list[bytes] = []
            flag = _WHOLE
            while not parts or flag not in (_WHOLE, _LAST):
                part = _read_part(file, path)
                if part is None:
                    if not parts:
                        return
                    raise _malformed(path, f"the record at byte {offset} has no last part")
                expected = (_MIDDLE, _LAST) if parts else (_WHOLE, _FIRST)
                flag, content = part
                if flag not in expected:
                    raise _malformed(path, f"the record at byte {offset} has its parts out of order")
                parts.append(content)
            yield offset, MAGIC.join(parts)


def parse_image(payload: bytes, where: str) -> ImageRecord:
    """Take the payload of an image's record apart; DamagedError, naming `where`, if it is too short."""
    if len(payload) < HEADER.size:
        raise DamagedError(f"{where}: {len(payload)} bytes are no image record.")
    flag, label, key, second = HEADER.unpack_from(payload)
    start = HEADER.size + 4 * flag
    if len(payload) < start or second:
        raise DamagedError(f"{where}: its header is not that of an image record.")
    labels = tuple(np.frombuffer(payload[HEADER.size : start], "<f4").tolist()) if flag else (label,)
    return ImageRecord(key, labels, payload[start:])


def _read_part(file: BinaryIO, path: Path) -> tuple[int, bytes] | None:
    """Read one framed part; None at the end of the file."""
    offset = file.tell()
    frame = file.read(_FRAME.size)
    if not frame:
        return None
    if len(frame) < _FRAME.size or frame[:4] != MAGIC:
        raise _malformed(path, f"no record begins at byte {offset}")
    flag, length = frame_of(frame)
    padded = length + -length % 4
    content = file.read(padded)
    if len(content) < padded:
        raise _malformed(path, f"it ends within the record at byte {offset}")
    if any(content[length:]):
        raise _malformed(path, f"the record at byte {offset} is not padded with zeros")
    if flag > _LAST:
        raise _malformed(path, f"the record at byte {offset} has the unknown flag {flag}")
    return flag, content[:length]


def frame_of(frame: bytes) -> tuple[int, int]:
    """Return flag and length of a frame's 8 bytes."""
    _, word = _FRAME.unpack(frame)
    return word >> FLAG_SHIFT, word & (1 << FLAG_SHIFT) - 1


def _split(records: list[ImageRecord], path: Path) -> tuple[list[ImageRecord], list[tuple[int, int]]]:
    """Part the records of the header variant into those of images, and what those of identities say."""
    first, end = map(int, records[0].labels)
    if not 1 <= first <= end == len(records) or records[0].image:
        raise _malformed(path, f"its header says that identities have the keys {first} to {end}")
    ranges = []
    for record in records[first:]:
        if len(record.labels) != 2 or record.image:
            raise _malformed(path, f"record {record.key} is not that of an identity")
        ranges.append((int(record.labels[0]), int(record.labels[1])))
    return records[1:first], ranges


def _check_images(images: list[ImageRecord], classes: int, ranges: list[tuple[int, int]], path: Path) -> None:
    for record in images:
        if len(record.labels) != 1 or not record.image:
            raise _malformed(path, f"record {record.key} is not that of an image")
        if not 0 <= record.labels[0] < classes or record.labels[0] % 1:
            raise _malformed(path, f"record {record.key} has the label {record.labels[0]} of {classes}")
    if not ranges:
        return
    labels = np.array([record.labels[0] for record in images], np.int64)
    edges = np.concatenate([[0], np.cumsum(np.bincount(labels, minlength=classes))]) + 1
    if (
        ranges != list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
        or (np.diff(labels) < 0).any()
    ):
        raise _malformed(path, "the identities' records do not say where their images are")


def _read_index(path: Path) -> dict[int, int]:
    """Read `key<TAB>offset` lines."""
    try:
        lines = (line.split("\t") for line in path.read_text("ascii").splitlines())
        pairs = [(int(key), int(offset)) for key, offset in lines]
        index = dict(pairs)
    except ValueError as error:
        raise _malformed(path, "a line is not a key, a tab and a byte offset") from error
    if len(index) != len(pairs):
        raise _malformed(path, "a key stands there twice")
    return index


def _read_property(path: Path) -> tuple[int, int, int]:
    try:
        classes, height, width = map(int, path.read_text("ascii").split(","))
    except ValueError as error:
        raise _malformed(path, "it is not `classes,height,width`") from error
    return classes, height, width


def _malformed(path: Path, what: str) -> DamagedError:
    return DamagedError(f"{path} is malformed: {what}.")

"""MXNet's RecordIO as insightface's trainers read it: `train.rec`, `train.idx` and `property`.

A record is a magic number, a length with a flag, the payload, and zeros up to a multiple of 4 bytes, all
little-endian. The payload of an image is a header (flag, label, two ids), further labels, and the encoded
image.
Two variants are in use:

    header       key 0 says where the identities' records begin and end; images have the keys 1 .. n, and
                 a record an identity follows, which says where its images are: MXFaceDataset, AdaFace
    headerless   images alone, from key 0: MXFaceDataset, NVIDIA DALI, CVLface (with `train.tsv`)
"""

import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import ConfigError
from negfacediff_core.export.layout import LABELS, Layout, Sample, Written, identity_name, label_lines
from negfacediff_core.export.read_recordio import FLAG_SHIFT, HEADER, MAGIC

RECORDS, INDEX, PROPERTY, LIST = "train.rec", "train.idx", "property", "train.tsv"
# Bytes of each record, uint32, from which the index follows; no file of a finished export.
LENGTHS = ".lengths"
#: Whole numbers that a float32 label holds exactly end here.
MOST = 2**24


def check(layout: Layout) -> None:
    """Raise ConfigError where a label, or a key that is kept in one, would not be exact."""
    held, what = len(layout.identities), "identities"
    if layout.variant == "header":
        held, what = held + layout.images + 1, "identities and images together"
    if held > MOST:
        raise ConfigError(
            f"{held:,} {what} are too many for a .rec file of this variant, whose labels are float32 and "
            f"exact up to {MOST:,}: take another format, or the variant headerless, or fewer images."
        )


def write(piece: int, samples: Sequence[Sample], layout: Layout) -> Written:
    """Make records of samples; those of the first piece come behind the header, where there is one."""
    first = int(layout.variant == "header")
    keys = [first + sample.number for sample in samples]
    records = []
    if first and piece == 0:
        records.append(record(pack((layout.images + 1, layout.images + 1 + len(layout.identities)), 0)))
    records += [record(pack(one.label, key, one.image)) for key, one in zip(keys, samples, strict=True)]
    appends = {
        RECORDS: b"".join(records),
        LENGTHS: _lengths(records).tobytes(),
        LABELS: label_lines("key", [*map(str, keys)], samples, layout),
    }
    if not first:
        # the path is what it would be in a folder of images
        lines = (
            f"{key}\t{identity_name(one.identity)}/{one.replicate:04d}.{layout.suffix}\t{one.label}\n"
            for key, one in zip(keys, samples, strict=True)
        )
        appends[LIST] = "".join(lines).encode()
    return Written(appends=appends)


def finish(folder: Path, layout: Layout) -> None:
    """Write the identities' records, the index of all records, and what classes and size they have."""
    lengths = np.fromfile(folder / LENGTHS, "<u4")
    if layout.variant == "header":
        ends = np.concatenate([[1], 1 + np.cumsum(layout.counts)]).tolist()
        records = [record(pack(keys, layout.images + 1 + label)) for label, keys in enumerate(pairwise(ends))]
        with (folder / RECORDS).open("ab") as file:
            file.write(b"".join(records))
        lengths = np.concatenate([lengths, _lengths(records)])
    offsets = np.cumsum(lengths, dtype=np.int64) - lengths
    with (folder / INDEX).open("w", encoding="ascii") as index:
        index.writelines(f"{key}\t{offset}\n" for key, offset in enumerate(offsets.tolist()))
    (folder / PROPERTY).write_text(f"{len(layout.identities)},{layout.height},{layout.width}\n")


def pack(label: float | Sequence[float], key: int, image: bytes = b"") -> bytes:
    """Return the payload of a record: header, further labels where there are several, and the image."""
    if isinstance(label, Sequence):
        return HEADER.pack(len(label), 0.0, key, 0) + np.array(label, "<f4").tobytes() + image
    return HEADER.pack(0, label, key, 0) + image


def record(payload: bytes) -> bytes:
    """Frame a payload. Where it holds the magic number at a multiple of 4, it is split there without it.

    Raises:
        ValueError: if a part has 2^29 bytes or more, which its length has no room for.
    """
    at = payload.find(MAGIC)
    if at < 0:
        return _framed(payload, 0)
    parts, start = [], 0
    while at >= 0:
        if at % 4 == 0:
            parts.append(payload[start:at])
            start = at + 4
        at = payload.find(MAGIC, start if at % 4 == 0 else at + 1)
    parts.append(payload[start:])
    if len(parts) == 1:
        return _framed(payload, 0)
    flags = [1, *[2] * (len(parts) - 2), 3]
    return b"".join(map(_framed, parts, flags))


def _framed(part: bytes, flag: int) -> bytes:
    """A part with its magic number, its flag, its length, and zeros up to a multiple of 4 bytes."""
    if len(part) >> FLAG_SHIFT:
        raise ValueError(f"a part of {len(part)} bytes has no room in a record: 2^29 - 1 at most")
    length = struct.pack("<I", flag << FLAG_SHIFT | len(part))
    return b"".join((MAGIC, length, part, bytes(-len(part) % 4)))


def _lengths(records: Sequence[bytes]) -> NDArray[np.uint32]:
    return np.array([len(one) for one in records], "<u4")

"""WebDataset: tar files of `<key>.png`, `<key>.cls` and `<key>.json`, read from start to end."""

import json
import math
import tarfile
from collections.abc import Sequence
from pathlib import Path

from negfacediff_core.export.layout import LABELS, Layout, Sample, Written, label_lines, sample_name

#: Bytes of decoded pixels in a shard: about 1 GB as PNG, a third of that as JPEG.
SHARD_PIXELS = 2**31
# Two empty blocks end a tar file.
_END = bytes(2 * tarfile.BLOCKSIZE)
# A header as `tarfile` makes it, without owner and time, so that the same images make the same bytes: of an
# empty file without a name. Its name, the digits of its size and those of its checksum are put in here, which
# takes a tenth of the time.
_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 135), slice(148, 154)
# The checksum is the sum of all bytes, those of its own field taken for blanks.
_SUM = sum(_HEADER) - sum(_HEADER[148:156]) + 8 * ord(" ") - sum(_HEADER[_SIZE])


def write(piece: int, samples: Sequence[Sample], layout: Layout) -> Written:
    """Make members of samples; a piece goes whole into the shard of its first image."""
    held = max(1, SHARD_PIXELS // (layout.height * layout.width * 3))
    members: list[bytes] = []
    keys = [sample_name(sample) for sample in samples]
    for key, sample in zip(keys, samples, strict=True):
        told: dict[str, float | None] = {
            "label": sample.label,
            "identity": sample.identity,
            "replicate": sample.replicate,
        }
        for name, value in zip(layout.facts, sample.facts, strict=True):
            told[name] = None if math.isnan(value) else value
        for ending, data in (
            (layout.suffix, sample.image),
            ("cls", str(sample.label).encode()),
            ("json", json.dumps(told, allow_nan=False).encode()),
        ):
            members += member(f"{key}.{ending}", data)
    shard = f"shard-{samples[0].number // held:06d}.tar"
    return Written(
        appends={shard: b"".join(members), LABELS: label_lines("key", keys, samples, layout)},
    )


def finish(folder: Path, layout: Layout) -> None:
    """End every tar file."""
    for path in folder.glob("shard-*.tar"):
        with path.open("ab") as file:
            file.write(_END)


def member(name: str, data: bytes) -> tuple[bytes, bytes, bytes]:
    """Return header, content and filling of a file in a tar file; `name` is ASCII, 100 letters at most."""
    named, size = name.encode("ascii"), b"%011o" % len(data)
    header = bytearray(_HEADER)
    header[_NAME] = named.ljust(100, b"\0")
    header[_SIZE] = size
    header[_CHECKSUM] = b"%06o" % (_SUM + sum(named) + sum(size))
    return bytes(header), data, bytes(-len(data) % tarfile.BLOCKSIZE)

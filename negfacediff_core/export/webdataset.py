"""WebDataset: tar files of `<key>.png`, `<key>.cls` and `<key>.json`, read from start to end."""

import io
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


def write(piece: int, samples: Sequence[Sample], layout: Layout) -> Written:
    """Make members of samples; a piece goes whole into the shard of its first image."""
    held = max(1, SHARD_PIXELS // (layout.height * layout.width * 3))
    content = io.BytesIO()
    keys = [sample_name(sample) for sample in samples]
    for key, sample in zip(keys, samples, strict=True):
        facts = {name: None if math.isnan(value) else value for name, value in sample.facts.items()}
        told = {
            "label": sample.label,
            "identity": sample.identity,
            "replicate": sample.replicate,
            **facts,
        }
        for ending, data in (
            (layout.suffix, sample.image),
            ("cls", str(sample.label).encode()),
            ("json", json.dumps(told, allow_nan=False).encode()),
        ):
            content.write(_member(f"{key}.{ending}", data))
    shard = f"shard-{samples[0].number // held:06d}.tar"
    return Written(appends={shard: content.getvalue(), LABELS: label_lines("key", keys, samples, layout)})


def finish(folder: Path, layout: Layout) -> None:
    """End every tar file."""
    for path in folder.glob("shard-*.tar"):
        with path.open("ab") as file:
            file.write(_END)


def _member(name: str, data: bytes) -> bytes:
    """Return a file of a tar file, without owner and time: the same images make the same bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)

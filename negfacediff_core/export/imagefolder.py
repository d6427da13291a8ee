"""A folder of images an identity, as torchvision's ImageFolder and its many relatives read it."""

from collections.abc import Sequence
from pathlib import Path

from negfacediff_core.export.layout import LABELS, Layout, Sample, Written, identity_name, label_lines

# Lines `path label`, as FaceX-Zoo and others read them; paths are below the folder of images.
LIST = "list.txt"
# Beside the images nothing may lie: readers take every folder for an identity.
FOLDER = "images"


def write(piece: int, samples: Sequence[Sample], layout: Layout) -> Written:
    """Make files of samples: `images/<identity>/<image>.<suffix>`."""
    paths = [f"{identity_name(one.identity)}/{one.replicate:04d}.{layout.suffix}" for one in samples]
    listed = "".join(f"{path} {one.label}\n" for path, one in zip(paths, samples, strict=True))
    return Written(
        files={f"{FOLDER}/{path}": one.image for path, one in zip(paths, samples, strict=True)},
        appends={
            LABELS: label_lines("path", [f"{FOLDER}/{path}" for path in paths], samples, layout),
            LIST: listed.encode(),
        },
    )


def finish(folder: Path, layout: Layout) -> None:
    """Nothing is left to do: a folder of images has no index."""

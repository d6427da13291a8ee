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
    names = [f"{identity_name(one.identity)}/{one.replicate:04d}.{layout.suffix}" for one in samples]
    paths = [f"{FOLDER}/{name}" for name in names]
    listed = [f"{name} {one.label}\n" for name, one in zip(names, samples, strict=True)]
    return Written(
        files={path: one.image for path, one in zip(paths, samples, strict=True)},
        appends={LABELS: label_lines("path", paths, samples, layout), LIST: "".join(listed).encode()},
    )


def finish(folder: Path, layout: Layout) -> None:
    """Nothing is left to do: a folder of images has no index."""

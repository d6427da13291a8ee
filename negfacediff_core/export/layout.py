"""What all formats of an export have in common: names, samples, and what is known before the first image."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# One row an image, in every format.
LABELS = "labels.csv"


@dataclass(frozen=True)
class Layout:
    """What is known of an export before its first image.

    `identities` `(N,)` int64 are the numbers in the store of the identities with the labels 0 .. N-1, in
    ascending order, and `counts` `(N,)` how many images each has. Images are `height` x `width` pixels in
    files that end in `suffix`. `facts` names what is told of each image besides who it shows. `variant` is
    that of RecordIO. The images are written in `pieces`, each of whole identities.
    """

    identities: NDArray[np.int64]
    counts: NDArray[np.int64]
    height: int
    width: int
    suffix: str
    facts: tuple[str, ...] = ()
    variant: str = "header"
    pieces: int = 1

    @property
    def images(self) -> int:
        """Number of images."""
        return int(self.counts.sum())


class Sample(NamedTuple):
    """An image: its `number` among all, from 0, who it shows, where it is in the store, and its bytes.

    `facts` are in the order of the layout's, NaN where one is not known.
    """

    number: int
    label: int
    identity: int
    replicate: int
    image: bytes
    facts: tuple[float, ...]


@dataclass(frozen=True)
class Written:
    """What a piece becomes: whole `files` by path, and what is put at the end of others (`appends`)."""

    files: dict[str, bytes] = field(default_factory=dict)
    appends: dict[str, bytes] = field(default_factory=dict)


def identity_name(identity: int) -> str:
    """Name an identity so that the order of names is that of numbers, whatever the size of the set."""
    return f"{identity:07d}"


def sample_name(sample: Sample) -> str:
    """Name an image by who it shows and which of theirs it is."""
    return f"{identity_name(sample.identity)}_{sample.replicate:04d}"


def label_lines(key: str, keys: Sequence[str], samples: Sequence[Sample], layout: Layout) -> bytes:
    """Return the lines of `labels.csv` for samples, behind the header where they are the first ones.

    `key` is the name of the first column, which tells where the format keeps the image, and `keys` hold it.
    """
    head = ",".join([key, "label", "identity", "replicate", *layout.facts])
    lines = [head] if samples[0].number == 0 else []
    for place, (_, label, identity, replicate, _, facts) in zip(keys, samples, strict=True):
        cells = "".join(["," if isnan(value) else f",{value:.6g}" for value in facts])
        lines.append(f"{place},{label},{identity},{replicate}{cells}")
    lines.append("")
    return "\n".join(lines).encode()

"""The table of formats: how a piece of samples becomes bytes, and what is written when all are there."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from negfacediff_core.export import huggingface, imagefolder, recordio, webdataset
from negfacediff_core.export.layout import Layout, Sample, Written


class Format(NamedTuple):
    """A row of the table.

    `write` makes bytes of the samples of a piece by its number; the pieces come in order, and what they
    append is put together in that order. `finish` writes into the folder what needs all of them.
    `piece` is how many images a piece has at least. `check` refuses what the format cannot hold.
    """

    write: Callable[[int, Sequence[Sample], Layout], Written]
    finish: Callable[[Path, Layout], None]
    piece: int
    check: Callable[[Layout], None] = lambda layout: None


FORMATS: dict[str, Format] = {
    "imagefolder": Format(imagefolder.write, imagefolder.finish, piece=256),
    "rec": Format(recordio.write, recordio.finish, piece=256, check=recordio.check),
    "webdataset": Format(webdataset.write, webdataset.finish, piece=256),
    # a piece is a file
    "huggingface": Format(huggingface.write, huggingface.finish, piece=4096),
}

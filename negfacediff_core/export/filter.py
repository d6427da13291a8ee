"""Filters: files that list the images to take, which pruning writes, and exports and trainings read.

A CSV with the columns `image` (its name in the set that was pruned), `identity` and `replicate` (its numbers
in the store) and `samples` (the fingerprint of the stage that made it there); the last three are empty where
the set comes from no store.
"""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv as tables

from negfacediff_core.errors import ConfigError

COLUMNS = ("image", "identity", "replicate", "samples")


class Filter(NamedTuple):
    """The images to take: `names` `(N,)`, and `numbers` `(N, 2)` in the store, None if unknown.

    `samples` is the fingerprint of the stage that made them; empty if it is unknown.
    """

    names: list[str]
    numbers: NDArray[np.int64] | None
    samples: str


def filter_text(images: Iterable[tuple[str, int | None, int | None]], samples: str = "") -> str:
    """Return the content of a filter that takes these images: name, identity, replicate.

    `samples` is the fingerprint of the stage that made them, where it is known.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for name, identity, replicate in images:
        numbers = ("" if number is None else number for number in (identity, replicate))
        table.writerow((name, *numbers, samples))
    return text.getvalue()


def read_filter(path: Path) -> Filter:
    """Read a filter; ConfigError if it cannot be read, is none, takes no image, or those of several runs."""
    types = {"image": pa.string(), "identity": pa.int64(), "replicate": pa.int64(), "samples": pa.string()}
    try:
        table = tables.read_csv(path, convert_options=tables.ConvertOptions(column_types=types))
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"The filter {path} cannot be read ({reason}): give a file that negfacediff prune has written."
        ) from error
    # filters of earlier versions do not say where their images come from
    if tuple(table.column_names) not in (COLUMNS, COLUMNS[:-1]):
        raise ConfigError(f"{path} is no filter: its first line is not {','.join(COLUMNS)}.")
    if not len(table):
        raise ConfigError(f"The filter {path} takes no image.")
    columns = [table.column(name) for name in ("identity", "replicate")]
    known = not any(column.null_count for column in columns)
    numbers = np.stack([column.to_numpy() for column in columns], axis=1) if known else None
    sources = table.column("samples").unique().to_pylist() if "samples" in table.column_names else [""]
    if len(sources) > 1:
        raise ConfigError(f"The filter {path} takes images of several runs: {', '.join(map(str, sources))}.")
    return Filter(table.column("image").to_pylist(), numbers, sources[0] or "")


def check_source(path: Path, filter_: Filter, samples: str) -> None:
    """Check that a filter's images come from the stage with this fingerprint.

    Where one of the two is unknown, nothing is checked. Raises ConfigError.
    """
    if filter_.samples and samples and filter_.samples != samples:
        raise ConfigError(
            f"The filter {path} is of the images of samples/{filter_.samples}, not of samples/{samples}: the "
            "same numbers are other images there. Prune a training on these."
        )


def taken(path: Path, usable: NDArray[np.bool_], samples: str) -> NDArray[np.bool_]:
    """Leave of the `usable` images `(I, R)` of a run those that a filter takes.

    `samples` is the fingerprint of the stage that made them. Raises ConfigError if the filter is of other
    images, or of ones whose numbers are not known, or that the run has not.
    """
    found = read_filter(path)
    check_source(path, found, samples)
    if found.numbers is None:
        raise ConfigError(
            f"The filter {path} is of images that come from no store: train with it, on the set that it "
            "is of."
        )
    outside = (found.numbers < 0) | (found.numbers >= usable.shape)
    if outside.any():
        identity, replicate = found.numbers[outside.any(axis=1)][0]
        raise ConfigError(
            f"The filter {path} takes image {replicate} of identity {identity}, and the run has "
            f"{usable.shape[0]:,} identities with {usable.shape[1]:,} images: it is of another run."
        )
    wanted = np.zeros_like(usable)
    wanted[found.numbers[:, 0], found.numbers[:, 1]] = True
    return usable & wanted

"""Filters: files that list the images to take, which pruning writes, and exports and trainings read.

A CSV with the columns `image` (its name in the set that was pruned), `identity` and `replicate` (its numbers
in the store; empty where the set comes from none).
"""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import ConfigError

COLUMNS = ("image", "identity", "replicate")


class Filter(NamedTuple):
    """The images to take: `names` `(N,)`, and `numbers` `(N, 2)` in the store, None if unknown."""

    names: list[str]
    numbers: NDArray[np.int64] | None


def filter_text(images: Iterable[tuple[str, int | None, int | None]]) -> str:
    """Return the content of a filter that takes these images: name, identity, replicate."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for name, identity, replicate in images:
        table.writerow((name, "" if identity is None else identity, "" if replicate is None else replicate))
    return text.getvalue()


def read_filter(path: Path) -> Filter:
    """Read a filter; ConfigError if it cannot be read, is none, or takes no image."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            if tuple(table.fieldnames or ()) != COLUMNS:
                raise ConfigError(f"{path} is no filter: its first line is not {','.join(COLUMNS)}.")
            rows = list(table)
        known = [bool(row["identity"]) and bool(row["replicate"]) for row in rows]
        numbers = [(int(row["identity"]), int(row["replicate"])) for row in rows] if all(known) else None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"The filter {path} cannot be read ({error}): give a file that negfacediff prune has written."
        ) from error
    if not rows:
        raise ConfigError(f"The filter {path} takes no image.")
    return Filter([row["image"] for row in rows], None if numbers is None else np.array(numbers, np.int64))


def taken(path: Path, usable: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Leave of the `usable` images `(I, R)` of a run those that a filter takes.

    Raises ConfigError if the filter is of images whose numbers are not known, or that the run has not.
    """
    numbers = read_filter(path).numbers
    if numbers is None:
        raise ConfigError(
            f"The filter {path} is of images that come from no store: train with it, on the set that it "
            "is of."
        )
    outside = (numbers < 0) | (numbers >= usable.shape)
    if outside.any():
        identity, replicate = numbers[outside.any(axis=1)][0]
        raise ConfigError(
            f"The filter {path} takes image {replicate} of identity {identity}, and the run has "
            f"{usable.shape[0]:,} identities with {usable.shape[1]:,} images: it is of another run."
        )
    wanted = np.zeros_like(usable)
    wanted[numbers[:, 0], numbers[:, 1]] = True
    return usable & wanted

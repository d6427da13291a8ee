"""Training dynamics: how probable each image's identity was in each epoch, and which images follow to keep.

A training's folder `dynamics` holds `images.csv`, a row an image, `held_out.csv` likewise, and with
`log_probability` `(N,)` float32 and `outcome` `(N,)` uint8 of the images: `epoch-0001.npz` ... as each was
trained on, varied and with dropout; `final.npz` as the trained network sees all of them, unchanged.
"""

import csv
import io
import math
import zipfile
import zlib
from bisect import bisect_left
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import ConfigError, DamagedError
from negfacediff_core.recognition.datasets import TrainingSet
from negfacediff_core.tensor_files import replacing

FOLDER, IMAGES, HELD_OUT, FINAL = "dynamics", "images.csv", "held_out.csv", "final.npz"
#: Name of an image, and identity and replicate in the store if they are known.
Named = tuple[str, int | None, int | None]
#: Outcomes: the image was not in the epoch; another identity was more probable than its own; none was.
UNSEEN, WRONG, RIGHT = 0, 1, 2
#: DynUnc's window of epochs, and what is kept of each identity at least (arXiv 2505.15272, published code).
WINDOW, LEAST = 10, 5
# DiffProb asks for a difference, and for ever less of it: in so many steps down to nothing.
_LOWERED = 100


class Dynamics(NamedTuple):
    """Of `images` with `labels` `(N,)`, epoch by epoch:

    `probability` `(E, N)` in [0, 1], NaN where an image was not in an epoch, and `outcome` `(E, N)`.
    """

    images: list[Named]
    labels: NDArray[np.int64]
    probability: NDArray[np.float64]
    outcome: NDArray[np.uint8]


class Final(NamedTuple):
    """What the trained network makes of all images: `probability` `(N,)` in [0, 1], and whether it takes
    them for another identity, `mislabelled` `(N,)`.
    """

    probability: NDArray[np.float64]
    mislabelled: NDArray[np.bool_]


def write_images(folder: Path, file: str, crops: TrainingSet) -> None:
    """Write IMAGES or HELD_OUT: the name of every image, its label, and its numbers in the store if known."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("image", "label", "identity", "replicate"))
    numbers = [("", "")] * len(crops) if crops.numbers is None else crops.numbers.tolist()
    for name, label, (identity, replicate) in zip(crops.names, crops.labels.tolist(), numbers, strict=True):
        table.writerow((name, label, identity, replicate))
    with replacing(folder / FOLDER / file) as written:
        written.write(text.getvalue().encode())


def read_images(folder: Path, file: str) -> tuple[list[Named], NDArray[np.int64]]:
    """Read what `write_images` wrote: images, and labels `(N,)`. Raises DamagedError."""
    path = folder / FOLDER / file
    try:
        with path.open(newline="", encoding="utf-8") as written:
            rows = list(csv.DictReader(written))
        if not rows:
            raise ValueError("it names no image")
        images = [(row["image"], _number(row["identity"]), _number(row["replicate"])) for row in rows]
        return images, np.array([int(row["label"]) for row in rows], np.int64)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise _damaged(path) from error


def write_epoch(
    folder: Path, epoch: int, log_probability: NDArray[np.float32], outcome: NDArray[np.uint8]
) -> None:
    """Write the dynamics of an epoch, counted from 1."""
    _write(folder / FOLDER / f"epoch-{epoch:04d}.npz", log_probability, outcome)


def write_final(folder: Path, log_probability: NDArray[np.float32], outcome: NDArray[np.uint8]) -> None:
    """Write what the trained network makes of all images."""
    _write(folder / FOLDER / FINAL, log_probability, outcome)


def has_final(folder: Path) -> bool:
    """Tell whether a training's folder has what `write_final` writes, the last thing of a training."""
    return (folder / FOLDER / FINAL).exists()


def read_final(folder: Path) -> Final | None:
    """Read what `write_final` wrote; None if there is none. Raises DamagedError."""
    if not has_final(folder):
        return None
    log_probability, outcome = _read(folder / FOLDER / FINAL)
    return Final(np.exp(log_probability), outcome == WRONG)


def read_dynamics(folder: Path) -> Dynamics:
    """Read the dynamics of a training's epochs; ConfigError if there are none, DamagedError if unreadable."""
    paths = sorted((folder / FOLDER).glob("epoch-*.npz"))
    if not paths or not (folder / FOLDER / IMAGES).exists():
        raise ConfigError(
            f"{folder} holds no training dynamics: give the folder of a training that has finished an epoch."
        )
    images, labels = read_images(folder, IMAGES)
    log_probabilities, outcomes = zip(*map(_read, paths), strict=True)
    for path, found in zip(paths, outcomes, strict=True):
        if found.shape != labels.shape:
            raise _damaged(path)
    outcome, probability = np.stack(outcomes), np.exp(np.stack(log_probabilities))
    return Dynamics(images, labels, np.where(outcome == UNSEEN, np.nan, probability), outcome)


def dynamic_uncertainty(probability: NDArray[np.float64], window: int = WINDOW) -> NDArray[np.float64]:
    """DynUnc (arXiv 2306.05175): the deviation of p(y) within a window of epochs, averaged over windows.

    Of `(E, N)` probabilities, NaN where unseen; deviations are those of a sample (n - 1). NaN for an image
    that no window saw twice. Raises ConfigError if there are fewer epochs than two.
    """
    epochs = len(probability)
    if epochs < 2:
        raise ConfigError(f"Dynamic uncertainty takes two epochs at least, and {epochs} was recorded.")
    window = min(window, epochs)
    total, count = np.zeros(probability.shape[1]), np.zeros(probability.shape[1])
    for start in range(epochs - window + 1):
        part = probability[start : start + window]
        seen = np.isfinite(part)
        number = seen.sum(axis=0)
        enough = number >= 2
        mean = np.where(seen, part, 0).sum(axis=0) / np.maximum(number, 1)
        square = (np.where(seen, part - mean, 0) ** 2).sum(axis=0)
        total[enough] += np.sqrt(square[enough] / (number[enough] - 1))
        count += enough
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def most_uncertain(
    scores: NDArray[np.float64], labels: NDArray[np.int64], share: float, least: int = LEAST
) -> NDArray[np.bool_]:
    """Keep of each identity a `share` of its images, at least `least`: those of the highest scores `(N,)`.

    A share is rounded down. What has no score (NaN) is kept besides.
    """
    kept = ~np.isfinite(scores)
    for rows in _by_identity(scores, labels):
        # as 0.29 x 100 is just below 29
        number = math.floor(round(share * len(rows), 6))
        kept[rows[: max(number, least)]] = True
    return kept


def spread_probabilities(
    probability: NDArray[np.float64], labels: NDArray[np.int64], apart: float, least: int = LEAST
) -> NDArray[np.bool_]:
    """DiffProb (arXiv 2505.15272): of each identity keep images whose probabilities differ.

    From the most probable image down, one is kept if its p(y) lies more than `apart` below that of the last
    one kept. Where fewer than `least` are kept, 99, 98, ... 1% of `apart` are asked for until there are
    enough; an identity that has no more images, or that even the last of these leaves too few of, keeps all.
    Images of unknown probability (NaN) are kept. `probability` and `labels` are `(N,)`; raises ConfigError
    unless `apart` is in (0, 1).
    """
    if not 0 < apart < 1:
        raise ConfigError(f"DiffProb's threshold is {apart}: give a difference of probabilities, in (0, 1).")
    kept = ~np.isfinite(probability)
    for rows in _by_identity(probability, labels):
        kept[rows[_apart(probability[rows], apart, least)]] = True
    return kept


def _by_identity(values: NDArray[np.float64], labels: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Rows of each identity, the highest value first; without those of value NaN."""
    order = np.lexsort((-values, labels))
    order = order[np.isfinite(values[order])]
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _apart(falling: NDArray[np.float64], apart: float, least: int) -> NDArray[np.int64]:
    """Places of the values kept of one identity, whose `(K,)` probabilities fall."""
    everything = np.arange(len(falling))
    if len(falling) <= least:
        return everything
    # the smaller the difference asked for, the more are kept: the first that suffices is found by halving
    asked = [apart * (1 - 0.01 * step) for step in range(_LOWERED)]
    step = bisect_left(asked, True, key=lambda least_apart: len(_greedy(falling, least_apart)) >= least)
    return everything if step == _LOWERED else _greedy(falling, asked[step])


def _greedy(falling: NDArray[np.float64], apart: float) -> NDArray[np.int64]:
    """From the first value down, the places of those that lie more than `apart` below the last one taken."""
    places = [0]
    for place in range(1, len(falling)):
        if falling[places[-1]] - falling[place] > apart:
            places.append(place)
    return np.array(places)


def _number(text: str) -> int | None:
    return int(text) if text else None


def _read(path: Path) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """Log-probability and outcome `(N,)` of a file; DamagedError."""
    try:
        with np.load(path) as found:
            return found["log_probability"].astype(np.float64), found["outcome"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> DamagedError:
    return DamagedError(f"{path} is missing or damaged: train again in another folder.")


def _write(path: Path, log_probability: NDArray[np.float32], outcome: NDArray[np.uint8]) -> None:
    with replacing(path) as file:
        np.savez_compressed(file, log_probability=log_probability, outcome=outcome)

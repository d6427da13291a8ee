"""Training dynamics: how probable each image's identity was in each epoch, and which images follow to keep.

A training's folder `dynamics` holds `images.csv`, a row an image, `held_out.csv` likewise, and
`epoch-0001.npz` ... with `log_probability` `(N,)` float32 and `outcome` `(N,)` uint8 of the images.
"""

import csv
import io
from bisect import bisect_left
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import ConfigError
from negfacediff_core.recognition.datasets import TrainingSet
from negfacediff_core.tensor_files import replacing

FOLDER, IMAGES, HELD_OUT = "dynamics", "images.csv", "held_out.csv"
#: Name of an image, and identity and replicate in the store if they are known.
Named = tuple[str, int | None, int | None]
#: Outcomes: the image was not in the epoch; another identity was more probable than its own; none was.
UNSEEN, WRONG, RIGHT = 0, 1, 2
#: DynUnc's window of epochs, and what DiffProb keeps of each identity at least (METHODS of the papers).
WINDOW, LEAST = 10, 5
# How often DiffProb's difference is lowered by 1%: to less than float32 tells apart.
_LOWERED = 2500


class Dynamics(NamedTuple):
    """Of `images` with `labels` `(N,)`, epoch by epoch:

    `probability` `(E, N)` in [0, 1], NaN where an image was not in an epoch, and `outcome` `(E, N)`.
    """

    images: list[Named]
    labels: NDArray[np.int64]
    probability: NDArray[np.float64]
    outcome: NDArray[np.uint8]


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
    """Read what `write_images` wrote: images, and labels `(N,)`."""
    with (folder / FOLDER / file).open(newline="", encoding="utf-8") as written:
        rows = list(csv.DictReader(written))
    images = [(row["image"], _number(row["identity"]), _number(row["replicate"])) for row in rows]
    return images, np.array([int(row["label"]) for row in rows], np.int64)


def write_epoch(
    folder: Path, epoch: int, log_probability: NDArray[np.float32], outcome: NDArray[np.uint8]
) -> None:
    """Write the dynamics of an epoch, counted from 1."""
    with replacing(folder / FOLDER / f"epoch-{epoch:04d}.npz") as file:
        np.savez_compressed(file, log_probability=log_probability, outcome=outcome)


def read_dynamics(folder: Path) -> Dynamics:
    """Read the dynamics of a training's folder; ConfigError if there are none."""
    paths = sorted((folder / FOLDER).glob("epoch-*.npz"))
    if not paths or not (folder / FOLDER / IMAGES).exists():
        raise ConfigError(
            f"{folder} holds no training dynamics: give the folder of a training that has finished an epoch."
        )
    images, labels = read_images(folder, IMAGES)
    epochs = [np.load(path) for path in paths]
    outcome = np.stack([epoch["outcome"] for epoch in epochs])
    probability = np.exp(np.stack([epoch["log_probability"] for epoch in epochs]).astype(np.float64))
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


def most_uncertain(scores: NDArray[np.float64], share: float) -> NDArray[np.bool_]:
    """Keep a `share` of the images, those of the highest scores `(N,)`; what has no score is kept besides."""
    known = np.flatnonzero(np.isfinite(scores))
    ranked = known[np.argsort(-scores[known], kind="stable")]
    kept = ~np.isfinite(scores)
    kept[ranked[: round(share * len(known))]] = True
    return kept


def spread_probabilities(
    probability: NDArray[np.float64], labels: NDArray[np.int64], apart: float, least: int = LEAST
) -> NDArray[np.bool_]:
    """DiffProb (arXiv 2505.15272): of each identity keep images whose probabilities differ.

    From the most probable image down, one is kept if its p(y) lies more than `apart` below that of the last
    one kept. Where fewer than `least` are kept, `apart` is lowered by 1% of itself until there are enough; an
    identity with no more images keeps all, and one whose images are equally probable the first. Images of
    unknown probability (NaN) are kept. `probability` and `labels` are `(N,)`; raises ConfigError unless
    `apart` is in (0, 1).
    """
    if not 0 < apart < 1:
        raise ConfigError(f"DiffProb's threshold is {apart}: give a difference of probabilities, in (0, 1).")
    kept = ~np.isfinite(probability)
    order = np.lexsort((-probability, labels))
    order = order[np.isfinite(probability[order])]
    for rows in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        kept[rows[_apart(probability[rows], apart, least)]] = True
    return kept


def _apart(falling: NDArray[np.float64], apart: float, least: int) -> NDArray[np.int64]:
    """Places of the values kept of one identity, whose `(K,)` probabilities fall."""
    if len(falling) <= least:
        return np.arange(len(falling))
    # the smaller the difference asked for, the more are kept: the first that suffices is found by halving
    times = bisect_left(
        range(_LOWERED), True, key=lambda number: len(_greedy(falling, apart * 0.99**number)) >= least
    )
    kept = _greedy(falling, apart * 0.99**times)
    return kept if len(kept) >= least else np.arange(least)


def _greedy(falling: NDArray[np.float64], apart: float) -> NDArray[np.int64]:
    """From the first value down, the places of those that lie more than `apart` below the last one taken."""
    places = [0]
    for place in range(1, len(falling)):
        if falling[places[-1]] - falling[place] > apart:
            places.append(place)
    return np.array(places)


def last_seen(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of `(E, N)` values, NaN where unseen, the last one of each image; NaN where there is none."""
    seen = np.isfinite(values)
    last = len(values) - 1 - np.argmax(seen[::-1], axis=0)
    return values[last, np.arange(values.shape[1])]


def mislabelled(outcome: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which images `(N,)` looked like another identity, without any margin, when last seen in `(E, N)`."""
    seen = outcome != UNSEEN
    last = len(outcome) - 1 - np.argmax(seen[::-1], axis=0)
    return seen.any(axis=0) & (outcome[last, np.arange(outcome.shape[1])] == WRONG)


def _number(text: str) -> int | None:
    return int(text) if text else None

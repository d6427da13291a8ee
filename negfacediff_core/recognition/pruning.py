"""Which images a training's dynamics speak for, as a filter."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from negfacediff_core.export.filter import filter_text
from negfacediff_core.recognition.dynamics import (
    HELD_OUT,
    dynamic_uncertainty,
    last_seen,
    mislabelled,
    most_uncertain,
    read_dynamics,
    read_images,
    spread_probabilities,
)


class Pruned(NamedTuple):
    """The `text` of a filter, and counts: `images` kept of those `trained` on, those left out as
    `mislabelled`, and those `held_out`, which are kept.
    """

    text: str
    images: int
    trained: int
    mislabelled: int
    held_out: int


def prune_training(folder: Path, rule: str, share: float, apart: float, clean: bool) -> Pruned:
    """Choose images of a training by a rule: dynunc with `share`, diffprob with `apart`, or none.

    diffprob looks at the last probability of each image. With `clean`, images that looked like another
    identity in the end are left out besides, before the rule looks at the rest. Raises ConfigError if the
    folder holds no dynamics.
    """
    dynamics = read_dynamics(folder)
    wrong = mislabelled(dynamics.outcome) if clean else np.zeros(len(dynamics.labels), bool)
    rest = np.flatnonzero(~wrong)
    probability = dynamics.probability[:, rest]
    if rule == "dynunc":
        chosen = most_uncertain(dynamic_uncertainty(probability), share)
    elif rule == "diffprob":
        chosen = spread_probabilities(last_seen(probability), dynamics.labels[rest], apart)
    else:
        chosen = np.ones(len(rest), bool)
    kept = rest[chosen]
    held_out = read_images(folder, HELD_OUT)[0]
    images = [dynamics.images[image] for image in kept] + held_out
    return Pruned(filter_text(images), len(kept), len(dynamics.labels), int(wrong.sum()), len(held_out))

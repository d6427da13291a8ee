"""Which images a training's dynamics speak for, as a filter."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from negfacediff_core.errors import ConfigError, StoreError
from negfacediff_core.export.filter import filter_text
from negfacediff_core.recognition.dynamics import (
    FINAL,
    FOLDER,
    HELD_OUT,
    dynamic_uncertainty,
    most_uncertain,
    read_dynamics,
    read_final,
    read_images,
    spread_probabilities,
)
from negfacediff_core.recognition.training_job import DESCRIPTION


class Pruned(NamedTuple):
    """The `text` of a filter, and counts of what was trained on.

    `images` are kept of those `trained`, which show `identities`, of whom `lost` have no image left.
    `mislabelled` of the images look like another identity, None where the training is not over: after
    `epochs` of those `planned`. The `held_out` images are kept as well.
    """

    text: str
    images: int
    trained: int
    identities: int
    lost: int
    mislabelled: int | None
    epochs: int
    planned: int
    held_out: int


def prune_training(folder: Path, rule: str, share: float, apart: float, clean: bool) -> Pruned:
    """Choose images of a training by a rule: dynunc with `share`, diffprob with `apart`, or none.

    dynunc looks at the epochs, diffprob at what the trained network makes of every image. With `clean`,
    images that it takes for another identity are left out besides, before the rule looks at the rest. Raises
    ConfigError if the folder does not hold what that takes, or if nothing is asked for.
    """
    if rule == "none" and not clean:
        raise ConfigError("The rule none without --clean keeps every image: add --clean, or take a rule.")
    dynamics, final = read_dynamics(folder), read_final(folder)
    epochs, (planned, samples) = len(dynamics.probability), _described(folder)
    if final is None and (clean or rule == "diffprob"):
        raise ConfigError(
            f"{folder / FOLDER} has no {FINAL} after {epochs} of {planned} epochs: a training that has ended "
            "writes there what its network makes of every image. Go on with the training; for one that an "
            "earlier version has finished, take the rule dynunc without --clean, or train again elsewhere."
        )
    wrong = final.mislabelled if final is not None and clean else np.zeros(len(dynamics.labels), bool)
    rest = np.flatnonzero(~wrong)
    labels = dynamics.labels[rest]
    if rule == "dynunc":
        chosen = most_uncertain(dynamic_uncertainty(dynamics.probability[:, rest]), labels, share)
    elif rule == "diffprob":
        assert final is not None  # refused above
        chosen = spread_probabilities(final.probability[rest], labels, apart)
    else:
        chosen = np.ones(len(rest), bool)
    kept = rest[chosen]
    held_out = read_images(folder, HELD_OUT)[0]
    images = [dynamics.images[image] for image in kept] + held_out
    identities = len(np.unique(dynamics.labels))
    return Pruned(
        filter_text(images, samples),
        len(kept),
        len(dynamics.labels),
        identities,
        identities - len(np.unique(labels[chosen])),
        None if final is None else int(final.mislabelled.sum()),
        epochs,
        planned,
        len(held_out),
    )


def _described(folder: Path) -> tuple[int, str]:
    """Epochs that a training is to take at most, and the stage that made its images, if it is known."""
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_bytes())
        return int(description["recipe"]["epochs"]), str(description.get("origin", {}).get("samples", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is damaged: run the command that began the training again.") from error

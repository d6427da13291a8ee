"""Small folders of crops that a small network can learn, and trainings of it that take a second."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from negfacediff_core.recognition.recipe import RecogniserConfig, TrainingExecution
from negfacediff_core.recognition.set_openers import open_set
from negfacediff_core.recognition.training_job import TrainingJob, plan_training

#: An iResNet of some thousand weights.
TINY = {
    "family": "iresnet",
    "layers": [1, 1],
    "channels": [8, 16],
    "width": 16,
    "stem_stride": 2,
    "input_pool": 4,
    "dropout": 0.2,
}
RECIPE = RecogniserConfig(
    backbone="small",
    width=16,
    scale=16.0,
    margin=0.2,
    epochs=2,
    batch_size=8,
    learning_rate=3.0,
    schedule="cosine",
    operations=1,
    magnitude=4,
    erase=0.2,
    precision="fp32",
    held_out=0.25,
)
EXECUTION = TrainingExecution(device="cpu", loaders=2, threads=1)


def crops(identities: int, images: int) -> NDArray[np.uint8]:
    """Each identity has a colour pattern in the upper half; the lower half changes with every image."""
    random = np.random.default_rng(0)
    patterns = random.uniform(40, 215, (identities, images, 7, 7, 3))
    patterns[:, :, :4] = patterns[:, :1, :4]
    pixels = patterns.repeat(16, 2).repeat(16, 3) + random.normal(0, 12, (identities, images, 112, 112, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def save_crops(folder: Path, identities: int = 12, images: int = 4) -> Path:
    """Write them as PNG, a sub-folder an identity."""
    for identity, group in enumerate(crops(identities, images)):
        (folder / f"{identity:04d}").mkdir(parents=True)
        for number, image in enumerate(group):
            Image.fromarray(image).save(folder / f"{identity:04d}" / f"{number}.png", compress_level=1)
    return folder


def tiny_job(source: Path, folder: Path, execution: TrainingExecution = EXECUTION, **recipe) -> TrainingJob:
    """A training of the tiny network on a folder of crops; fields of the recipe can be others."""
    asked = RECIPE.model_copy(update=recipe)
    found = open_set(source, folder, lambda done, total: None)
    return replace(plan_training(found, asked, execution, folder), architecture=TINY)


def nobody(done: int, total: int) -> None:
    """Whom nobody tells of progress."""

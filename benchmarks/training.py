"""Training a recogniser: reading and varying crops, and a small network that must not wait for them.

    OMP_NUM_THREADS=1 python benchmarks/training.py             # processor time, whatever else runs
    OMP_NUM_THREADS=1 python benchmarks/training.py --clock     # by the clock too: on an idle machine

The plain form is the loop that most trainings begin as: a Dataset that opens one image with Pillow, varies it
with Pillow's operations (mirror, RandAugment of the paper, erasing), and a DataLoader in the same process. By
the clock it stands against an epoch of `fit`, as `negfacediff train-recogniser` runs it.
"""

import argparse
import csv
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import best_seconds, machine, write_results
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from negfacediff_core.recognition.classifier import MarginHead, Recogniser
from negfacediff_core.recognition.datasets import TrainingSet
from negfacediff_core.recognition.fit import fit
from negfacediff_core.recognition.loader import Loader, epoch_order
from negfacediff_core.recognition.randaugment import Variation
from negfacediff_core.recognition.recipe import RecogniserConfig, TrainingExecution
from negfacediff_core.recognition.set_openers import open_set
from negfacediff_core.recognition.training_job import plan_training, starting_network

IDENTITIES, IMAGES, BATCH, EPOCHS = 32, 16, 64, 3
TARGET_WAITED = 0.10
VARIATION = Variation(flip=0.5, operations=4, magnitude=16, erase=0.5, seed=0)
STRENGTH, SIDE = 16 / 30, 112
SHEAR, SHIFT, MORE = 0.3 * STRENGTH, int(150 / 331 * SIDE * STRENGTH), 0.9 * STRENGTH


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


# RandAugment with Pillow, at the same strength; `s` is the sign.
PILLOW = (
    lambda image, s: image,
    lambda image, s: _affine(image, 1, s * SHEAR, 0, 0, 1, 0),
    lambda image, s: _affine(image, 1, 0, 0, s * SHEAR, 1, 0),
    lambda image, s: _affine(image, 1, 0, s * SHIFT, 0, 1, 0),
    lambda image, s: _affine(image, 1, 0, 0, 0, 1, s * SHIFT),
    lambda image, s: image.rotate(s * 16),
    lambda image, s: ImageEnhance.Brightness(image).enhance(1 + s * MORE),
    lambda image, s: ImageEnhance.Color(image).enhance(1 + s * MORE),
    lambda image, s: ImageEnhance.Contrast(image).enhance(1 + s * MORE),
    lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + s * MORE),
    lambda image, s: ImageOps.posterize(image, 6),
    lambda image, s: ImageOps.solarize(image, 119),
    lambda image, s: ImageOps.autocontrast(image),
    lambda image, s: ImageOps.equalize(image),
)


class PlainFolder(Dataset):
    """One image at a time, as uint8 `(3, 112, 112)`, and its label."""

    def __init__(self, folder: Path):
        self.paths = sorted(folder.glob("*/*.*"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.open(self.paths[index]).convert("RGB")
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for _ in range(VARIATION.operations):
            image = random.choice(PILLOW)(image, random.choice((-1, 1)))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if random.random() < VARIATION.erase:
            height, width = (random.randint(16, 64) for _ in range(2))
            top, left = random.randint(0, SIDE - height), random.randint(0, SIDE - width)
            pixels[:, top : top + height, left : left + width] = 127
        return pixels, int(self.paths[index].parent.name)


def save(folder: Path, suffix: str) -> None:
    """Smooth pictures with a little noise: what decoders take as long for as for faces."""
    generator = np.random.default_rng(0)
    for identity in range(IDENTITIES):
        (folder / f"{identity:04d}").mkdir(parents=True)
        for number in range(IMAGES):
            coarse = Image.fromarray(generator.uniform(0, 255, (8, 8, 3)).astype(np.uint8))
            smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
            pixels = (smooth + generator.normal(0, 1.5, smooth.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{identity:04d}" / f"{number}.{suffix}", quality=95)


def here(training: TrainingSet, threads: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the loader, uint8."""
    order = epoch_order(len(training), BATCH, 0, 0)
    loader = Loader(training, VARIATION, threads, torch.device("cpu"))
    yield from ((batch.crops, batch.labels) for batch in loader.batches(0, list(order)))


def drain(batches: Any) -> None:
    """Take all batches."""
    for _ in batches:
        pass


def recipe_of() -> RecogniserConfig:
    """The paper's variation, for the smallest network."""
    return RecogniserConfig(
        backbone="small", width=128, batch_size=BATCH, precision="fp32", held_out=0.1, epochs=EPOCHS
    )


def trainer(training: TrainingSet, folder: Path) -> tuple[Recogniser, torch.optim.SGD]:
    """The small network of the demo pack with a head for all identities."""
    job = plan_training(training, recipe_of(), TrainingExecution(device="cpu"), folder)
    module = Recogniser(starting_network(job), MarginHead("cosface", 128, IDENTITIES, 24.0, 0.35, 0))
    module.to(memory_format=torch.channels_last)
    return module, torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)


def step(module: nn.Module, optimiser: torch.optim.SGD, crops: Tensor, labels: Tensor) -> None:
    """A step of the optimiser, on uint8 crops."""
    module(crops, labels, torch.Generator()).loss.backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def processor_times(training: TrainingSet, folder: Path) -> dict[str, float]:
    """Microseconds of a processor an image: read and varied, here and in the plain form; and a step."""
    count = len(training)
    module, optimiser = trainer(training, folder)
    crops, labels = next(here(training, 1))
    seconds = {
        "plain": best_seconds(lambda: drain(DataLoader(PlainFolder(folder), BATCH))) / count,
        "here": best_seconds(lambda: drain(here(training, 1))) / count,
        "decoding": best_seconds(partial(training.read, np.arange(count))) / count,
        "network": best_seconds(partial(step, module, optimiser, crops, labels)) / BATCH,
    }
    times = {f"{name}_us": 1e6 * one for name, one in seconds.items()}
    print(
        f"{folder.name}, processor time: read and varied in {times['here_us']:.0f} us (decoding "
        f"{times['decoding_us']:.0f}), plain {times['plain_us']:.0f} us; a step of the network "
        f"{times['network_us']:.0f} us"
    )
    return times


def by_the_clock(training: TrainingSet, folder: Path) -> dict[str, float]:
    """Images a second of an epoch of `fit` and in the plain form, and the share of time without a batch."""
    job = plan_training(training, recipe_of(), TrainingExecution(device="cpu"), folder.with_suffix(".fit"))
    job.folder.mkdir()
    fit(job, lambda seen, to_see: None)
    with (job.folder / "curves.csv").open() as file:
        best = max(csv.DictReader(file), key=lambda epoch: float(epoch["images_per_second"]))
    module, optimiser = trainer(training, folder)
    begun = time.perf_counter()
    for pixels, labels in DataLoader(PlainFolder(folder), BATCH, shuffle=True):
        step(module, optimiser, pixels, labels)
    plain = len(training) / (time.perf_counter() - begun)
    rates = {
        "threads": job.loaders,
        "here": float(best["images_per_second"]),
        "plain": plain,
        "waited": float(best["waited"]),
    }
    print(
        f"     by the clock: {rates['here']:.0f} images/s, plain {plain:.0f}; the network waited "
        f"{rates['waited']:.1%} of the time (target {TARGET_WAITED:.0%})"
    )
    return rates


def main() -> int:
    """Run and print everything; write `results/training.json`; return how many targets are missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clock", action="store_true", help="Also by the clock: on an idle machine.")
    clock = parser.parse_args().clock
    results: dict[str, Any] = {"machine": machine(), "rows": []}
    print(f"{IDENTITIES * IMAGES} crops, load average {results['machine']['load_average']}")
    with tempfile.TemporaryDirectory() as place:
        for suffix in ("png", "jpg"):
            folder = Path(place) / suffix
            save(folder, suffix)
            training = open_set(folder, folder, lambda done, total: None)
            row = {"images": suffix, **processor_times(training, folder)}
            if clock:
                row["clock"] = by_the_clock(training, folder)
            results["rows"].append(row)
    missed = sum(row["clock"]["waited"] > TARGET_WAITED for row in results["rows"] if clock)
    print(f"{missed or 'no'} targets missed; written to {write_results('training', results)}")
    return missed


if __name__ == "__main__":
    sys.exit(1 if main() else 0)

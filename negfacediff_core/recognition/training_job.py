"""What a training is to do, checked before it begins, and the folder that it owns."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from negfacediff_core.errors import ConfigError, DamagedError, StoreError, WeightsError
from negfacediff_core.file_hashes import file_sha256
from negfacediff_core.file_locks import locked
from negfacediff_core.processor import fast_bfloat16, usable_cores
from negfacediff_core.recognition.backbones import IRESNET_LAYERS, IResNet, PlainNet, build_backbone
from negfacediff_core.recognition.course import Position, rate_at
from negfacediff_core.recognition.datasets import Progress, TrainingSet, unreadable
from negfacediff_core.recognition.demo import DEMO_NETWORKS
from negfacediff_core.recognition.recipe import RecogniserConfig, TrainingExecution
from negfacediff_core.recognition.recogniser_files import load_network
from negfacediff_core.recognition.seeds import generator_of
from negfacediff_core.tensor_files import replacing

#: Files of a training's folder: what it trains, its state, and the weights of its best epoch.
DESCRIPTION, STATE, BEST = "training.json", "state.pt", "best.pt"
#: Where the crops are listed that keep a training from beginning, and how many of them its error names.
UNREADABLE, NAMED = "unreadable.txt", 5


@dataclass(frozen=True)
class TrainingJob:
    """A training: images, recipe, and where; `architecture` is for `build_backbone`."""

    training: TrainingSet
    held_out: TrainingSet
    recipe: RecogniserConfig
    execution: TrainingExecution
    folder: Path
    architecture: dict[str, Any]

    @property
    def device(self) -> str:
        """cpu or cuda."""
        found = "cuda" if torch.cuda.is_available() else "cpu"
        return found if self.execution.device == "auto" else self.execution.device

    @property
    def loaders(self) -> int:
        """Threads of each process that decode."""
        return self.execution.loaders or max(1, usable_cores() // self.execution.processes)

    @property
    def precision(self) -> str:
        """That of the recipe; fp32 in the place of bf16 where a CPU would only take longer for it."""
        slow = self.recipe.precision == "bf16" and self.device == "cpu" and not fast_bfloat16()
        return "fp32" if slow else self.recipe.precision

    @property
    def batch(self) -> int:
        """Images of an optimiser step: of the recipe, or of a set that is smaller, in equal parts."""
        parts = self.execution.processes * self.recipe.accumulate
        return min(self.recipe.batch_size, len(self.training) // parts * parts)

    @property
    def steps(self) -> int:
        """Optimiser steps of an epoch."""
        return len(self.training) // self.batch

    @property
    def images(self) -> int:
        """Images that are seen in all epochs together."""
        return self.recipe.epochs * self.steps * self.batch

    def rate(self, position: Position) -> float:
        """Learning rate of a step: that of the schedule, in proportion to the images that a step has."""
        return rate_at(self.recipe, position, self.steps) * self.batch / self.recipe.batch_size

    def describe(self) -> dict[str, Any]:
        """Return what decides the result, in JSON types.

        `start` is the SHA-256 of the weights that the recipe starts from; None where there are none any more.
        """
        weights = _start_file(self.recipe)
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "batch": self.batch,
            "start": file_sha256(weights) if weights and weights.is_file() else None,
            "origin": self.training.origin._asdict(),
            "training": _described(self.training),
            "held_out": _described(self.held_out),
        }


def plan_training(
    crops: TrainingSet, recipe: RecogniserConfig, execution: TrainingExecution, folder: Path
) -> TrainingJob:
    """Part a set into what is trained on and what is held out, and check that all can work.

    Raises ConfigError, or WeightsError for weights to start from that are not of this network.
    """
    training, held_out = split(crops, recipe)
    job = TrainingJob(training, held_out, recipe, execution, folder, architecture_of(recipe))
    parts = execution.processes * recipe.accumulate
    if recipe.batch_size % parts or job.batch < 2 * parts:
        raise ConfigError(
            f"Batches of {recipe.batch_size} out of {len(training):,} images cannot be parted among "
            f"{execution.processes} processes and {recipe.accumulate} turns of each (accumulate), with two "
            "images at least in every part: change batch_size, accumulate or processes."
        )
    if job.device == "cuda" and not torch.cuda.device_count() >= execution.processes:
        raise ConfigError(
            f"{execution.processes} processes need as many GPUs, and torch sees {torch.cuda.device_count()}: "
            "ask for fewer processes, or the device cpu."
        )
    if job.device == "cpu" and recipe.precision == "fp16":
        raise ConfigError("precision fp16 is for GPUs: take bf16 or fp32 on a CPU.")
    if recipe.start:
        starting_network(job)
    return job


def split(crops: TrainingSet, recipe: RecogniserConfig) -> tuple[TrainingSet, TrainingSet]:
    """Hold out a share of the identities, of those with two images at least; ConfigError if too few."""
    counts = np.bincount(crops.labels)
    several = np.flatnonzero(counts >= 2)
    wanted = max(2, round(recipe.held_out * crops.classes))
    if len(several) < wanted or crops.classes - wanted < 2:
        raise ConfigError(
            f"The set shows {crops.classes:,} identities, {len(several):,} of them in two images at least. "
            f"{wanted} such are held out, and two must be left to train on: take more identities, or another "
            "held_out."
        )
    order = torch.randperm(len(several), generator=generator_of(recipe.seed, "held out", 0)).numpy()
    aside = np.isin(crops.labels, several[order[:wanted]])
    return crops.chosen(np.flatnonzero(~aside)), crops.chosen(np.flatnonzero(aside))


def architecture_of(recipe: RecogniserConfig) -> dict[str, Any]:
    """Return what `build_backbone` takes."""
    if recipe.backbone == "small":
        network = DEMO_NETWORKS["recogniser"].architecture
    else:
        network = {"family": "iresnet", "layers": list(IRESNET_LAYERS[int(recipe.backbone[7:])])}
    return {**network, "width": recipe.width, "dropout": recipe.dropout}


def starting_network(job: TrainingJob) -> IResNet | PlainNet:
    """Build the network, with the weights to start from where the recipe names some.

    A training that goes on has its own weights in its state: then those to start from are not looked at.
    """
    backbone = build_backbone(job.architecture, job.recipe.seed)
    path = _start_file(job.recipe)
    if path and not (job.folder / STATE).exists():
        try:
            backbone.load_state_dict(load_network(path).state_dict())
        except RuntimeError as error:
            raise WeightsError(
                f"{path} holds weights of another network than {job.recipe.backbone} with embeddings of "
                f"{job.recipe.width} numbers: start from others, or set backbone and width."
            ) from error
    return backbone


def _start_file(recipe: RecogniserConfig) -> Path | None:
    """The file of weights that a recipe starts from; None if it starts from none."""
    if not recipe.start:
        return None
    path = Path(recipe.start)
    return path / BEST if path.is_dir() else path


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold a training's folder, which is made as needed, for this process alone.

    Raises StoreError if another process trains there, or it cannot be written (PlaceError).
    """
    with locked(folder / ".lock", busy=f"another process trains in {folder}: let it end."):
        yield


def check_crops(job: TrainingJob, crops: TrainingSet, progress: Progress) -> None:
    """Before a training begins, read all of its crops once: one that is damaged would end it after hours.

    Raises DamagedError if there are such; the file UNREADABLE of the folder then lists them. Nothing is
    looked at once the training has begun.
    """
    if (job.folder / DESCRIPTION).exists():
        return
    listed = job.folder / UNREADABLE
    wrong = unreadable(crops, job.loaders, progress)
    if not wrong:
        listed.unlink(missing_ok=True)
        return
    with replacing(listed) as file:
        file.write("".join(f"{one}\n" for one in wrong).encode())
    raise DamagedError(
        f"{len(wrong):,} of {len(crops):,} crops cannot be trained on: {' '.join(wrong[:NAMED])} {listed} "
        "lists them all. Copy or export these anew, or take them out, and run the same command again."
    )


def claim(job: TrainingJob) -> None:
    """Write down what is trained in a folder; ConfigError as `check_folder`."""
    check_folder(job)
    if not (job.folder / DESCRIPTION).exists():
        with replacing(job.folder / DESCRIPTION) as file:
            file.write((json.dumps(job.describe(), indent=1) + "\n").encode())


def check_folder(job: TrainingJob) -> None:
    """Raise ConfigError unless a folder is free for a training, or holds the beginning of this very one."""
    path = job.folder / DESCRIPTION
    if not path.exists():
        if (job.folder / STATE).exists():
            raise ConfigError(f"{job.folder} has a {STATE} and no {DESCRIPTION}: give another folder.")
        return
    try:
        different = _differences(json.loads(path.read_bytes()), job.describe())
    except (ValueError, AttributeError) as error:
        raise StoreError(f"{path} is damaged: give another folder.") from error
    if different:
        raise ConfigError(
            f"{job.folder} holds another training: {', '.join(different)} differ. Go on with what it was "
            "begun with, or give another folder."
        )


def _differences(found: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Name what a training was begun with that differs from what is asked for now."""
    # fields that an earlier version did not have are at their defaults, which change nothing
    recipe = RecogniserConfig().model_dump(mode="json") | found.get("recipe", {})
    different = [name for name, value in asked["recipe"].items() if recipe.get(name) != value]
    if different:  # from which the others follow
        return different
    if asked["start"] not in (None, found.get("start")):
        different.append("the weights of start")
    if any(found.get(key) != asked[key] for key in ("origin", "training", "held_out")):
        return [*different, "the images"]
    if found.get("batch") != asked["batch"]:
        different.append(f"the images of a step ({found.get('batch')}, {asked['batch']}; by the processes)")
    return different


def _described(crops: TrainingSet) -> dict[str, Any]:
    return {"images": len(crops), "identities": crops.classes, "sha256": crops.fingerprint}

"""What a training is to do, checked before it begins, and the folder that it owns."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from negfacediff_core.errors import ConfigError, PlaceError, StoreError, WeightsError
from negfacediff_core.recognition.backbones import IRESNET_LAYERS, IResNet, PlainNet, build_backbone
from negfacediff_core.recognition.datasets import TrainingSet
from negfacediff_core.recognition.demo import DEMO_NETWORKS
from negfacediff_core.recognition.recipe import RecogniserConfig, TrainingExecution
from negfacediff_core.recognition.recogniser_files import load_network
from negfacediff_core.recognition.seeds import generator_of
from negfacediff_core.tensor_files import replacing

#: Files of a training's folder: what it trains, its state, and the weights of its best epoch.
DESCRIPTION, STATE, BEST = "training.json", "state.pt", "best.pt"


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
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.execution.loaders or max(1, cores // self.execution.processes)

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

    def describe(self) -> dict[str, Any]:
        """Return what decides the result, in JSON types."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
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
            f"{execution.processes} processes, in {recipe.accumulate} parts each, with two images at least "
            "in every part: change batch_size, accumulate or processes."
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
    """Build the network, with the weights to start from where the recipe names some."""
    backbone = build_backbone(job.architecture, job.recipe.seed)
    if job.recipe.start:
        path = Path(job.recipe.start)
        path = path / BEST if path.is_dir() else path
        try:
            backbone.load_state_dict(load_network(path).state_dict())
        except RuntimeError as error:
            raise WeightsError(
                f"{path} holds weights of another network than {job.recipe.backbone} with embeddings of "
                f"{job.recipe.width} numbers: start from others, or set backbone and width."
            ) from error
    return backbone


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold a training's folder, which is made as needed, for this process alone.

    Raises StoreError if another process trains there, or it cannot be written (PlaceError).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise PlaceError(f"cannot write {folder}: {error.strerror}; give another folder.") from error
    try:
        # of the folder itself: there is no file of a lock to be left over
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise StoreError(f"another process trains in {folder}: let it end.") from error
    finally:
        os.close(handle)


def claim(job: TrainingJob) -> None:
    """Write down what is trained in a folder; ConfigError as `check_folder`."""
    check_folder(job)
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
        found = json.loads(path.read_bytes())
        different = [key for key, value in job.describe().items() if found.get(key) != value]
        recipe = job.describe()["recipe"]
        fields = [name for name, value in recipe.items() if found.get("recipe", {}).get(name) != value]
    except (ValueError, AttributeError) as error:
        raise StoreError(f"{path} is damaged: give another folder.") from error
    if different:
        named = ", ".join(fields) if fields else "the images"
        raise ConfigError(
            f"{job.folder} holds another training: {named} differ. Go on with what it was begun with, or "
            "give another folder."
        )


def _described(crops: TrainingSet) -> dict[str, Any]:
    return {"images": len(crops), "identities": crops.classes, "sha256": crops.fingerprint}

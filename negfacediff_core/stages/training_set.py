"""The aligned crops of a finished run as a training set, packed into one file that is read in any order."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import ConfigError
from negfacediff_core.export.settings import ExportConfig
from negfacediff_core.recognition.datasets import CROP, TrainingSet, pack
from negfacediff_core.recognition.origins import Origin
from negfacediff_core.stages.exported import check_readable, usable_images
from negfacediff_core.store.layout import StageSpec
from negfacediff_core.store.shards import read_arrays


def training_set_of(
    stages: Mapping[str, StageSpec], run: str, work: Path, progress: Callable[[int, int], None]
) -> TrainingSet:
    """Return the crops of a run whose status is ok; they are packed into the folder `work`, once.

    A store holds whole units, so that single images cannot be read from it. The file's name says what it
    holds, so that trainings can share the folder. `progress` is told of units.

    Raises:
        StoreError: if the run is not complete, or a unit is damaged; PlaceError if there is no room.
        ConfigError: if it shows fewer than two identities.
    """
    settings = ExportConfig()
    check_readable(stages, settings, run)
    usable = usable_images(stages, settings, lambda done, total: None)
    numbers = _order(stages["aligned"], usable)
    if len(np.unique(numbers[:, 0])) < 2:
        raise ConfigError(
            f"The run {run} shows faces of fewer than two identities: there is nothing to train on."
        )
    aligned, held = stages["aligned"], hashlib.sha256(numbers.tobytes()).hexdigest()[:16]
    reader = pack(
        work / f"crops-{aligned.fingerprint}-{held}.u8", len(numbers), _parts(aligned, usable, progress)
    )
    names = tuple(f"{identity:07d}_{replicate:04d}" for identity, replicate in numbers.tolist())
    labels = np.unique(numbers[:, 0], return_inverse=True)[1].astype(np.int64)
    # in the order of identities, however the blocks of the store cut their images
    order = np.lexsort((numbers[:, 1], numbers[:, 0]))
    origin = Origin("aligned", aligned.fingerprint, stages["samples"].fingerprint)
    return TrainingSet(reader, names, labels, np.arange(len(numbers)), origin, numbers).chosen(order)


def _order(aligned: StageSpec, usable: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Identity and replicate `(N, 2)` of the images in the order in which units hold them."""
    parts = []
    for unit in aligned.grid.units():
        first, start = aligned.grid.identities_of(unit).start, aligned.grid.replicates_of(unit).start
        block = usable[
            first : first + aligned.grid.block_identities, start : start + aligned.grid.block_replicates
        ]
        parts.append(np.argwhere(block) + np.array([first, start]))
    return np.concatenate(parts).astype(np.int64)


def _parts(
    aligned: StageSpec, usable: NDArray[np.bool_], progress: Callable[[int, int], None]
) -> Iterator[NDArray[np.uint8]]:
    """Crops of the usable images, unit by unit."""
    units = aligned.grid.units()
    progress(0, len(units))
    for done, unit in enumerate(units, start=1):
        first, start = aligned.grid.identities_of(unit).start, aligned.grid.replicates_of(unit).start
        crops = read_arrays(aligned, unit)["image"]
        block = usable[first : first + crops.shape[0], start : start + crops.shape[1]]
        yield crops[: block.shape[0], : block.shape[1]][block].reshape(-1, *CROP)
        progress(done, len(units))

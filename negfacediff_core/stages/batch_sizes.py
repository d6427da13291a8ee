"""Batch sizes that were found to fit the GPUs of this machine, kept in the user's cache folder.

What is lost with the file is a minute: it is never an error that it cannot be read or written.
"""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from negfacediff_core.diffusion.engine import SamplingEngine
from negfacediff_core.errors import StoreError
from negfacediff_core.stages.user_cache import cache_folder
from negfacediff_core.tensor_files import replacing

logger = logging.getLogger(__name__)


def batch_sizes_file() -> Path:
    """Return where they are kept: negfacediff/batch_sizes.json in $XDG_CACHE_HOME, or in ~/.cache."""
    return cache_folder() / "batch_sizes.json"


Negatives = NDArray[np.float32] | None  # (N, K, context width)


def recall(engine: SamplingEngine, negatives: Negatives) -> None:
    """Give an engine that is to find its batch size the one that was found before, if any."""
    if engine.batch_size == 0:
        engine.batch_size = _read().get(_key(engine, negatives), 0)


def remember(engine: SamplingEngine, negatives: Negatives) -> None:
    """Keep the batch size that an engine found; what a later lack of memory brings it down to is not kept."""
    sizes, key = _read(), _key(engine, negatives)
    if key in sizes:
        return
    path = batch_sizes_file()
    try:
        with replacing(path) as file:
            file.write(json.dumps({**sizes, key: engine.batch_size}, indent=1).encode())
    except StoreError as error:
        logger.warning("the batch size found is not kept for the next time: %s", error)


def _key(engine: SamplingEngine, negatives: Negatives) -> str:
    gpu = torch.cuda.get_device_properties(engine.device)
    needs = engine.needs(0 if negatives is None else negatives.shape[1])
    return f"{gpu.name}, {gpu.total_memory >> 30} GiB, {needs}"


def _read() -> dict[str, int]:
    path = batch_sizes_file()
    try:
        sizes = json.loads(path.read_bytes())
        if not isinstance(sizes, dict) or not all(type(s) is int and s > 0 for s in sizes.values()):
            raise ValueError("it does not hold names with whole numbers above 0")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("the batch sizes of %s are looked for anew: %s", path, error)
        return {}
    return sizes

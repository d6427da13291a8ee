"""How well a network in training tells held-out identities apart."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from negfacediff_core.evaluation.metrics import separability
from negfacediff_core.evaluation.scores import compare
from negfacediff_core.recognition.ahead import done_ahead
from negfacediff_core.recognition.datasets import TrainingSet
from negfacediff_core.stopping import heed

# What is enough to choose an epoch by: identities, and images of each.
_IDENTITIES, _IMAGES = 1000, 10
_BATCH = 256


def held_out_scores(crops: TrainingSet, embed: Callable[[Tensor], Tensor], threads: int) -> dict[str, float]:
    """Compare all pairs of up to 1,000 identities with up to 10 images each.

    `embed` takes `(N, 3, 112, 112)` uint8 crops to `(N, width)` embeddings. Returns the EER, the FNMR at an
    FMR of 1% (`fmr100`), and the FDR. Raises FloatingPointError for embeddings that are zero or not finite,
    StoppedError as `heed`.
    """
    images, identities, places = _chosen(crops)
    parts = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
    found = []
    with torch.inference_mode():
        # batches are decoded while the one before is embedded
        for part in done_ahead(crops.read, parts, threads):
            heed()
            found.append(embed(torch.from_numpy(part).permute(0, 3, 1, 2)).float().cpu().numpy())
    embeddings = np.concatenate(found)
    lengths = np.linalg.norm(embeddings, axis=1)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise FloatingPointError("embeddings are zero or not finite")
    shape = (identities.max() + 1, places.max() + 1)
    grid, valid = np.zeros((*shape, embeddings.shape[1]), np.float32), np.zeros(shape, bool)
    grid[identities, places], valid[identities, places] = embeddings, True
    figures = separability(*compare(grid, valid))
    return {"eer": figures.eer, "fmr100": figures.fmr100, "fdr": figures.fdr}


def _chosen(crops: TrainingSet) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Images that are compared, the identity of each, and which of its images it is."""
    order = np.argsort(crops.labels, kind="stable")
    labels = crops.labels[order]
    places = np.arange(len(order)) - np.searchsorted(labels, labels)
    taken = (labels < _IDENTITIES) & (places < _IMAGES)
    return order[taken], labels[taken], places[taken]

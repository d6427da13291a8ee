"""Embeddings of aligned crops by a network in training, and the figures of held-out identities."""

from dataclasses import asdict

import numpy as np
import torch
from numpy.typing import NDArray

from negfacediff_core.evaluation.metrics import separability
from negfacediff_core.evaluation.scores import compare, unit_vectors
from negfacediff_core.images import to_float
from negfacediff_core.recognition.backbones import IResNet, PlainNet


def held_out_figures(embeddings: NDArray[np.float32]) -> dict[str, float]:
    """Separation of `(identities, replicates, width)` embeddings over all pairs.

    `participation_ratio` = (sum l)^2 / sum l^2 over the eigenvalues l of the covariance of the identities'
    mean directions: the effective number of dimensions in which identities differ, of which a generator
    wants many.
    """
    figures = asdict(separability(*compare(embeddings)))
    wanted = ("eer", "fdr", "genuine_mean", "genuine_std", "impostor_mean", "impostor_std")
    directions = unit_vectors(embeddings.reshape(-1, embeddings.shape[-1])).reshape(embeddings.shape)
    eigenvalues = np.linalg.eigvalsh(np.cov(directions.mean(axis=1), rowvar=False))
    ratio = float(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())
    return {name: float(figures[name]) for name in wanted} | {"participation_ratio": ratio}


def embed_pooled_crops(
    backbone: IResNet | PlainNet, crops: NDArray[np.uint8], batch_size: int = 256
) -> NDArray[np.float32]:
    """Embed `(N, S, S, 3)` uint8 crops from `pooled_crops` in float32: `(N, width)`, not normalised."""
    was_training = backbone.training
    backbone.eval()
    with torch.inference_mode():
        parts = [
            backbone.embed_pooled(to_float(crops[i : i + batch_size]))
            for i in range(0, len(crops), batch_size)
        ]
    backbone.train(was_training)
    return torch.cat(parts).numpy()

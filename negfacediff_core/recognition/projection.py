"""A linear map that narrows embeddings to the directions in which identities differ.

A recogniser of W dimensions trained on few kinds of faces fills only some of them: contexts drawn uniformly
on its sphere then lie mostly where no face is. Linear discriminant analysis keeps the directions that tell
identities apart, and evening out their spread lets the identities fill the narrower sphere.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from negfacediff_core.errors import ConfigError
from negfacediff_core.recognition.augment import pooled_crops
from negfacediff_core.recognition.export import load_trained
from negfacediff_core.recognition.measure import embed_pooled_crops, held_out_figures

if TYPE_CHECKING:
    from negfacediff_core.renders.dataset import RenderSet


class ProjectionSettings(NamedTuple):
    """How a projection is fitted."""

    width: int  # directions kept
    evening: float = 0.5  # 0 leaves the spread between identities as it is, 1 makes it equal everywhere
    ridge: float = 0.05  # of the mean variance within identities, added to it: rare directions stay finite
    identities: int = 3000  # that it is fitted on, the first of the training set


def fit_projection(embeddings: NDArray[np.float32], settings: ProjectionSettings) -> nn.Linear:
    """Fit e -> D^(-evening/2) U^T S_w^(-1/2) (e - mean) on `(N, K, W)` embeddings, not normalised.

    S_w is the covariance within identities (ridged), and U, D are the leading eigenvectors and eigenvalues
    of the covariance between them after S_w has been whitened. Returns the map, W to `settings.width`.
    Raises ConfigError if there are fewer identities than directions, or nothing to narrow.
    """
    identities, replicates, before = embeddings.shape
    if not (settings.width <= before and settings.width < identities and replicates > 1):
        raise ConfigError(
            f"{identities} identities with {replicates} embeddings of width {before} cannot be narrowed to "
            f"{settings.width}: it takes more identities than directions, two embeddings each, and no more "
            "directions than there are."
        )
    values = embeddings.astype(np.float64)
    means = values.mean(axis=1)
    within = np.cov((values - means[:, None]).reshape(-1, before), rowvar=False)
    ridged = within + settings.ridge * np.trace(within) / before * np.eye(before)
    spread, axes = np.linalg.eigh(ridged)
    whiten = (axes * spread**-0.5) @ axes.T
    variances, directions = np.linalg.eigh(whiten @ np.cov(means, rowvar=False) @ whiten)
    kept = slice(before - settings.width, None)
    matrix = whiten @ (directions[:, kept] * variances[kept] ** (-settings.evening / 2))
    return _linear(matrix.T, -means.mean(axis=0) @ matrix)


def _linear(matrix: NDArray[np.float64], bias: NDArray[np.float64]) -> nn.Linear:
    linear = nn.Linear(matrix.shape[1], matrix.shape[0])
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(matrix))
        linear.bias.copy_(torch.from_numpy(bias))
    return linear


def narrow(
    checkpoint: Path, render_set: "RenderSet", settings: ProjectionSettings, held_out: int
) -> tuple[nn.Linear, dict[str, float]]:
    """Fit a trained recogniser's projection on the first identities of its render set.

    Returns it with the figures, as `held_out_figures`, of the last `held_out` identities under it, which
    neither the network nor the projection has seen. Errors as `load_trained` and `fit_projection`.
    """
    backbone = load_trained(checkpoint)

    def embed(identities: slice) -> NDArray[np.float32]:
        images, landmarks = render_set.images[identities], render_set.landmarks[identities]
        crops = pooled_crops(
            images.reshape(-1, *images.shape[2:]), landmarks.reshape(-1, 5, 2), backbone.input_pool
        )
        return embed_pooled_crops(backbone, crops).reshape(*images.shape[:2], -1)

    trained = len(render_set.images) - held_out
    projection = fit_projection(embed(slice(min(settings.identities, trained))), settings)
    with torch.inference_mode():
        narrowed = projection(torch.from_numpy(embed(slice(trained, None)))).numpy()
    return projection, held_out_figures(narrowed)

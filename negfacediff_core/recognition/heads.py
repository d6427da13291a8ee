"""Margin heads: logits whose softmax cross-entropy trains a recogniser, from cosines to class centres."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cosines(embeddings: Tensor, centres: Tensor) -> Tensor:
    """Cosines `(N, classes)` between `(N, width)` embeddings and `(classes, width)` class centres.

    Neither side needs unit norm. Computed in float32 even under autocast: a margin is lost in bfloat16.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        return F.linear(F.normalize(embeddings.float()), F.normalize(centres.float())).clamp(-1, 1)


def _replace_target(cosine: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Copy `cosine` `(N, classes)` with the entry of each row's label replaced by `target` `(N, 1)`."""
    return cosine.scatter(1, labels[:, None], target)


def cosface(cosine: Tensor, labels: Tensor, scale: float = 64.0, margin: float = 0.35) -> Tensor:
    """CosFace (arXiv 1801.09414, eq. 4): s (cos theta_y - m) for the target, s cos theta_j for the others.

    `cosine` `(N, classes)`, `labels` `(N,)` int64; returns `(N, classes)` logits.
    """
    target = cosine.gather(1, labels[:, None])
    return scale * _replace_target(cosine, labels, target - margin)


def arcface(cosine: Tensor, labels: Tensor, scale: float = 64.0, margin: float = 0.5) -> Tensor:
    """ArcFace (arXiv 1801.07698, eq. 3): s cos(theta_y + m) for the target, s cos theta_j for the others.

    Shapes as in `cosface`; the margin is an angle in radians.
    """
    # acos has an infinite slope at +-1, which a training step must not meet.
    angle = cosine.gather(1, labels[:, None]).clamp(-1 + 1e-7, 1 - 1e-7).acos()
    return scale * _replace_target(cosine, labels, (angle + margin).cos())


def elasticface(cosine: Tensor, labels: Tensor, margins: Tensor, scale: float = 64.0) -> Tensor:
    """ElasticFace-Cos (arXiv 2109.09416, eq. 6): CosFace with a margin of its own for each sample.

    `margins` `(N, 1)` comes from `elastic_margins`; the other shapes are those of `cosface`.
    """
    target = cosine.gather(1, labels[:, None])
    return scale * _replace_target(cosine, labels, target - margins)


def elastic_margins(
    count: int, generator: torch.Generator, mean: float = 0.35, deviation: float = 0.0125
) -> Tensor:
    """Draw the margins of `elasticface`: `(count, 1)` float32 from a normal distribution."""
    return mean + deviation * torch.randn(count, 1, generator=generator)


def adaface(
    cosine: Tensor,
    labels: Tensor,
    norms: Tensor,
    norm_mean: Tensor,
    norm_deviation: Tensor,
    scale: float = 64.0,
    margin: float = 0.4,
    concentration: float = 0.333,
) -> Tensor:
    """AdaFace (arXiv 2204.00964, eq. 12-14): the margin follows the image quality, for which the norm stands.

    With z = clip(h (norm - mean) / deviation, -1, 1) the target's logit is s (cos(theta_y - m z) - (m + m
    z)). `norms` `(N, 1)` are the lengths of the embeddings *before* any normalisation (after it they are
    all one and say nothing); `norm_mean` and `norm_deviation` are running statistics of them, see
    `update_norm_statistics`.
    """
    centred = (norms.detach().clamp(1e-3, 100) - norm_mean) / (norm_deviation + 1e-3)
    quality = (concentration * centred).clamp(-1, 1)
    angle = cosine.gather(1, labels[:, None]).clamp(-1 + 1e-7, 1 - 1e-7).acos()
    shifted = (angle - margin * quality).clamp(1e-3, math.pi - 1e-3)
    return scale * _replace_target(cosine, labels, shifted.cos() - margin * (1 + quality))


def update_norm_statistics(
    norms: Tensor, norm_mean: Tensor, norm_deviation: Tensor, rate: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Move AdaFace's running mean and deviation of norms by `rate` towards those of this `(N, 1)` batch."""
    clipped = norms.detach().clamp(1e-3, 100)
    return torch.lerp(norm_mean, clipped.mean(), rate), torch.lerp(norm_deviation, clipped.std(), rate)


# The heads that need nothing beyond cosines, labels, scale and margin.
MARGINS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "cosface": cosface,
    "arcface": arcface,
}

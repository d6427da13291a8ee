"""Contexts drawn for identity numbers: on the sphere, from a fitted distribution, between known identities.

A draw is a function of (seed, identity, attempt) alone, so identity i keeps its context when a dataset grows.
Attempts tell apart the draws of one identity where the first is not wanted; attempt 0 is the first.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core import noise
from negfacediff_core.contexts.vectors import Contexts, normalise
from negfacediff_core.errors import ContextsError

# What takes the place of the step in the counter of the stream CONTEXTS: each purpose has its own numbers.
_DIRECTIONS, _PAIRS = 0, 1


class IdentityDistribution(NamedTuple):
    """A normal distribution of identities: `mean` `(W,)` and `covariance` `(W, W)`, both float64.

    `shrinkage` in [0, 1] is the share of the isotropic target that the covariance contains.
    """

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    shrinkage: float


def uniform(
    seed: int, identities: NDArray[np.int64], width: int, attempts: NDArray[np.int64] | None = None
) -> Contexts:
    """Draw uniformly on the unit sphere: c = z / |z|, z ~ N(0, I) (arXiv 2308.04995, "synthetic uniform").

    `identities` are identity *numbers* `(N,)`, so that a work unit draws just its own rows, `attempts` `(N,)`
    theirs (None: all 0); the result is `(N, width)`.
    """
    return normalise(_standard_normal(seed, identities, width, attempts))


def fit_identities(reference: NDArray[Any]) -> IdentityDistribution:
    """Fit a normal distribution to reference contexts `(M, W)`, one row (the mean embedding) an identity; M
    >= 2.

    The covariance is S* = (1 - r) S + r (tr S / W) I, with Ledoit and Wolf's r (J. Multivariate Analysis 88,
    2004), the one of least expected squared error: r = min(1, b / d), d = |S - (tr S / W) I|^2, b = (1/M) E
    |x x' - S|^2. It vanishes for large M, and makes draws possible in all W dimensions where M is small.
    """
    rows = np.asarray(reference, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise ContextsError(
            f"a fitted source needs at least two reference identities, got an array of shape {rows.shape}: "
            "give a file with one mean embedding for each of many identities"
        )
    count, width = rows.shape
    mean = rows.mean(axis=0)
    centred = rows - mean
    covariance = centred.T @ centred / count
    target = np.eye(width) * (np.trace(covariance) / width)
    distance = float(((covariance - target) ** 2).sum())
    fourth_moment = float((np.square(centred).sum(axis=1) ** 2).mean())
    error = (fourth_moment - float((covariance**2).sum())) / count
    shrinkage = min(1.0, max(0.0, error) / distance) if distance > 0 else 1.0
    return IdentityDistribution(mean, (1 - shrinkage) * covariance + shrinkage * target, shrinkage)


def fitted(
    seed: int,
    identities: NDArray[np.int64],
    mean: NDArray[np.float64],
    covariance: NDArray[np.float64],
    attempts: NDArray[np.int64] | None = None,
) -> Contexts:
    """Draw c = x / |x|, x ~ N(mean, covariance), for identity numbers `(N,)`; the result is `(N, W)`.

    `mean` `(W,)` and `covariance` `(W, W)` come from `fit_identities`, which also says how they were shrunk.
    The same seed gives the same standard normals as `uniform`, here coloured by the covariance's symmetric
    root.
    """
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    width = len(mean)
    if covariance.shape != (width, width) or not (np.isfinite(covariance).all() and np.isfinite(mean).all()):
        raise ContextsError(
            f"the covariance of a fitted source must be finite and of shape ({width}, {width}) to go with "
            f"its mean, got shape {covariance.shape}"
        )
    # The symmetric root is unique, where a Cholesky factor fails on a semidefinite covariance.
    variances, axes = np.linalg.eigh(covariance)
    if variances[0] < -1e-6 * max(variances[-1], 0.0) or not np.allclose(covariance, covariance.T):
        raise ContextsError("the covariance of a fitted source must be symmetric and positive semidefinite")
    root = (axes * np.sqrt(np.maximum(variances, 0.0))) @ axes.T
    # One product a row: a matrix product's rounding would depend on how many identities are drawn together.
    coloured = np.matmul(root, _standard_normal(seed, identities, width, attempts)[:, :, None])[:, :, 0]
    return normalise(mean + coloured)


def mixup(
    seed: int,
    identities: NDArray[np.int64],
    reference: Contexts,
    margin: float,
    attempts: NDArray[np.int64] | None = None,
) -> Contexts:
    """Mix two known identities: c = x / |x|, x = r a + (1 - r) b (SynFace, arXiv 2108.07960).

    For each identity number `(N,)`, a and b are two different rows of `reference` `(M, W)`, unit vectors, and
    r is uniform in [margin, 1 - margin], `margin` in [0, 0.5]: at 0.5 all lie half-way, at 0 some lie on a
    known identity. Returns `(N, W)`; ContextsError for M < 2.
    """
    count = len(reference)
    if count < 2:
        raise ContextsError(
            f"mixup needs at least two reference identities, got {count}: give a file with more embeddings"
        )
    draws = noise.uniform(
        seed, identities, _or_first(attempts, identities), _PAIRS, (3,), stream=noise.CONTEXTS
    ).numpy()
    first = (draws[:, 0] * count).astype(np.int64)
    second = (first + 1 + (draws[:, 1] * (count - 1)).astype(np.int64)) % count
    share = margin + (1 - 2 * margin) * draws[:, 2:]
    rows = reference.astype(np.float64)
    return normalise(share * rows[first] + (1 - share) * rows[second])


def _standard_normal(
    seed: int, identities: NDArray[np.int64], width: int, attempts: NDArray[np.int64] | None
) -> NDArray[np.float64]:
    """Draw `(N, width)` standard normals, one row a given identity number, always on the CPU."""
    draws = noise.gaussian(
        seed, identities, _or_first(attempts, identities), _DIRECTIONS, (width,), stream=noise.CONTEXTS
    )
    return draws.numpy().astype(np.float64)


def _or_first(attempts: NDArray[np.int64] | None, identities: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.zeros_like(identities) if attempts is None else attempts

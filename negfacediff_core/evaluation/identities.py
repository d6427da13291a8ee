"""Figures that need more than two lists of scores: how sure the FDR is, and how faithful images are to
contexts.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import ContextsError, NegFaceDiffError
from negfacediff_core.evaluation.scores import EXACT_IMAGES, unit_vectors

Valid = NDArray[np.bool_]


class Fidelity(NamedTuple):
    """How well images show the identity of their context, measured in the space of the contexts.

    `rank1` is the share of images whose most similar context is their own; `mean` and `std` are the cosine to
    the own context and its population deviation.
    """

    rank1: float
    mean: float
    std: float


def bootstrap_fdr(
    embeddings: NDArray[np.float32], valid: Valid, draws: int, seed: int
) -> NDArray[np.float64]:
    """FDR of `draws` resamples of the identities, with replacement: `(draws,)`; its quantiles are an
    interval.

    `embeddings` `(I, R, D)`, `valid` `(I, R)`, at most `EXACT_IMAGES` valid images. Identities are resampled,
    not pairs, because the pairs of one identity move together. Two copies of one identity are not compared
    with each other. The same seed draws the same identities, so that the difference of two datasets' results
    is the paired bootstrap of the difference. A resample without genuine or without impostor pairs is NaN.
    """
    if valid.sum() > EXACT_IMAGES:
        raise NegFaceDiffError(
            f"the bootstrap of the FDR takes at most {EXACT_IMAGES} images, got {int(valid.sum())}: "
            "pass a part of the identities"
        )
    sums = _pair_sums(embeddings, valid)
    count = len(embeddings)
    picks = np.random.Generator(np.random.Philox(seed)).integers(0, count, size=(draws, count))
    times = np.stack([np.bincount(row, minlength=count) for row in picks]).astype(np.float64)
    genuine = times @ np.stack([np.diagonal(table) for table in sums], axis=1)
    across = [table - np.diag(np.diagonal(table)) for table in sums]
    impostor = np.stack([((times @ table) * times).sum(axis=1) / 2 for table in across], axis=1)
    (genuine_mean, genuine_variance), (impostor_mean, impostor_variance) = map(_moments, (genuine, impostor))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (genuine_mean - impostor_mean) ** 2 / (genuine_variance + impostor_variance)


def _pair_sums(embeddings: NDArray[np.float32], valid: Valid) -> tuple[NDArray[np.float64], ...]:
    """Count, sum and sum of squares of scores by identity pair, each `(I, I)`; the diagonal counts pairs
    once.
    """
    identity = np.nonzero(valid)[0]
    vectors = unit_vectors(embeddings[valid])
    scores = vectors @ vectors.T
    member = (identity[:, None] == np.arange(len(embeddings))).astype(np.float64)
    tables = []
    for values in (np.ones_like(scores), scores, scores**2):
        np.fill_diagonal(values, 0.0)
        table = member.T @ values @ member
        np.fill_diagonal(table, np.diagonal(table) / 2)
        tables.append(table)
    return tuple(tables)


def _moments(sums: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance from rows of (count, sum, sum of squares); NaN where the count is 0."""
    count = np.where(sums[:, 0] > 0, sums[:, 0], np.nan)
    mean = sums[:, 1] / count
    return mean, np.maximum(sums[:, 2] / count - mean**2, 0.0)


def context_fidelity(
    embeddings: NDArray[np.float32], valid: Valid, contexts: NDArray[np.float32], block: int = 4096
) -> Fidelity:
    """Compare images with all contexts, in the space of the recogniser that made the contexts (not the
    judge's).

    `embeddings` `(I, R, W)` of that recogniser, `valid` `(I, R)`, `contexts` `(I, W)`. Images without a face
    are left out; with none left every figure is NaN.
    """
    if embeddings.shape[-1] != contexts.shape[-1] or len(embeddings) != len(contexts):
        raise ContextsError(
            f"embeddings {embeddings.shape} and contexts {contexts.shape} must have the same identities and "
            "width: embed the images with the recogniser that made the contexts"
        )
    if not valid.any():
        return Fidelity(np.nan, np.nan, np.nan)
    identity = np.nonzero(valid)[0]
    vectors, targets = unit_vectors(embeddings[valid]), unit_vectors(contexts)
    own = (vectors * targets[identity]).sum(axis=1)
    nearest = [
        (vectors[start : start + block] @ targets.T).argmax(axis=1) for start in range(0, len(vectors), block)
    ]
    rank1 = float((np.concatenate(nearest) == identity).mean())
    return Fidelity(rank1, float(own.mean()), float(own.std()))


def identity_statistics(
    embeddings: NDArray[np.float32], valid: Valid, block: int = 1024
) -> dict[str, NDArray[np.float64] | NDArray[np.int64]]:
    """One row an identity, as columns `(I,)`: what the evaluation stage stores.

    `images`: valid ones (int64). `genuine_mean`: mean cosine of its pairs. `nearest`: the identity whose mean
    embedding is the most similar (-1 if there is none), `nearest_cosine`: that similarity. Means over nothing
    are NaN.
    """
    images = valid.sum(axis=1).astype(np.int64)
    unit = np.zeros(embeddings.shape)
    unit[valid] = unit_vectors(embeddings[valid])
    total = unit.sum(axis=1)
    length = np.linalg.norm(total, axis=1)
    # |sum of unit vectors|^2 = n + 2 x the sum over its pairs
    pairs = images * (images - 1)
    genuine = np.where(pairs > 0, (length**2 - images) / np.maximum(pairs, 1), np.nan)
    nearest, cosine = np.full(len(images), -1), np.full(len(images), np.nan)
    present = np.flatnonzero(length > 0)
    centres = total[present] / length[present, None]
    for start in range(0, len(present) if len(present) > 1 else 0, block):
        similarity = centres[start : start + block] @ centres.T
        rows = np.arange(len(similarity))
        similarity[rows, start + rows] = -np.inf
        best = similarity.argmax(axis=1)
        nearest[present[start + rows]] = present[best]
        cosine[present[start + rows]] = similarity[rows, best]
    return {"images": images, "genuine_mean": genuine, "nearest": nearest, "nearest_cosine": cosine}

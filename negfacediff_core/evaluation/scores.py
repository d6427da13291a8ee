"""Genuine and impostor comparison scores (cosines) of a dataset's embeddings, as counts over ascending
levels.

Small sets keep every distinct score, so their figures are exact. Large sets are streamed in blocks into fine
histograms with exact moments: 0.5M images make 10^11 pairs, which no list can hold.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from negfacediff_core.errors import NegFaceDiffError

#: Sets of at most this many images keep every score (2 million pairs); larger ones are counted in bins.
EXACT_IMAGES = 2048
#: Bins over [-1, 1]: thresholds are resolved to 2 / BINS = 3e-5.
BINS = 2**16

#: The published protocol (arXiv 2508.09661): identities, images of each, share of later identities compared.
PAPER_IDENTITIES, PAPER_IMAGES, PAPER_IMPOSTOR_SHARE = 1000, 20, 0.05


@dataclass(frozen=True)
class Distribution:
    """Scores of one kind: `counts` `(K,)` int64 at ascending `levels` `(K,)` float64, and exact moments.

    A score is at its level or above it by less than `resolution` (0: levels are the scores themselves).
    `std` is the population deviation.
    """

    levels: NDArray[np.float64]
    counts: NDArray[np.int64]
    mean: float
    std: float
    resolution: float = 0.0

    @property
    def size(self) -> int:
        """How many scores there are."""
        return int(self.counts.sum())

    @classmethod
    def of(cls, scores: NDArray[np.floating]) -> "Distribution":
        """Keep every score of a list `(N,)`; N = 0 has NaN moments."""
        scores = np.asarray(scores, dtype=np.float64)
        if not np.isfinite(scores).all():
            raise NegFaceDiffError(
                "comparison scores hold NaN or infinity: mask the images whose embedding failed"
            )
        levels, counts = np.unique(scores, return_counts=True)
        moments = (float(scores.mean()), float(scores.std())) if len(scores) else (np.nan, np.nan)
        return cls(levels, counts.astype(np.int64), *moments)


class Comparisons(NamedTuple):
    """Scores within identities (genuine) and across identities (impostor)."""

    genuine: Distribution
    impostor: Distribution


class Selection(NamedTuple):
    """What a protocol compares: `images` `(I, R)` bool, and which identity pairs `(I, I)` are impostors
    (None: all).
    """

    images: NDArray[np.bool_]
    impostors: NDArray[np.bool_] | None


def _full(valid: NDArray[np.bool_], seed: int) -> Selection:
    """All pairs of all valid images."""
    return Selection(valid, None)


def _paper(valid: NDArray[np.bool_], seed: int) -> Selection:
    """The first 20 valid images of the first 1,000 identities; each identity against a seeded 5% of those
    after it.
    """
    images = valid & (np.cumsum(valid, axis=1) <= PAPER_IMAGES)
    images[PAPER_IDENTITIES:] = False
    count = len(valid)
    draws = np.random.Generator(np.random.Philox(seed)).random((PAPER_IDENTITIES, PAPER_IDENTITIES))
    impostors = np.zeros((count, count), dtype=bool)
    used = min(count, PAPER_IDENTITIES)
    impostors[:used, :used] = np.triu(draws < PAPER_IMPOSTOR_SHARE, k=1)[:used, :used]
    return Selection(images, impostors)


#: Each protocol selects from `valid` `(I, R)` and a seed.
PROTOCOLS: dict[str, Callable[[NDArray[np.bool_], int], Selection]] = {"full": _full, "paper": _paper}


def compare(
    embeddings: NDArray[np.float32],
    valid: NDArray[np.bool_] | None = None,
    protocol: str = "full",
    seed: int = 0,
    *,
    exact_images: int = EXACT_IMAGES,
    block: int = 1024,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Comparisons:
    """Score the pairs of `embeddings` `(I, R, D)` that the protocol takes: cosines, each unordered pair once.

    `valid` `(I, R)` bool excludes images that failed or show no face (default: all are valid). Embeddings
    need not be normalised. Up to `exact_images` images keep every score (computed in float64); beyond,
    `block` x `block` tiles of float32 scores are counted on `device` in BINS bins, where another block size
    may move a score by one rounding. `progress(done, total)` is called after each row of tiles. Raises
    NegFaceDiffError.
    """
    if valid is None:
        valid = np.ones(embeddings.shape[:2], dtype=bool)
    if embeddings.ndim != 3 or valid.shape != embeddings.shape[:2]:
        raise NegFaceDiffError(
            f"embeddings must be (identities, replicates, width) with a mask (identities, replicates), "
            f"got {embeddings.shape} and {valid.shape}"
        )
    if protocol not in PROTOCOLS:
        raise NegFaceDiffError(f"there is no protocol {protocol!r}: choose one of {', '.join(PROTOCOLS)}")
    images, impostors = PROTOCOLS[protocol](valid, seed)
    identity = np.nonzero(images)[0]
    vectors = unit_vectors(embeddings[images])
    if len(vectors) <= exact_images:
        return _exact(vectors, identity, impostors)
    return _streamed(vectors, identity, impostors, block, torch.device(device), progress)


def unit_vectors(embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    """Scale `(N, D)` embeddings to unit length in float64; NaN, infinity or zero length raises
    NegFaceDiffError.
    """
    rows = np.asarray(embeddings, dtype=np.float64)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(length) & (length > 0)))
    if len(bad):
        raise NegFaceDiffError(
            f"{len(bad)} embeddings marked as valid have NaN, infinite or zero length (the first is number "
            f"{bad[0]}): mark failed images as not valid"
        )
    return rows / length


def _exact(
    vectors: NDArray[np.float64], identity: NDArray[np.int64], impostors: NDArray[np.bool_] | None
) -> Comparisons:
    row, column = np.triu_indices(len(vectors), k=1)
    scores = (vectors @ vectors.T)[row, column]
    same = identity[row] == identity[column]
    different = ~same if impostors is None else impostors[identity[row], identity[column]]
    return Comparisons(Distribution.of(scores[same]), Distribution.of(scores[different]))


class _Tally:
    """Counts in BINS bins over [-1, 1] and sums for exact moments, added to tile by tile on the device."""

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.total)

    def add(self, scores: torch.Tensor) -> None:
        """Count float32 scores of any shape."""
        flat = scores.reshape(-1)
        bins = flat.add(1).mul_(BINS / 2).to(torch.int32).clamp_(0, BINS - 1)
        self.counts += torch.bincount(bins, minlength=BINS)
        self.total += flat.sum(dtype=torch.float64)
        self.squares += flat.square().sum(dtype=torch.float64)

    def distribution(self) -> Distribution:
        """The non-empty bins, at their lower edges."""
        counts = self.counts.cpu().numpy()
        size = int(counts.sum())
        mean = float(self.total) / size if size else np.nan
        variance = max(0.0, float(self.squares) / size - mean**2) if size else np.nan
        filled = np.flatnonzero(counts)
        levels = filled.astype(np.float64) * (2.0 / BINS) - 1.0
        return Distribution(levels, counts[filled], mean, float(np.sqrt(variance)), 2.0 / BINS)


def _streamed(
    vectors: NDArray[np.float64],
    identity: NDArray[np.int64],
    impostors: NDArray[np.bool_] | None,
    block: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None,
) -> Comparisons:
    """Tile the upper triangle of the score matrix; identities are in ascending order along both sides."""
    genuine, impostor = _Tally(device), _Tally(device)
    on_device = torch.from_numpy(vectors.astype(np.float32)).to(device)
    labels = torch.from_numpy(identity).to(device)
    wanted = None if impostors is None else torch.from_numpy(impostors).to(device)
    tiles = range(0, len(vectors), block)
    for done, top in enumerate(tiles):
        rows, row_labels = on_device[top : top + block], labels[top : top + block]
        for left in range(top, len(vectors), block):
            scores = rows @ on_device[left : left + block].T
            column_labels = labels[left : left + block]
            apart = left > top and identity[top + block - 1] < identity[left]
            if apart and wanted is None:
                impostor.add(scores)
                continue
            once = torch.ones_like(scores, dtype=torch.bool)
            if left == top:
                once.triu_(diagonal=1)
            if wanted is None:
                different = row_labels[:, None] != column_labels
            else:
                different = wanted[row_labels].index_select(1, column_labels)
            impostor.add(scores[once & different])
            if not apart:
                genuine.add(scores[once & (row_labels[:, None] == column_labels)])
        if progress is not None:
            progress(done + 1, len(tiles))
    return Comparisons(genuine.distribution(), impostor.distribution())

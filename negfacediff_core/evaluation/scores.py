"""Genuine and impostor comparison scores (cosines) of a dataset's embeddings, by named protocols.

Small sets, and the published protocol, keep every distinct score, so that their figures are exact. The full
protocol of a large set is counted in fine bins (`bands`): 0.5M images make 10^11 pairs, which no list can
hold.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.evaluation.bands import TILE_ROWS, Images, add_up, genuine_scores, score_band
from negfacediff_core.evaluation.distributions import Comparisons, Distribution, unit_vectors

__all__ = ["EXACT_IMAGES", "PROTOCOLS", "Comparisons", "Distribution", "Selection", "compare", "unit_vectors"]

#: Sets of at most this many images keep every score (2 million pairs); larger ones are counted in bins.
EXACT_IMAGES = 2048

#: The published protocol (arXiv 2508.09661): identities, images of each, share of later identities compared.
PAPER_IDENTITIES, PAPER_IMAGES, PAPER_IMPOSTOR_SHARE = 1000, 20, 0.05


class Selection(NamedTuple):
    """What a protocol compares: `images` `(I, R)` bool, and which identity pairs are impostors (None: all).

    `impostors` is `(U, U)` bool, above its diagonal, where no image of any but the first U identities is
    compared.
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
    used = min(len(valid), PAPER_IDENTITIES)
    # drawn for all, so that a pair is compared or not however many identities there are
    draws = np.random.Generator(np.random.Philox(seed)).random((PAPER_IDENTITIES, PAPER_IDENTITIES))
    return Selection(images, np.triu(draws < PAPER_IMPOSTOR_SHARE, k=1)[:used, :used])


#: By name; each selects from `valid` `(I, R)` and a seed.
PROTOCOLS: dict[str, Callable[[NDArray[np.bool_], int], Selection]] = {"full": _full, "paper": _paper}


def select(valid: NDArray[np.bool_], protocol: str, seed: int) -> Selection:
    """Return what the named protocol compares of the `valid` images `(I, R)`; NegFaceDiffError if there is
    none of that name.
    """
    if protocol not in PROTOCOLS:
        raise NegFaceDiffError(f"there is no protocol {protocol!r}: choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol](valid, seed)


def compare(
    embeddings: NDArray[np.float32],
    valid: NDArray[np.bool_] | None = None,
    protocol: str = "full",
    seed: int = 0,
    *,
    exact_images: int = EXACT_IMAGES,
    block: int = TILE_ROWS,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Comparisons:
    """Score the pairs of `embeddings` `(I, R, D)` that the protocol takes: cosines, each unordered pair once.

    `valid` `(I, R)` bool excludes images that failed or show no face (default: all are valid). Embeddings
    need not be normalised. The full protocol keeps every score, in float64, of up to `exact_images` images;
    beyond, `bands` counts them on `device` in tiles of `block` rows. The paper protocol, some 10^7 scores,
    always keeps them. `progress(done, total)` counts identities where scores are kept, and images otherwise.
    Raises NegFaceDiffError.
    """
    if valid is None:
        valid = np.ones(embeddings.shape[:2], dtype=bool)
    if embeddings.ndim != 3 or valid.shape != embeddings.shape[:2]:
        raise NegFaceDiffError(
            f"embeddings must be (identities, replicates, width) with a mask (identities, replicates), "
            f"got {embeddings.shape} and {valid.shape}"
        )
    images, impostors = select(valid, protocol, seed)
    chosen = Images(embeddings[images], np.nonzero(images)[0])
    if impostors is not None or len(chosen.identity) <= exact_images:
        return _exact(chosen, impostors, progress)
    seen = 0

    def advance(more: int) -> None:
        nonlocal seen
        seen += more
        if progress is not None:
            progress(seen, len(chosen.identity))

    return add_up([score_band(chosen, (), device=device, rows=block, progress=advance)])


def _exact(
    images: Images,
    impostors: NDArray[np.bool_] | None,
    progress: Callable[[int, int], None] | None,
) -> Comparisons:
    """Keep every score: a product an identity, with the images of the later identities it is compared to."""
    vectors, identity = unit_vectors(images.embeddings), images.identity
    genuine, impostor = [np.empty(0)], [np.empty(0)]
    present = np.unique(identity)
    for done, one in enumerate(present, start=1):
        first, stop = np.searchsorted(identity, [one, one + 1])
        own, later = vectors[first:stop], vectors[stop:]
        if impostors is not None:
            later = later[impostors[one, identity[stop:]]]
        genuine += genuine_scores(own)
        impostor.append((own @ later.T).ravel())
        if progress is not None:
            progress(done, len(present))
    return Comparisons(Distribution.of(np.concatenate(genuine)), Distribution.of(np.concatenate(impostor)))

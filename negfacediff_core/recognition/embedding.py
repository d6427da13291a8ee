"""Embeddings of many crops, which are decoded and embedded batch by batch in several threads."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.faces.embed import Embedder
from negfacediff_core.recognition.crop_lists import SIDE, CropList


class Embedding(NamedTuple):
    """How crops are embedded: by which recogniser, whether mirrored as well, in batches and threads.

    With `flip`, the form in which the field verifies, an embedding is the sum of those of the crop and of its
    mirror image. Neither is normalised.
    """

    embedder: Embedder
    flip: bool = True
    batch: int = 32
    threads: int = 1


def check_size(crops: CropList, embedder: Embedder, where: str) -> None:
    """Raise NegFaceDiffError unless the recogniser takes crops of this size."""
    if crops.side != embedder.input_size:
        raise NegFaceDiffError(
            f"the images of {where} have {crops.side}x{crops.side} pixels, and {embedder.weights.name} takes "
            f"{embedder.input_size}x{embedder.input_size}: align the faces to that size; a detector "
            f"(--detector PACK) does it for {SIDE}x{SIDE}"
        )


def embed_all(
    crops: CropList, how: Embedding, committed: Callable[[int], None] = lambda count: None
) -> NDArray[np.float32]:
    """Embed all crops: `(N, width)` float32, not normalised. `committed` is told of every batch."""
    embeddings = np.empty((len(crops), how.embedder.width), np.float32)
    for start, part in embedded_batches(crops, how):
        embeddings[start : start + len(part)] = part
        committed(len(part))
    return embeddings


def embedded_batches(crops: CropList, how: Embedding) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield (number of the first crop, embeddings `(n, width)`) batch by batch, in order.

    A thread does one batch at a time, from its files to its embeddings, so that decoding and networks keep
    all threads busy. Raises NegFaceDiffError for a crop that cannot be decoded, or whose embedding is not
    finite or zero.
    """

    def embed(start: int) -> NDArray[np.float32]:
        places = range(start, min(start + how.batch, len(crops)))
        embeddings = how.embedder.embed(np.stack([crops.read(place) for place in places]), how.flip)
        lengths = np.linalg.norm(embeddings, axis=1)
        bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
        if len(bad):
            raise NegFaceDiffError(
                f"{how.embedder.weights.name} gives {crops.names[start + bad[0]]} an embedding that is zero "
                "or not finite: these weights are damaged, or of another network"
            )
        return embeddings

    with closing(_in_order(embed, range(0, len(crops), how.batch), how.threads)) as results:
        yield from results


def _in_order(
    work: Callable[[int], NDArray[np.float32]], starts: range, threads: int
) -> Generator[tuple[int, NDArray[np.float32]]]:
    """Yield results in order, with no more than two a thread waiting to be taken."""
    waiting: deque[tuple[int, Future[NDArray[np.float32]]]] = deque()
    with ThreadPoolExecutor(threads, "embed") as pool:
        try:
            for start in starts:
                waiting.append((start, pool.submit(work, start)))
                if len(waiting) > 2 * threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

"""Which images an export takes out of those that can be used, and what to make where they are too few."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import ConfigError

# What random yields may fall short of their mean, so that one growth is mostly enough.
_MARGIN = 1.1


class Selection(NamedTuple):
    """The chosen images, and what was there to choose from.

    `identities` `(N,)` int64 ascend; `chosen` `(N, R)` bool are their images. Of all identities `short` have
    fewer images than are `needed`, `missing` images together. `lacking` more identities were asked for than
    there are.
    """

    identities: NDArray[np.int64]
    chosen: NDArray[np.bool_]
    needed: int
    short: int
    missing: int
    lacking: int


def select(usable: NDArray[np.bool_], least: int, exactly: int, identities: int) -> Selection:
    """Choose images out of the `usable` `(I, R)`: the first ones, by number, of the first identities.

    Args:
        usable: images that can be taken.
        least: identities with fewer are left out.
        exactly: how many images are taken of each, 0 for all; identities with fewer are left out.
        identities: how many identities are taken, 0 for all.

    Raises:
        ConfigError: if no image is usable, so that more would be as useless.
    """
    counts = usable.sum(axis=1)
    if not counts.any():
        raise ConfigError(
            "none of the images can be used, and more would be no better: look at the report of the run, and "
            "at what is asked of status, quality and cosine"
        )
    needed = max(least, exactly, 1)
    enough = np.flatnonzero(counts >= needed)
    short = counts[counts < needed]
    taken = enough[:identities] if identities else enough
    chosen = usable[taken]
    if exactly:
        chosen = chosen & (np.cumsum(chosen, axis=1) <= exactly)
    return Selection(
        identities=taken,
        chosen=chosen,
        needed=needed,
        short=len(short),
        missing=int((needed - short).sum()),
        lacking=max(0, identities - len(enough)),
    )


def grown_extent(
    usable: NDArray[np.bool_], needed: int, wanted: int, block: tuple[int, int]
) -> tuple[int, int]:
    """Return identities and images of each to make, so that `wanted` identities may have `needed` images.

    Of more identities and of more images of each, that with fewer new blocks is taken, by the share of images
    that is usable so far; some of them are. `block` is identities x images of what is made at a time.
    """
    counts, images = usable.sum(axis=1), usable.shape[1]
    enough = counts >= needed
    options: list[tuple[int, int]] = []
    if enough.any():
        more = math.ceil(_MARGIN * (wanted - enough.sum()) / enough.mean())
        options.append((len(counts) + max(1, more), images))
    # the identities that are nearest to enough, by what each has yielded so far
    rates = np.sort(counts / images)[::-1][: min(wanted, len(counts))]
    if len(counts) >= wanted and rates[-1] > 0:
        options.append((len(counts), max(images + 1, math.ceil(_MARGIN * needed / rates[-1]))))
    if not options:
        options.append((wanted, math.ceil(_MARGIN * needed * images / counts.mean())))
    whole = [tuple(math.ceil(n / size) * size for n, size in zip(one, block, strict=True)) for one in options]
    best = min(whole, key=lambda extent: extent[0] * extent[1])
    return best[0], best[1]

"""Identities that are told apart: no two contexts closer than a bound (as in DCFace, arXiv 2304.07060)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.contexts.vectors import Contexts, closest, lowest_worst_cosine
from negfacediff_core.errors import ContextsError

#: Contexts `(N, W)` of identity numbers `(N,)`, each at an attempt `(N,)`: 0 is the first draw.
Draw = Callable[[NDArray[np.int64], NDArray[np.int64]], Contexts]

#: Draws of an identity before it is given up.
ATTEMPTS = 100
# Identities that are compared with all earlier ones in one product.
BLOCK = 256


class Unique(NamedTuple):
    """`contexts` `(N, W)` float32, and how many draws of each identity `(N,)` int64 were thrown away."""

    contexts: Contexts
    attempts: NDArray[np.int64]


def draw_unique(draw: Draw, count: int, max_cosine: float) -> Unique:
    """Draw identities 0 to `count` - 1 with all cosines below `max_cosine`, in (-1, 1].

    Identity i is its first draw that is far enough from every identity before it: a function of what `draw`
    depends on, and never of `count`. Raises ContextsError, naming the identity and what it reached, when one
    finds no place in ATTEMPTS draws.
    """
    attempts = np.zeros(count, np.int64)
    contexts = draw(np.arange(count), attempts)
    rows = contexts.astype(np.float64)
    reached = np.full(count, np.inf)

    def redraw(which: NDArray[np.int64], nearest: NDArray[np.float64]) -> None:
        reached[which] = np.minimum(reached[which], nearest)
        attempts[which] += 1
        if (attempts[which] == ATTEMPTS).any():
            raise _no_place(which[attempts[which] == ATTEMPTS][0], count, max_cosine, reached)
        contexts[which] = draw(which, attempts[which])
        rows[which] = contexts[which]

    for start in range(0, count, BLOCK):
        block = np.arange(start, min(start + BLOCK, count))
        # first apart from all earlier blocks, in one product; then one by one apart from each other
        close = block
        while close.size:
            nearest = (rows[close] @ rows[:start].T).max(axis=1, initial=-1.0)
            close, nearest = close[nearest >= max_cosine], nearest[nearest >= max_cosine]
            redraw(close, nearest)
        for row in block:
            first = start
            while (near := (rows[first:row] @ rows[row]).max(initial=-1.0)) >= max_cosine:
                redraw(np.array([row]), np.array([near]))
                first = 0  # a new draw may lie near anyone
    return Unique(contexts, attempts)


def check_distinct(contexts: Contexts, max_cosine: float) -> None:
    """Raise ContextsError, naming the closest pair, unless all cosines of `(N, W)` are below `max_cosine`."""
    near = closest(contexts)
    row = int(near.cosine.argmax())
    if near.cosine[row] >= max_cosine:
        raise ContextsError(
            f"identities {row} and {near.other[row]} have a cosine of {near.cosine[row]:.4f}, but "
            f"contexts.max_cosine is {max_cosine:g} ({(near.cosine >= max_cosine).sum()} of {len(contexts)} "
            "identities have one that close): take one of each pair out, or raise the bound"
        )


def check_possible(count: int, width: int, max_cosine: float) -> None:
    """Raise ContextsError if no `count` unit vectors in `width` dimensions can all be below `max_cosine`."""
    lowest = lowest_worst_cosine(count, width)
    if max_cosine <= lowest:
        raise ContextsError(
            f"contexts.max_cosine is {max_cosine:g}, but no {count} directions in {width} dimensions have "
            f"all their cosines below {lowest:.4g}: raise it, or ask for fewer identities"
        )


def _no_place(row: int, count: int, max_cosine: float, reached: NDArray[np.float64]) -> ContextsError:
    return ContextsError(
        f"contexts.max_cosine is {max_cosine:g}, but identity {row} of {count} found no place: in {ATTEMPTS} "
        f"draws its nearest earlier identity was never below a cosine of {reached[row]:.3f}; a bound above "
        "that lets it in: raise the bound, ask for fewer identities, or take the source packed"
    )

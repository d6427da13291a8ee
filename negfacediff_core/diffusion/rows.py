"""What the images of a call are made from, one row an image."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import ContextsError


class Rows(NamedTuple):
    """Contexts, negatives with their shares of the weight, and the names of the noise, one row an image."""

    contexts: NDArray[np.float32] | None  # (N, W); None: the empty context
    negatives: NDArray[np.float32] | None  # (N, K, W); None: no negative
    shares: NDArray[np.float32] | None  # (N, K)
    identities: NDArray[np.int64]
    replicates: NDArray[np.int64]

    def filled(self, start: int, size: int) -> "Rows":
        """`size` rows from `start` on; the last one is repeated where there are no more."""
        rows = np.minimum(np.arange(start, start + size), len(self.identities) - 1)
        return Rows(
            None if self.contexts is None else self.contexts[rows],
            None if self.negatives is None else self.negatives[rows],
            None if self.shares is None else self.shares[rows],
            self.identities[rows],
            self.replicates[rows],
        )


def check_rows(rows: Rows, width: int, w: float) -> None:
    """Raise `ContextsError` unless the arrays are finite and fit together and a generator.

    `width` is that of the generator's contexts, `w` the weight of the negatives: unless it is 0,
    there must be some.
    """
    count = len(rows.identities)
    if len(rows.replicates) != count:
        raise ContextsError(f"{count} identities and {len(rows.replicates)} replicates do not pair up.")
    for name, numbers in (("identities", rows.identities), ("replicates", rows.replicates)):
        if count and not (numbers.min() >= 0 and numbers.max() < 1 << 32):
            raise ContextsError(
                f"The {name} must lie in [0, 2^32), but reach from {numbers.min()} to {numbers.max()}."
            )
    negatives = 0 if rows.negatives is None else rows.negatives.shape[1]
    for name, values, expected in (
        ("contexts", rows.contexts, (count, width)),
        ("negatives", rows.negatives, (count, negatives, width)),
        ("shares", rows.shares, (count, negatives)),
    ):
        if values is None:
            continue
        if values.shape != expected:
            raise ContextsError(f"The {name} have shape {values.shape}; these images need {expected}.")
        unusable = ~np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
        if unusable.any():
            raise ContextsError(
                f"The {name} hold NaN or infinity, first for identity {rows.identities[unusable][0]}."
            )
    if (rows.negatives is None) != (rows.shares is None):
        raise ContextsError("Negatives and their shares belong together; give both or neither.")
    if rows.negatives is None and w != 0.0:
        raise ContextsError(f"The negative weight is {w} but no negatives came; set w to 0.")
    if rows.negatives is not None and rows.contexts is None:
        raise ContextsError("Negatives came without contexts; give both or neither.")

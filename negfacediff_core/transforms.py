"""Per-image transforms of a context, which give the images of one identity more variety.

A transform is a function of (seed, identity, replicate) alone, like the noise of the image itself.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.contexts import Contexts, normalise
from negfacediff_core.noise import TRANSFORMS as STREAM
from negfacediff_core.noise import gaussian, uniform

_SHARE, _DIRECTION = 0, 1


def idperturb(
    contexts: Contexts,
    seed: int,
    identities: NDArray[np.int64],
    replicates: NDArray[np.int64],
    lower_bound: NDArray[np.float64],
) -> Contexts:
    """Turn each unit context v by a random angle (IDperturb, arXiv 2602.18831).

    v' = s v + sqrt(1 - s^2) u, with s ~ U[lb, 1], n ~ N(0, I) and u = (n - <n, v> v) / |n - <n, v> v|, so
    that the cosine of v' and v is s. `contexts` is `(N, W)` with W >= 2, one row an image; `lower_bound`
    `(N,)` in [0, 1] is lb, the lowest cosine.
    """
    v = contexts.astype(np.float64)
    draw = uniform(seed, identities, replicates, _SHARE, (1,), stream=STREAM).numpy()
    s = lower_bound[:, None] + (1.0 - lower_bound[:, None]) * draw
    n = gaussian(seed, identities, replicates, _DIRECTION, (v.shape[1],), stream=STREAM).numpy()
    u = n - (n * v).sum(axis=1, keepdims=True) * v
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    return normalise(s * v + np.sqrt(1.0 - s**2) * u)


def safe_lower_bound(lower_bound: float, nearest: NDArray[np.floating]) -> NDArray[np.float64]:
    """Raise lb to cos(angle / 2), where `nearest` `(N,)` is the cosine to the nearest other identity.

    A context then never leaves the half of the way to another identity that is its own (arXiv 2602.18831).
    """
    half_way = np.sqrt((1.0 + np.clip(nearest.astype(np.float64), -1.0, 1.0)) / 2.0)
    return np.maximum(lower_bound, half_way)


Transform = Callable[
    [Contexts, int, NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]],
    Contexts,
]

TRANSFORMS: dict[str, Transform] = {"idperturb": idperturb}

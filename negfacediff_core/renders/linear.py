"""Small linear maps with a fixed order of summation.

A BLAS splits its sums by the number of threads, which may differ between two processes on one machine, and a
vertex that moves by one unit in the last place can change which triangle covers a pixel.
"""

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.renders.texture import compiled


def weighted_sum(weights: NDArray[np.float32], shapes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum `shapes` `(K, V, 3)` with `weights` `(K,)`: `(V, 3)`."""
    total = np.zeros(shapes.shape[1:], np.float32)
    _add_weighted(weights, shapes, total)
    return total


@compiled
def _add_weighted(
    weights: NDArray[np.float32], shapes: NDArray[np.float32], total: NDArray[np.float32]
) -> None:
    for k in range(len(weights)):
        if weights[k] == 0.0:
            continue
        for v in range(total.shape[0]):
            for axis in range(3):
                total[v, axis] += weights[k] * shapes[k, v, axis]


def rotate(vertices: NDArray[np.float32], rotation: NDArray[np.float64]) -> NDArray[np.float32]:
    """Apply a `(3, 3)` rotation to each of `(V, 3)` vertices."""
    x, y, z = vertices.T
    return np.stack([a * x + b * y + c * z for a, b, c in rotation.astype(np.float32)], axis=1)

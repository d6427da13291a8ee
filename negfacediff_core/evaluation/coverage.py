"""How well a set of contexts covers the sphere on which contexts lie, against directions drawn evenly."""

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc


def effective_dimensions(contexts: NDArray[np.float32], block: int = 4096) -> float:
    """1 / mean squared cosine of two different contexts `(N, W)`, N >= 2: W for directions drawn evenly.

    The mean over pairs is (|X^T X|^2 - N) / (N (N - 1)), the frame potential (Benedetto and Fickus, Adv.
    Comput. Math. 18, 2003) without its diagonal; its inverse is the participation ratio of the second
    moments, free of the bias of few contexts. Contexts in a cone, or in a subspace, have fewer dimensions;
    contexts spread more evenly than chance have more, and an orthogonal set has infinitely many. Costs N W^2.
    """
    count, width = contexts.shape
    moments = np.zeros((width, width))
    for start in range(0, count, block):
        rows = contexts[start : start + block].astype(np.float64)
        moments += rows.T @ rows
    mean_square = ((moments**2).sum() - count) / (count * (count - 1))
    return float(1 / mean_square) if mean_square > 0 else np.inf


def expected_nearest_cosine(count: int, width: int, points: int = 20_001) -> float:
    """Mean cosine of a direction to the nearest of `count` - 1 others, all drawn evenly in `width`
    dimensions.

    The cosine of two has P(t) = (1 + sign(t) I(t^2; 1/2, (W - 1) / 2)) / 2, I the regularised incomplete beta
    function, and the largest of n has P(t)^n, so that its mean is 1 - the integral of P(t)^n over [-1, 1].
    Taken at `points` points by the trapezoidal rule.
    """
    t = np.linspace(-1.0, 1.0, points)
    below = (1 + np.sign(t) * betainc(0.5, (width - 1) / 2, t**2)) / 2
    return float(1 - np.trapezoid(below ** (count - 1), t))

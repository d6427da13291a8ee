"""Where the DPM-Solvers spend their evaluations: timesteps from T - 1 downwards, by the half log-SNR lambda.

lambda_t = log(alpha_t / sigma_t) falls with t. A step is as hard as its distance in lambda is long, and where
lambda moves fast, near pure noise and near the clean latent, steps that are even in time are few.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Curvature of Karras' spacing: larger ones take more of the steps where little noise is left.
_RHO = 7.0


def _time(lambdas: Floats, steps: int) -> Floats:
    """T - 1, ... in equal steps, the last of which would be 0."""
    return np.linspace(len(lambdas) - 1, 0, steps + 1)[:-1]


def _log_snr(lambdas: Floats, steps: int) -> Floats:
    """Equal steps of lambda, the last of which would be at t = 0 (arXiv 2206.00927, section 3.4)."""
    return _nearest(lambdas, np.linspace(lambdas[-1], lambdas[0], steps + 1)[:-1])


def _karras(lambdas: Floats, steps: int) -> Floats:
    """Equal steps of (sigma / alpha)^(1/7), the last of which would be at t = 0 (arXiv 2206.00364, eq. 5)."""
    first, last = np.exp(-lambdas[-1] / _RHO), np.exp(-lambdas[0] / _RHO)
    return _nearest(lambdas, -_RHO * np.log(np.linspace(first, last, steps + 1)[:-1]))


def _nearest(lambdas: Floats, wanted: Floats) -> Floats:
    return np.abs(lambdas - wanted[:, None]).argmin(axis=1).astype(np.float64)


SPACINGS: dict[str, Callable[[Floats, int], Floats]] = {"karras": _karras, "log_snr": _log_snr, "time": _time}


def spaced_timesteps(spacing: str, lambdas: Floats, steps: int) -> list[int]:
    """Return `steps` distinct timesteps, falling from T - 1, for `lambdas` `(T,)` that fall with t.

    `spacing` is a row of SPACINGS. Where so many steps are asked for, 1 to T, that two would meet, they are
    moved apart by as little as possible.
    """
    T = len(lambdas)
    timesteps = np.round(SPACINGS[spacing](lambdas, steps)).astype(int)
    place = np.arange(steps)
    # t + place may not rise along the list, nor t fall below what the steps after it need
    falling = np.minimum.accumulate(np.minimum(timesteps, T - 1) + place) - place
    needed = steps - 1 - place
    return np.maximum(falling, needed).tolist()

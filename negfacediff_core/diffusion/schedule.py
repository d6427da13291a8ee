"""Noise schedules: how much of a latent is noise at each timestep.

Everything is computed in float64 and only cast where it meets the network, because alpha-bar spans five
decades.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from negfacediff_core.errors import ConfigError

COSINE_OFFSET = 0.008


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The forward process x_t = sqrt(ab[t]) x_0 + sqrt(1 - ab[t]) eps for t in 0 .. T-1 (arXiv 2006.11239).

    `betas` is `(T,)` float64 on the CPU; everything else follows from it.
    """

    betas: Tensor

    @property
    def T(self) -> int:
        """Number of timesteps."""
        return len(self.betas)

    @property
    def alphas(self) -> Tensor:
        """1 - beta, `(T,)` float64."""
        return 1.0 - self.betas

    @property
    def alpha_bars(self) -> Tensor:
        """Cumulative product of the alphas, `(T,)` float64: the share of the signal's power that is left."""
        return torch.cumprod(self.alphas, dim=0)

    def buffers(self) -> dict[str, Tensor]:
        """The float32 constants that an IDiff-Face checkpoint carries beside the network, in its order."""
        alphas, alpha_bars = self.alphas, self.alpha_bars
        constants = {
            "betas": self.betas,
            "alphas": alphas,
            "sigmas": self.betas.sqrt(),
            "sqrt_alphas_inv": alphas.rsqrt(),
            "alpha_bars": alpha_bars,
            "sqrt_alpha_bars": alpha_bars.sqrt(),
            "sqrt_one_minus_alpha_bars": (1.0 - alpha_bars).sqrt(),
            "one_minus_alphas_over_sqrt_one_minus_alpha_bars": self.betas / (1.0 - alpha_bars).sqrt(),
        }
        return {name: constant.float() for name, constant in constants.items()}


def linear(T: int) -> NoiseSchedule:
    """Betas from 1e-4 to 0.02 in equal steps, scaled by 1000 / T (arXiv 2006.11239)."""
    scale = 1000.0 / T
    return NoiseSchedule(torch.linspace(scale * 1e-4, scale * 0.02, T, dtype=torch.float64))


def cosine(T: int, beta_max: float = 0.1) -> NoiseSchedule:
    """beta_t = 1 - f(t + 1) / f(t), at most beta_max, f(t) = cos((t/T + s) / (1 + s) pi/2)^2, s = .008.

    The schedule of arXiv 2102.09672, which IDiff-Face clips at 0.1.
    """
    return cosine_warped(T, 1.0, 0.0, beta_max)


def cosine_warped(T: int, k: float = 1.0, beta_min: float = 0.0, beta_max: float = 0.1) -> NoiseSchedule:
    """The cosine schedule with its time warped, f(t) = cos((t/T + s) / (1 + s)^k pi/2)^2, and betas in
    [beta_min, beta_max] (arXiv 2308.04995): a larger k ends with more of the signal left.
    """
    t = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((t + COSINE_OFFSET) / (1 + COSINE_OFFSET) ** k * (torch.pi / 2)).square()
    return NoiseSchedule((1.0 - f[1:] / f[:-1]).clamp(beta_min, beta_max))


class Kind(NamedTuple):
    """A row of the table: the schedule, and the `schedule_*` keys of a release that it reads."""

    schedule: Callable[..., NoiseSchedule]
    options: tuple[str, ...] = ()


SCHEDULES: dict[str, Kind] = {
    "linear": Kind(linear),
    "cosine": Kind(cosine, ("beta_max",)),
    "cosine_warped": Kind(cosine_warped, ("k", "beta_min", "beta_max")),
}


def schedule_from_config(config: Mapping[str, Any]) -> NoiseSchedule:
    """Build the schedule that the `diffusion` section of a release describes: `T`, `schedule_type`,
    `schedule_*`.

    The case of the type does not matter. Raises `ConfigError` for an unknown type, an impossible T, or
    numbers that no schedule has.
    """
    kind, T = config.get("schedule_type", "linear"), config.get("T", 1000)
    if not isinstance(kind, str) or kind.lower() not in SCHEDULES:
        raise ConfigError(
            f"diffusion.schedule_type is {kind!r}; choose one of {', '.join(sorted(SCHEDULES))}."
        )
    if not isinstance(T, int) or not 21 <= T < 1 << 24:
        raise ConfigError(f"diffusion.T is {T!r}; it must be a whole number of timesteps from 21 to 2^24.")
    schedule, names = SCHEDULES[kind.lower()]
    given = {name: config.get(f"schedule_{name}") for name in names}
    options = {name: _number(name, value) for name, value in given.items() if value is not None}
    beta_min, beta_max = options.get("beta_min", 0.0), options.get("beta_max", 0.1)
    if not (0 <= beta_min < beta_max < 1 and options.get("k", 1.0) > 0):
        raise ConfigError(
            f"diffusion.schedule_beta_min is {beta_min:g}, schedule_beta_max {beta_max:g} and schedule_k "
            f"{options.get('k', 1.0):g}; they must be 0 <= beta_min < beta_max < 1 and k > 0."
        )
    return schedule(T, **options)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"diffusion.schedule_{name} is {value!r}; it must be a finite number.")
    return float(value)

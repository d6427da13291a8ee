"""Samplers: from noise to a latent, given a function that predicts the noise.

Each sampler is one function of `eps_model(x, t) -> eps`, a start `x` `(N, ...)` drawn from N(0, I) and a
schedule. None knows of guidance, contexts or files. `noise(t)` returns the standard normal numbers to add
at timestep t, of the shape of `x`. `callback(done, t, x)` is called after each step with the number of
steps done, the timestep and the new `x`. Latents are not clipped. Constants are float64 numbers on the
host, so that no step waits for a device.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from torch import Tensor

from negfacediff_core.diffusion.schedule import NoiseSchedule
from negfacediff_core.diffusion.spacing import SPACINGS, spaced_timesteps
from negfacediff_core.errors import ConfigError

EpsModel = Callable[[Tensor, int], Tensor]
Noise = Callable[[int], Tensor]
Callback = Callable[[int, int, Tensor], None]


def _no_callback(done: int, t: int, x: Tensor) -> None:
    pass


def ddpm(
    eps_model: EpsModel,
    x: Tensor,
    schedule: NoiseSchedule,
    noise: Noise,
    final_noise: str = "exact",
    callback: Callback = _no_callback,
) -> Tensor:
    """Ancestral sampling over all T timesteps (arXiv 2006.11239, algorithm 2, sigma_t^2 = beta_t).

    x_{t-1} = (x_t - beta_t / sqrt(1 - ab_t) eps) / sqrt(alpha_t) + sqrt(beta_t) z, with z = 0 at t = 0.
    `final_noise="paper"` also leaves out the noise at t = 1, as the published code of arXiv 2508.09661 does.
    """
    _check_form("final_noise", final_noise)
    last_with_noise = 1 if final_noise == "exact" else 2
    alpha_bars, betas = schedule.alpha_bars.tolist(), schedule.betas.tolist()
    for done, t in enumerate(reversed(range(schedule.T)), start=1):
        beta = betas[t]
        x = (x - beta / math.sqrt(1.0 - alpha_bars[t]) * eps_model(x, t)) / math.sqrt(1.0 - beta)
        if t >= last_with_noise:
            x = x + math.sqrt(beta) * noise(t)
        callback(done, t, x)
    return x


def ddim_timesteps(T: int, steps: int, ddim_alpha: str = "exact") -> list[int]:
    """The timesteps that DDIM visits, in ascending order from 0.

    Exact: floor(i T / steps), always `steps` of them. Paper: every (T // steps)-th, which is more than
    `steps` where `steps` does not divide T (30 of 1,000 become 31). Raises `ConfigError` for steps outside
    1 .. T.
    """
    if not 1 <= steps <= T:
        raise ConfigError(f"The sampler was asked for {steps} steps; this generator takes 1 to {T}.")
    if ddim_alpha == "paper":
        return list(range(0, T, T // steps))
    return [i * T // steps for i in range(steps)]


def ddim(
    eps_model: EpsModel,
    x: Tensor,
    schedule: NoiseSchedule,
    noise: Noise,
    steps: int = 200,
    eta: float = 0.0,
    ddim_alpha: str = "exact",
    callback: Callback = _no_callback,
) -> Tensor:
    """Denoising diffusion implicit sampling (arXiv 2010.02502, equations 12 and 16).

    x_prev = sqrt(ab_prev) x0 + sqrt(1 - ab_prev - sigma^2) eps + sigma z
    x0     = (x - sqrt(1 - ab_t) eps) / sqrt(ab_t)
    sigma  = eta sqrt((1 - ab_prev) / (1 - ab_t)) sqrt(1 - ab_t / ab_prev)

    with ab_prev = 1 in the last step. `ddim_alpha="paper"` takes ab_prev one timestep too early,
    ab[t - skip - 1] in place of ab[t - skip], as the published code of arXiv 2508.09661 does: there the
    latent is clean one network call before the end.
    """
    _check_form("ddim_alpha", ddim_alpha)
    timesteps = ddim_timesteps(schedule.T, steps, ddim_alpha)
    shift = 1 if ddim_alpha == "paper" else 0
    alpha_bars = schedule.alpha_bars.tolist()
    for done, i in enumerate(reversed(range(len(timesteps))), start=1):
        t = timesteps[i]
        previous = timesteps[i - 1] - shift if i > 0 else -1
        ab, ab_prev = alpha_bars[t], alpha_bars[previous] if previous >= 0 else 1.0
        sigma = eta * math.sqrt((1.0 - ab_prev) / (1.0 - ab) * (1.0 - ab / ab_prev))
        eps = eps_model(x, t)
        x0 = (x - math.sqrt(1.0 - ab) * eps) / math.sqrt(ab)
        x = math.sqrt(ab_prev) * x0 + math.sqrt(1.0 - ab_prev - sigma**2) * eps
        if sigma > 0.0:
            x = x + sigma * noise(t)
        callback(done, t, x)
    return x


def dpm_solver(
    eps_model: EpsModel,
    x: Tensor,
    schedule: NoiseSchedule,
    noise: Noise,
    steps: int = 20,
    spacing: str = "karras",
    callback: Callback = _no_callback,
) -> Tensor:
    """DPM-Solver++(2M), deterministic (arXiv 2211.01095, algorithm 2), from t = T - 1 down to the clean
    latent.

    With alpha = sqrt(ab), sigma = sqrt(1 - ab), lambda = log(alpha / sigma) and h = lambda_next - lambda_t:
    x_next = (sigma_next / sigma_t) x - alpha_next (e^-h - 1) D, where D is the clean latent predicted at t,
    extrapolated linearly in lambda by the one before it. The last step goes to sigma = 0, where x is that
    prediction. `spacing` is a row of `spacing.SPACINGS`; `noise` is not used.
    """
    timesteps, alphas, sigmas, lambdas = _half_log_snr_grid("dpm_solver", schedule, steps, spacing)
    before, h_before = x, 0.0
    for done, t in enumerate(timesteps, start=1):
        clean = (x - sigmas[t] * eps_model(x, t)) / alphas[t]
        if done == steps:
            x = clean
        else:
            after = timesteps[done]
            h = lambdas[after] - lambdas[t]
            extrapolated = clean if done == 1 else clean + (h / (2.0 * h_before)) * (clean - before)
            x = (sigmas[after] / sigmas[t]) * x - alphas[after] * math.expm1(-h) * extrapolated
            before, h_before = clean, h
        callback(done, t, x)
    return x


def dpm_solver_2s(
    eps_model: EpsModel,
    x: Tensor,
    schedule: NoiseSchedule,
    noise: Noise,
    steps: int = 20,
    spacing: str = "karras",
    callback: Callback = _no_callback,
) -> Tensor:
    """DPM-Solver++(2S), deterministic (arXiv 2211.01095, algorithm 1), `steps` network calls.

    Calls come in pairs. From s, where the clean latent D_s is predicted, a first-order step leads to the next
    timestep m, whose prediction D_m corrects a step from s over both to t:
    x_t = (sigma_t / sigma_s) x_s - alpha_t (e^-h - 1) (D_s + h / (2 h_m) (D_m - D_s)), h = lambda_t -
    lambda_s, h_m = lambda_m - lambda_s. Steps that are left over, and the last, which goes to sigma = 0, are
    of first order. Notation and timesteps are those of `dpm_solver`; `noise` is not used.
    """
    timesteps, alphas, sigmas, lambdas = _half_log_snr_grid("dpm_solver_2s", schedule, steps, spacing)
    pair: tuple[int, Tensor, Tensor] | None = None  # timestep, latent and prediction where a pair began
    for done, t in enumerate(timesteps, start=1):
        clean = (x - sigmas[t] * eps_model(x, t)) / alphas[t]
        if done == steps:
            x = clean
        else:
            after = timesteps[done]
            s, x_s, direction = (t, x, clean) if pair is None else pair
            h = lambdas[after] - lambdas[s]
            if pair is None:
                pair = (t, x, clean) if done + 1 < steps else None
            else:
                direction = direction + h / (2.0 * (lambdas[t] - lambdas[s])) * (clean - direction)
                pair = None
            x = (sigmas[after] / sigmas[s]) * x_s - alphas[after] * math.expm1(-h) * direction
        callback(done, t, x)
    return x


def _half_log_snr_grid(
    name: str, schedule: NoiseSchedule, steps: int, spacing: str
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Timesteps of a DPM-Solver from T - 1 downwards; alpha, sigma and lambda of every timestep of T."""
    if not 1 <= steps < schedule.T:
        raise ConfigError(f"{name} was asked for {steps} steps; this generator takes 1 to {schedule.T - 1}.")
    if spacing not in SPACINGS:
        raise ConfigError(f"spacing is {spacing!r}; choose one of {', '.join(SPACINGS)}.")
    alpha_bars = schedule.alpha_bars.tolist()
    alphas, sigmas = [math.sqrt(ab) for ab in alpha_bars], [math.sqrt(1.0 - ab) for ab in alpha_bars]
    lambdas = [math.log(alpha / sigma) for alpha, sigma in zip(alphas, sigmas, strict=True)]
    timesteps = spaced_timesteps(spacing, np.array(lambdas), steps)
    return timesteps, alphas, sigmas, lambdas


def _check_form(name: str, form: str) -> None:
    if form not in ("exact", "paper"):
        raise ConfigError(f"{name} is {form!r}; choose exact or paper.")


class Sampler(NamedTuple):
    """A row of the table: the sampler, the names of its options, and the most steps that it takes of T."""

    sample: Callable[..., Tensor]
    options: tuple[str, ...]
    most_steps: Callable[[int], int]


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(ddim, ("steps", "eta", "ddim_alpha"), lambda T: T),
    "ddpm": Sampler(ddpm, ("final_noise",), lambda T: T),
    "dpm_solver": Sampler(dpm_solver, ("steps", "spacing"), lambda T: T - 1),
    "dpm_solver_2s": Sampler(dpm_solver_2s, ("steps", "spacing"), lambda T: T - 1),
}

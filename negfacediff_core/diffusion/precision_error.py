"""How far a number format strays from float32: in the network's predictions, and in finished images."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from negfacediff_core.diffusion.acceleration import relative_difference
from negfacediff_core.diffusion.checkpoint import Generator
from negfacediff_core.diffusion.engine import SamplerSettings, SamplingEngine
from negfacediff_core.diffusion.precision import products_in
from negfacediff_core.noise import gaussian

# where on the way from noise (1) to clean latents (0) predictions are compared
_AT = (0.9, 0.5, 0.1)


class PrecisionError(NamedTuple):
    """`eps` is the largest relative difference of predictions; `most` and `mean` are grey levels, of 255."""

    eps: float
    most: int
    mean: float


def precision_error(
    generator: Generator,
    settings: SamplerSettings,
    precision: str,
    contexts: NDArray[np.float32],
    negatives: NDArray[np.float32],
    seed: int = 0,
) -> PrecisionError:
    """Compare `precision` with fp32 on the generator's device.

    `contexts` and `negatives` are `(N, context width)` float32: one image each is sampled in both formats,
    from the same noise, and the predictions for that noise are compared at three timesteps. Raises
    `ConfigError` where the device lacks the format.
    """
    exact, other = (SamplingEngine(generator, settings, precision=name) for name in ("fp32", precision))
    numbers = np.arange(len(contexts))
    rows = contexts, negatives[:, None], np.ones((len(contexts), 1), np.float32), numbers, numbers * 0
    first, second = (engine.sample(*rows, seed).images.astype(np.int16) for engine in (exact, other))
    difference = np.abs(first - second)
    return PrecisionError(
        _of_predictions(exact, other, contexts, seed), int(difference.max()), float(difference.mean())
    )


@torch.inference_mode()
def _of_predictions(
    exact: SamplingEngine, other: SamplingEngine, contexts: NDArray[np.float32], seed: int
) -> float:
    generator, count = exact.generator, len(contexts)
    x = gaussian(seed, range(count), [0] * count, generator.schedule.T, generator.latent_shape, exact.device)
    vectors = torch.from_numpy(contexts).to(exact.device)

    def predicted(engine: SamplingEngine, t: int) -> torch.Tensor:
        with products_in(engine.precision, engine.device):
            return engine.unet(x, t, vectors)

    timesteps = [int(at * generator.schedule.T) for at in _AT]
    return max(relative_difference(predicted(other, t), predicted(exact, t)) for t in timesteps)

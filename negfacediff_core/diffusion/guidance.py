"""Guidance with a negative context: a wrapper around the network that samplers call without knowing of it."""

from collections.abc import Callable

import torch
from torch import Tensor

from negfacediff_core.diffusion.blocks import ProjectedContext
from negfacediff_core.diffusion.samplers import EpsModel
from negfacediff_core.diffusion.unet import ConditionalUNet

Weight = Callable[[int], float]


def constant(w: float, T: int) -> Weight:
    """w_t = w (arXiv 2508.09661)."""
    return lambda t: w


def adaptive(w: float, T: int) -> Weight:
    """w_t = w (1 - t/T): nothing at pure noise, all of it at the end (arXiv 2603.29569)."""
    return lambda t: w * (1.0 - t / T)


def reverse(w: float, T: int) -> Weight:
    """w_t = w t/T: the opposite of `adaptive` (arXiv 2603.29569)."""
    return lambda t: w * (t / T)


# from the weight w and the number of timesteps T to the weight of timestep t
WEIGHTS: dict[str, Callable[[float, int], Weight]] = {
    "constant": constant,
    "adaptive": adaptive,
    "reverse": reverse,
}


def negative_guidance(
    unet: ConditionalUNet, context: ProjectedContext, negative: ProjectedContext | None, weight: Weight
) -> EpsModel:
    """eps~ = (1 + w_t) eps(x, t, p+) - w_t eps(x, t, p-) as a function of (x, t) (arXiv 2508.09661).

    `context` and `negative` hold one projected context a row of x. Both predictions come from one batched
    pass of the network. Where w_t is 0, or `negative` is None, only the positive pass is made. A null
    negative is the zero vector sent through `project_context`, which is not the same as no context.
    """
    both = context if negative is None else context.concat(negative)

    def eps_model(x: Tensor, t: int) -> Tensor:
        time = torch.full((1,), t, device=x.device)
        w = 0.0 if negative is None else weight(t)
        if w == 0.0:
            return unet(x, time, context)
        towards, away = unet(torch.cat([x, x]), time, both).chunk(2)
        return torch.lerp(away, towards, 1.0 + w)

    return eps_model

"""Guidance: a wrapper around the network that samplers call without knowing of it.

eps~ = eps(p+) + sum_j w_j(t) (eps(p+) - eps(p_j)),

where the p_j are negative contexts, or the empty context. One negative of weight w is
(1 + w) eps(p+) - w eps(p-), the rule of arXiv 2508.09661; the empty context makes it classifier-free
guidance (arXiv 2207.12598).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from negfacediff_core.diffusion.acceleration import Network
from negfacediff_core.diffusion.blocks import ProjectedContext
from negfacediff_core.diffusion.samplers import EpsModel
from negfacediff_core.errors import ConfigError

#: Points (t / T, factor) of a piecewise linear curve, t / T rising from 0 (clean) to 1 (pure noise).
Curve = tuple[tuple[float, float], ...]

Weight = Callable[[int], float]

#: How a weight moves over the timesteps: w_t = w x curve(t / T). `adaptive` is w (1 - t/T), nothing at pure
#: noise and all of it at the end, and `reverse` w t/T (arXiv 2603.29569).
WEIGHTS: dict[str, Curve] = {
    "constant": ((0.0, 1.0), (1.0, 1.0)),
    "adaptive": ((0.0, 1.0), (1.0, 0.0)),
    "reverse": ((0.0, 0.0), (1.0, 1.0)),
}


def parse_curve(text: str) -> Curve:
    """Read "0:1 0.5:1 0.5:0 1:0": points t/T:factor, t/T rising from 0 to 1.

    Two points at one t/T make a jump, and the later one holds there. Raises `ConfigError`.
    """
    try:
        points = tuple((float(u), float(factor)) for u, factor in (p.split(":") for p in text.split()))
    except ValueError:
        points = ()
    at = [u for u, _ in points]
    within = all(0 <= factor <= 1 for _, factor in points)
    if len(points) < 2 or at[0] != 0 or at[-1] != 1 or at != sorted(at) or not within:
        raise ConfigError(
            f"samples.curve is {text!r}: give points t/T:factor with t/T rising from 0 to 1 and factors from "
            "0 to 1, such as '0:1 0.5:1 1:0'."
        )
    return points


def weight_over_time(
    w: float, T: int, curve: Curve = WEIGHTS["constant"], interval: tuple[float, float] = (0.0, 1.0)
) -> Weight:
    """w_t = w x curve(t / T) where t / T lies in `interval`, both ends included, and 0 elsewhere.

    An interval saves the passes outside it, and most of guidance's benefit lies in the middle (arXiv
    2404.07724).
    """
    at, factors = zip(*curve, strict=True)
    low, high = interval

    def weight(t: int) -> float:
        u = t / T
        return w * float(np.interp(u, at, factors)) if low <= u <= high else 0.0

    return weight


class Term(NamedTuple):
    """A context to be guided away from, one a row of x, and how strongly.

    Row i weighs `weight(t) * share[i]`; `share` `(N,)` splits a weight among several negatives.
    """

    context: ProjectedContext
    weight: Weight
    share: Tensor


def guided(network: Network, context: ProjectedContext, terms: Sequence[Term] = ()) -> EpsModel:
    """eps~ as a function of (x, t): see the head of this file.

    `context` holds one projected context a row of x. All predictions of a timestep come from one batched
    pass of the network, which shares what no context touches and leaves out the terms that weigh nothing. A
    null negative is the zero vector sent through `project_context`, which is not the same as the empty
    context.
    """
    stacked: dict[tuple[int, ...], ProjectedContext] = {}

    def eps_model(x: Tensor, t: int) -> Tensor:
        weights = [term.weight(t) for term in terms]
        active = tuple(i for i, w in enumerate(weights) if w != 0.0)
        if not active:
            return network(x, t, context)
        if active not in stacked:
            stacked[active] = context.concat(*(terms[i].context for i in active))
        towards, *others = network(x, t, stacked[active]).chunk(1 + len(active))
        eps = towards
        for i, away in zip(active, others, strict=True):
            eps = eps + (weights[i] * terms[i].share)[:, None, None, None] * (towards - away)
        return eps

    return eps_model

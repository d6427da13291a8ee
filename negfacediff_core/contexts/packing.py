"""Contexts spread over the sphere as evenly as gradient descent gets them (HyperFace, arXiv 2411.08470)."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from negfacediff_core.contexts.draws import uniform
from negfacediff_core.contexts.vectors import Contexts, normalise

# Rows of cosines that are held at a time.
BLOCK = 1024
# Sharpness of the soft maximum, from first to last step: a vector at first yields to its whole neighbourhood,
# in the end to its nearest neighbour alone. Ending at 1000, the worst pair of 4,000 x 64 gets closer again.
SHARPNESS = (20.0, 300.0)
# Length of the first step; the steps fall linearly to zero. From 0.2 to 0.8 the results differ by a few
# hundredths, at 17 x 16 (a simplex, which is reached) as at 2,000 x 512.
STEP = 0.5


def packed(seed: int, count: int, width: int, steps: int) -> Contexts:
    """Draw `count` contexts `(count, width)` uniformly and push them apart in `steps` steps."""
    return pack(uniform(seed, np.arange(count), width), steps)


def pack(contexts: Contexts, steps: int) -> Contexts:
    """Push `(N, W)` unit vectors, N >= 2, away from their nearest neighbours; never worse than they came.

    HyperFace minimises mean_i max_{j != i} <c_i, c_j> on the sphere. Here the maximum is soft, and all
    vectors step at once, each down the gradient of its own term at fixed neighbours:

        c_i <- (c_i - s_t g_i) / |c_i - s_t g_i|,    g_i = sum_j p_ij c_j less its part along c_i,
        p_i = softmax over j != i of b_t <c_i, c_j>

    The arrangement of lowest worst-case cosine on the way is returned. A step costs 4 N^2 W operations (about
    4 s at 10,050 x 512) and N x BLOCK numbers of memory. It runs on one thread: in the end one vector's
    rounding moves all the others, and rounding depends on how many threads share a product.
    """
    rows = torch.from_numpy(contexts.copy())
    best, lowest = rows, torch.inf
    with _one_thread(), torch.inference_mode():
        for step in range(steps + 1):
            done = step / max(steps, 1)
            sharpness = SHARPNESS[0] * (SHARPNESS[1] / SHARPNESS[0]) ** done
            gradient, worst = _gradient(rows, sharpness)
            if worst < lowest:
                best, lowest = rows, worst
            rows = torch.nn.functional.normalize(rows - STEP * (1 - done) * gradient, dim=1)
    return normalise(best.numpy())


def _gradient(rows: Tensor, sharpness: float) -> tuple[Tensor, float]:
    """The tangential gradient `(N, W)` of each row's own term, and the largest cosine of any pair."""
    gradient, worst = torch.empty_like(rows), -1.0
    for start in range(0, len(rows), BLOCK):
        part = rows[start : start + BLOCK]
        cosines = part @ rows.T
        cosines.diagonal(start).fill_(-torch.inf)
        worst = max(worst, cosines.max().item())
        towards = cosines.mul_(sharpness).softmax(dim=1) @ rows
        gradient[start : start + BLOCK] = towards - (towards * part).sum(dim=1, keepdim=True) * part
    return gradient, worst


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

"""Counter-based noise: numbers that are a function of (seed, stream, identity, replicate, step, element)
and nothing else.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a 128-bit
counter and a 64-bit key into four 32-bit words. Here the key is the seed and the counter words are

    (element // numbers a block,  stream << 24 | step,  replicate,  identity)

so neither batch size nor order nor the number of workers can change a number, and streams never share one.
The integer part is exact on every device. Logarithm and sine are taken in float64 and rounded to float32 at
the end, so that devices agree to one unit in the last place, and almost always bit for bit.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# purposes of noise, each with numbers of its own
SAMPLES, CONTEXTS, NEGATIVES, TRANSFORMS, AUGMENTATION = 0, 1, 2, 3, 4

MAX_STEP = 1 << 24

Numbers = Tensor | NDArray[np.int64] | Sequence[int]

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four words of Philox 4x32-10.

    `counter` holds four int64 tensors of 32-bit words that broadcast against each other, `key` two 32-bit
    words. The four results are int64 tensors of 32-bit words, of the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # bits 32 to 63 survive the signed overflow; the sign that the shift spreads is masked away
        even, odd = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (odd >> 32).bitwise_xor_(k0).bitwise_xor(c1).bitwise_and_(_WORD)
        c2 = (even >> 32).bitwise_xor_(k1).bitwise_xor(c3).bitwise_and_(_WORD)
        c1, c3 = odd.bitwise_and_(_WORD), even.bitwise_and_(_WORD)
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _words(
    seed: int,
    identities: Numbers,
    replicates: Numbers,
    step: int,
    count: int,
    a_block: int,
    device: torch.device | str,
    stream: int,
) -> tuple[Tensor, ...]:
    """Four `(N, blocks)` tensors of 32-bit words: `count` numbers a row, of which a block gives `a_block`."""
    if not (0 <= seed < 1 << 64 and 0 <= step < MAX_STEP and 0 <= stream < 256):
        raise ValueError(
            f"noise: seed {seed}, step {step} or stream {stream} is not in [0, 2^64), [0, 2^24), [0, 2^8)"
        )
    rows = []
    for name, numbers in (("identities", identities), ("replicates", replicates)):
        row = torch.as_tensor(numbers, dtype=torch.int64)
        # only where it costs nothing: on a GPU the check would wait for the device at every step
        if row.device.type == "cpu" and len(row) and not (row.min() >= 0 and row.max() <= _WORD):
            raise ValueError(
                f"noise: {name} must lie in [0, 2^32), but reach from {row.min()} to {row.max()}"
            )
        rows.append(row.to(device)[:, None])
    identity, replicate = rows
    element = torch.arange(-(-count // a_block), device=device)[None]
    purpose = torch.full((1, 1), stream << 24 | step, device=device)
    return philox4x32((element, purpose, replicate, identity), (seed & _WORD, seed >> 32))


def gaussian(
    seed: int,
    identities: Numbers,
    replicates: Numbers,
    step: int,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    stream: int = SAMPLES,
) -> Tensor:
    """Standard normal numbers `(N, *shape)` float32 on `device`, by the Box-Muller transform.

    `identities` and `replicates` are `(N,)` integers in [0, 2^32); `step` is in [0, 2^24), for samples the
    timestep that the noise is added at, or T for the initial latent; `seed` is in [0, 2^64). |z| is at most
    6.7. Raises `ValueError` outside these ranges.
    """
    w0, w1, w2, w3 = _words(seed, identities, replicates, step, math.prod(shape), 4, device, stream)
    # (0, 1] for the radius, so that the logarithm is finite
    radius = torch.stack([w0, w2], dim=-1).add_(1).double().mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = torch.stack([w1, w3], dim=-1).double().mul_(2.0 * math.pi * 2.0**-32)
    pairs = torch.stack([(radius * angle.cos()).float(), (radius * angle.sin()).float()], dim=-1)
    return pairs.flatten(1)[:, : math.prod(shape)].reshape(len(pairs), *shape)


def uniform(
    seed: int,
    identities: Numbers,
    replicates: Numbers,
    step: int,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    stream: int = SAMPLES,
) -> Tensor:
    """Uniform numbers `(N, *shape)` float64 in [0, 1) with 53 random bits; arguments as in `gaussian`."""
    w0, w1, w2, w3 = _words(seed, identities, replicates, step, math.prod(shape), 2, device, stream)
    high, low = torch.stack([w0, w2], dim=-1), torch.stack([w1, w3], dim=-1)
    numbers = ((high >> 5) * 2**26 + (low >> 6)).double() * 2.0**-53
    return numbers.flatten(1)[:, : math.prod(shape)].reshape(len(numbers), *shape)

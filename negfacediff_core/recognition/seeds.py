"""Random numbers of a training as functions of (seed, purpose, index), so that they are no state of it."""

import numpy as np
import torch


def seed_of(seed: int, purpose: str, *index: int) -> int:
    """A 63-bit seed for one purpose at one index, independent of all others."""
    sequence = np.random.SeedSequence([seed, *purpose.encode(), *index])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_of(seed: int, purpose: str, *index: int) -> torch.Generator:
    """A generator on the CPU with that seed."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, *index))

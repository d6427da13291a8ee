"""Turns on a GPU: one thread of a process evaluates networks there at a time, whatever they are of."""

import threading
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext

import torch

_TURNS: dict[int, threading.RLock] = defaultdict(threading.RLock)


def turn_of(device: torch.device | str) -> AbstractContextManager[object]:
    """Return what a thread holds while it uses a GPU, cuda or cuda:N; it may take it again meanwhile.

    What one thread allocates would break the graph that another captures, and both together might take more
    memory than there is. A CPU has no turns.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return nullcontext()
    return _TURNS[device.index or 0]  # nothing here makes another GPU the current one

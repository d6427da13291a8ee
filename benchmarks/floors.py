"""What a device can do at best, measured, and what the work asks of it: operations, and bytes."""

import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measure import best_seconds
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

#: Sides of the matrices that the matrix rate is measured with, and bytes of the copy for the bandwidth.
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}


def seconds_of(work: Callable[[], Any], device: str, repeats: int = 1) -> float:
    """Return the least time of several calls: of the processor on a CPU, by the clock on a GPU.

    A GPU is waited for before and after; other programs' turns on a CPU are not counted.
    """
    if device == "cpu":
        return best_seconds(work, repeats)
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def matrix_rate(device: str, dtype: torch.dtype, side: int | None = None) -> float:
    """Return the operations a second (two a multiply-add) of a square matrix product of random numbers."""
    side = side or MATRIX_SIDE[device]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(left)
    torch.mm(left, right, out=result)
    return 2 * side**3 / seconds_of(lambda: torch.mm(left, right, out=result), device, 5)


def bandwidth(device: str, size: int | None = None) -> float:
    """Return the bytes a second, read and written, of a copy in the device's memory."""
    source = torch.ones((size or COPY_BYTES[device]) // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device, 5)


def operations_of(work: Callable[[], Any]) -> int:
    """Count the operations of matrix products, convolutions and attention in a call: two a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def floor_seconds(operations: float, bytes_moved: float, rates: dict[str, float], dtype: str) -> float:
    """Return the longer of the two times: for the operations, and for reading and writing memory."""
    return max(operations / rates[dtype], bytes_moved / rates["bytes"])


def peak_bytes(device: str) -> int:
    """Return the most memory in use so far: of the process on a CPU, of the tensors on a GPU."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


def unit_vectors(count: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    """Make random contexts `(count, width)` of length 1."""
    vectors = np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

"""Number formats of the networks while sampling.

A format changes pixels, so that it belongs to what is built and not to how: there is no automatic choice.
Take `fp32` on a CPU, and `bf16` on a GPU or on a CPU that multiplies it in hardware; `tf32` keeps the range
and the weights of float32 where exact products of it are too slow, and `fp16` is for GPUs before compute
capability 8.0. `precision_error` measures how far a format strays.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from negfacediff_core.errors import ConfigError


class Precision(NamedTuple):
    """A number format.

    `dtype` is that of weights and maps; `products` how CUDA multiplies float32, "ieee" or "tf32";
    `capability` the lowest compute capability with hardware for it, `cpu` whether a CPU takes it;
    `tolerance` the relative difference (of Euclidean norms) up to which two kernels that evaluate the network
    in this format count as the same.
    """

    dtype: torch.dtype
    products: str
    capability: tuple[int, int]
    cpu: bool
    tolerance: float


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision(torch.float32, "ieee", (0, 0), True, 1e-4),
    "tf32": Precision(torch.float32, "tf32", (8, 0), False, 1e-2),
    "bf16": Precision(torch.bfloat16, "ieee", (8, 0), True, 5e-2),
    "fp16": Precision(torch.float16, "ieee", (7, 0), False, 1e-2),
}


# PyTorch has one setting for all threads and GPUs of a process.
_PRODUCTS = threading.RLock()


def check_precision(precision: str, device: torch.device | str) -> None:
    """Raise `ConfigError` for an unknown format, or one that the device has no hardware for."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    device = torch.device(device)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        fitting = [key for key, row in PRECISIONS.items() if row.capability <= capability]
        name = torch.cuda.get_device_name(device)
        where = f"{name}, of compute capability {'.'.join(map(str, capability))},"
    else:
        fitting = [key for key, row in PRECISIONS.items() if row.cpu]
        where = "a CPU"
    if precision not in fitting:
        raise ConfigError(
            f"precision is {precision}, which {where} does not have: choose {' or '.join(fitting)}. Another "
            "precision makes other pixels, so that none is taken in its place."
        )


@contextmanager
def products_in(precision: str, device: torch.device) -> Iterator[None]:
    """Let CUDA multiply float32 as the format says within the block; nothing changes on other devices.

    PyTorch convolves in TF32 unless told otherwise, and the setting is one for the whole process: threads
    wait for each other's blocks, whatever their GPU. A thread may take another format for a part of its own.
    """
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    with _PRODUCTS:
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = PRECISIONS[precision].products
            yield
        finally:
            for backend, value in zip(backends, before, strict=True):
                backend.fp32_precision = value

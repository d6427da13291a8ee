"""This machine: its cores, its GPUs, what is installed on it, and how processes are started on it."""

import platform
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import resource_tracker

from negfacediff_core.config import ExecutionConfig
from negfacediff_core.processor import usable_cores as usable_cores

# Packages whose versions can change a pixel or what travels: drivers and workers must agree on them.
COMPARED = ("negfacediff", "torch", "numpy", "onnxruntime", "zarr", "distributed")
# What some of them are called where they are built for GPUs.
_FOR_GPUS = {"onnxruntime": "onnxruntime-gpu"}


def workers_by_cores(execution: ExecutionConfig) -> int:
    """Return how many workers of `execution.threads_per_worker` the cores suffice for; at least 1."""
    return max(1, usable_cores() // execution.threads_per_worker)


def local_workers(execution: ExecutionConfig) -> int:
    """Return how many workers on CPUs of this machine a build has: as many as it asks for, or a core each."""
    return execution.workers or workers_by_cores(execution)


def uses_gpu(device: str) -> bool:
    """Say whether networks run on a GPU here: `device` is auto, cpu, cuda or cuda:N."""
    if device == "auto":
        import torch

        return torch.cuda.is_available()
    return device.startswith("cuda")


def installed_versions() -> dict[str, str]:
    """Return the versions, here, of everything that drivers and workers must agree on."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in COMPARED:
        # CPU and CUDA builds of one release differ in the local part, or the name, alone
        found[package] = _version(package) or _version(_FOR_GPUS.get(package, package)) or "missing"
    return found


def _version(package: str) -> str | None:
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return None


@contextmanager
def shielded_from_interrupts(*further: signal.Signals) -> Iterator[None]:
    """Keep Ctrl-C from the processes, and the threads that start processes, which the block makes.

    A terminal sends it to them all, but it is the flow's process that ends the build and its workers. One
    that comes meanwhile is delivered afterwards. Signals named in `further` are kept from them as well.
    """
    resource_tracker.ensure_running()  # it would lift the block when it is started within
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *further})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

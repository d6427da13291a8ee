"""Where units run. An executor is a context manager that yields a `Pool`; `EXECUTORS` is the table of them.

Pools hand out `concurrent.futures.Future` objects: whoever waits for a unit does not know where it runs. Only
what names a unit travels, and what went wrong with it; results go to the store.
"""

import logging
import os
import platform
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, Protocol

from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import ConfigError

if TYPE_CHECKING:
    from distributed import Client

# Packages whose versions can change a pixel or what travels: drivers and workers must agree on them.
COMPARED = ("negfacediff", "torch", "numpy", "onnxruntime", "zarr", "distributed")
# Seconds without a heartbeat after which a worker is given up. Native code that holds the GIL sends none.
WORKER_TTL = 1800.0
# Units that a GPU has in hand: while one is sampled, the other is read, or encoded and written. The engine
# lets one at a time onto the GPU.
UNITS_PER_GPU = 2
# How long a scheduler may take to answer, and then to have a worker.
CONNECT_SECONDS, WORKER_SECONDS = 10, 30
_CLUSTER: dict[str, Any] = {
    # The operating system shares the memory: a limit per worker would pause units for no reason.
    "memory_limit": 0,
    "dashboard_address": "127.0.0.1:0",
    "silence_logs": logging.CRITICAL,
}


class Submit(Protocol):
    """How work is handed to a pool."""

    def __call__(
        self, function: Callable[..., Any], *args: Any, key: str, gpu: bool = False
    ) -> "Future[None]":
        """Start `function(*args)`; `key` names it, once and for all; `gpu`: it wants the accelerator.

        The future ends when the call has ended, or raises what that raised. What it returned stays where it
        ran: fetching it would double the messages that a unit costs, and the store holds all that counts.
        """


@dataclass(frozen=True)
class Pool:
    """A place where units run: `workers` of them at a time."""

    submit: Submit
    workers: int


def usable_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def uses_gpu(device: str) -> bool:
    """Say whether networks run on a GPU here: `device` is auto, cpu, cuda or cuda:N."""
    if device == "auto":
        import torch

        return torch.cuda.is_available()
    return device.startswith("cuda")


def _local_workers(execution: ExecutionConfig) -> int:
    return execution.workers or max(1, usable_cores() // execution.threads_per_worker)


def check_available(execution: ExecutionConfig, *precisions: str) -> None:
    """Raise ConfigError if this machine, or the scheduler, lacks what `execution` asks for.

    `precisions` are the number formats of the builds; what workers of a remote scheduler have, they say.
    """
    if "://" in execution.executor:
        with _connected(execution.executor):
            return
    if execution.device.startswith("cuda"):
        _count_gpus(f"The device {execution.device}", "the device cpu")
    if execution.executor == "cuda":
        if find_spec("dask_cuda") is None:
            raise ConfigError(
                "The executor cuda needs the package dask-cuda, which is not installed here: "
                "install negfacediff[cuda], or use the executor threads or dask."
            )
        gpus = _count_gpus("The executor cuda", "the executor threads or dask")
        if execution.workers > gpus:
            raise ConfigError(
                f"The executor cuda runs one worker a GPU: {execution.workers} workers were asked for and "
                f"there are {gpus} GPUs. Leave workers at 0 to use them all."
            )
    if precisions:
        from negfacediff_core.diffusion.precision import check_precision
        from negfacediff_core.stages.models import device_of

        for precision in precisions:
            check_precision(precision, device_of(execution.device))


def _count_gpus(what: str, otherwise: str) -> int:
    import torch

    gpus = torch.cuda.device_count()
    if gpus == 0:
        raise ConfigError(
            f"{what} needs an NVIDIA GPU and PyTorch sees none: check nvidia-smi and that PyTorch is a CUDA "
            f"build, or use {otherwise}."
        )
    return gpus


@contextmanager
def threads(execution: ExecutionConfig) -> Iterator[Pool]:
    """Run units in threads of this process. Where there is a GPU, threads of its own feed it."""

    def call(function: Callable[..., Any], args: tuple[Any, ...], key: str, gpu: bool) -> None:
        function(*args)

    gpu_units = UNITS_PER_GPU if uses_gpu(execution.device) else 0
    with _lanes(_local_workers(execution), gpu_units, call) as pool:
        yield pool


@contextmanager
def dask(execution: ExecutionConfig) -> Iterator[Pool]:
    """Run units in local Dask worker processes, one unit a process."""
    from distributed import LocalCluster

    workers = _local_workers(execution)
    with _local_pool(lambda: LocalCluster(n_workers=workers, threads_per_worker=1, **_CLUSTER)) as pool:
        yield pool


@contextmanager
def cuda(execution: ExecutionConfig) -> Iterator[Pool]:
    """Run units in Dask worker processes, one a GPU, each with spare threads for stages without GPU."""
    check_available(execution)
    import torch
    from dask_cuda import LocalCUDACluster

    workers = execution.workers or torch.cuda.device_count()
    spare = max(1, usable_cores() // workers // execution.threads_per_worker)
    with _local_pool(
        lambda: LocalCUDACluster(
            n_workers=workers,
            threads_per_worker=UNITS_PER_GPU + spare,
            resources={"GPU": UNITS_PER_GPU},
            **_CLUSTER,
        )
    ) as pool:
        yield pool


@contextmanager
def address(execution: ExecutionConfig) -> Iterator[Pool]:
    """Run units on the workers of the Dask scheduler whose address `execution.executor` is.

    The scheduler keeps what `_settle` sets, for whatever else it is given.
    """
    with _connected(execution.executor) as client, _dask_pool(client) as pool:
        yield pool


@contextmanager
def _connected(where: str) -> Iterator["Client"]:
    """Yield a client of the scheduler at `where`, which has workers with the versions that are here."""
    from distributed import Client

    try:
        client = Client(where, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"No Dask scheduler answers at {where} ({error}): start one with `dask scheduler`, "
            "or check the address and the network."
        ) from error
    with client:
        _check_workers(client, where)
        yield client


EXECUTORS: dict[str, Callable[[ExecutionConfig], AbstractContextManager[Pool]]] = {
    "threads": threads,
    "dask": dask,
    "cuda": cuda,
    "address": address,
}


def open_pool(execution: ExecutionConfig) -> AbstractContextManager[Pool]:
    """Return the pool that `execution.executor` names; anything with `://` in it is a scheduler's address."""
    return EXECUTORS["address" if "://" in execution.executor else execution.executor](execution)


def installed_versions() -> dict[str, str]:
    """Return the versions, here, of everything that drivers and workers must agree on."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in COMPARED:
        try:
            # CPU and CUDA builds of one release differ in the local part alone
            found[package] = version(package).split("+")[0]
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def _check_workers(client: "Client", where: str) -> None:
    """Refuse a cluster without workers, or with workers on which other versions are installed."""
    from distributed import TimeoutError as DaskTimeoutError

    try:
        client.wait_for_workers(1, timeout=WORKER_SECONDS)
    except (TimeoutError, DaskTimeoutError) as error:
        raise ConfigError(
            f"The Dask scheduler at {where} has no workers after {WORKER_SECONDS} s: start some with "
            f"`dask worker {where}`."
        ) from error
    try:
        workers = client.run(installed_versions)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"The Dask workers at {where} cannot import {error.name}: install the same negfacediff there."
        ) from error
    here = installed_versions()
    for worker, there in sorted(workers.items()):
        differing = [
            f"{name} {there[name]} (here {mine})" for name, mine in here.items() if there[name] != mine
        ]
        if differing:
            raise ConfigError(
                f"The Dask worker {worker} has other versions than this machine: {', '.join(differing)}. "
                "Install the same versions on both; mixed versions could change pixels."
            )


def _settle(client: "Client") -> None:
    """Have the scheduler, wherever it runs, treat units and workers as a build needs it."""

    # Nested, and of nothing but what stands in it: so it travels as code, and needs no negfacediff there.
    def settle(dask_scheduler: Any, ttl: float) -> None:
        # A unit whose worker died fails at once and comes back in the next round, as any other does.
        dask_scheduler.allowed_failures = 0
        dask_scheduler.worker_ttl = ttl

    client.run_on_scheduler(settle, ttl=WORKER_TTL)


@contextmanager
def _local_pool(make_cluster: Callable[[], Any]) -> Iterator[Pool]:
    """Yield a pool on the cluster that `make_cluster` starts on this machine."""
    from dask import config
    from distributed import Client

    # A worker that died is started again, which on a busy machine takes longer than Dask waits for it (15 s).
    # Afterwards it never would be: a build whose workers have all died once would wait for ever.
    with config.set({"distributed.deploy.lost-worker-timeout": WORKER_TTL}):
        with shielded_from_interrupts():
            cluster = make_cluster()
        with cluster, Client(cluster, set_as_default=False) as client, _dask_pool(client) as pool:
            yield pool


@contextmanager
def shielded_from_interrupts() -> Iterator[None]:
    """Keep Ctrl-C from the processes, and the threads that start processes, which the block makes.

    A terminal sends it to them all, but it is the flow's process that ends the build and its workers. One
    that comes meanwhile is delivered afterwards.
    """
    resource_tracker.ensure_running()  # it would lift the block when it is started within
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _dask_pool(client: "Client") -> Iterator[Pool]:
    """Wrap a Dask client. A worker thread has one unit at a time: when it dies, it takes no other along."""
    _settle(client)
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    slots = sum(worker["nthreads"] for worker in workers)
    gpus = int(sum(worker["resources"].get("GPU", 0) for worker in workers))

    def call(function: Callable[..., Any], args: tuple[Any, ...], key: str, gpu: bool) -> None:
        resources = {"GPU": 1} if gpu and gpus else None
        future = client.submit(function, *args, key=key, pure=False, resources=resources)
        try:
            error = future.exception()
            if error is not None:
                raise error.with_traceback(future.traceback())
        finally:
            future.release()

    with _lanes(max(1, slots - gpus), gpus, call) as pool:
        yield pool


@contextmanager
def _lanes(workers: int, gpus: int, call: Callable[..., Any]) -> Iterator[Pool]:
    """Yield a pool of `workers` threads, and `gpus` more for what wants a GPU alone, that run `call`."""
    plain = ThreadPoolExecutor(workers, thread_name_prefix="unit")
    accelerated = ThreadPoolExecutor(gpus, thread_name_prefix="gpu-unit") if gpus else plain

    def submit(function: Callable[..., Any], *args: Any, key: str, gpu: bool = False) -> "Future[None]":
        return (accelerated if gpu else plain).submit(call, function, args, key, gpu)

    try:
        yield Pool(submit, workers)
    finally:
        for lane in (plain, accelerated):
            lane.shutdown(wait=False, cancel_futures=True)

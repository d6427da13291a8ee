"""Dask clusters: those that a build starts on this machine, and one that runs already.

Each is a context manager that takes an `ExecutionConfig` and yields a `Cluster`. Those of SLURM and
Kubernetes stand in files of their own.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import ConfigError, WorkerError
from tasks.machine import local_workers, shielded_from_interrupts, workers_by_cores
from tasks.pools import UNITS_PER_GPU
from tasks.worker_logs import run_logger
from tasks.workers import GPU, check_versions, look

if TYPE_CHECKING:
    from distributed import Client

# Seconds without a heartbeat after which a worker is given up. Native code that holds the GIL sends none.
WORKER_TTL = 1800.0
# Seconds that a scheduler may take to answer, and then to have a worker.
CONNECT_SECONDS, WORKER_SECONDS = 10, 30
# Seconds that a build waits for a worker when all that it could use have gone: machines start again in less.
PATIENCE = 300.0
# Seconds between two looks at jobs that wait, and between two words on it.
POLL, WORD = 2.0, 60.0
_LOCAL: dict[str, Any] = {
    # The operating system shares the memory: a limit per worker would pause units for no reason.
    "memory_limit": 0,
    "dashboard_address": "127.0.0.1:0",
    "silence_logs": logging.CRITICAL,
}
_THIS_MACHINE = (
    "The Dask cluster on this machine",
    "See why its worker processes ended, such as for lack of memory",
)


@dataclass(frozen=True)
class Cluster:
    """A cluster with a client, as a pool needs to know it."""

    client: "Client"
    where: str
    """What it is called in errors."""
    remedy: str
    """What to do if it has no workers."""
    planned: int = 0
    """Workers that were asked for, some of which may come later; 0: those that are there."""
    adaptive: bool = False
    """Whether workers come, up to `planned`, and go with the work."""
    patience: float = PATIENCE
    """Seconds to wait when no worker is left for some units."""
    coming: Callable[[], bool] = lambda: False
    """Says whether workers are on their way, which may take any time."""

    def deserted(self, *, gpu: bool) -> WorkerError:
        """Return the error for units that have no worker."""
        what = f"no worker with the resource {GPU} left, which sampling needs" if gpu else "no workers left"
        return WorkerError(
            f"{self.where} has had {what}, for {self.patience:.0f} s. {self.remedy}; then run the same "
            "again: what is committed stays."
        )


@contextmanager
def local(execution: ExecutionConfig) -> Iterator[Cluster]:
    """Start worker processes on this machine, one unit a process."""
    from distributed import LocalCluster

    workers = local_workers(execution)
    first = 1 if execution.adaptive else workers
    with _on_this_machine(lambda: LocalCluster(n_workers=first, threads_per_worker=1, **_LOCAL)) as cluster:
        if execution.adaptive:
            cluster.adapt(minimum=1, maximum=workers)
        with connected(cluster) as client:
            yield Cluster(client, *_THIS_MACHINE, workers, execution.adaptive, WORKER_TTL)


@contextmanager
def one_a_gpu(execution: ExecutionConfig) -> Iterator[Cluster]:
    """Start worker processes on this machine, one a GPU, each with spare threads for stages without GPU."""
    import torch
    from dask_cuda import LocalCUDACluster

    workers = execution.workers or torch.cuda.device_count()
    spare = max(1, workers_by_cores(execution) // workers)
    with (
        _on_this_machine(
            lambda: LocalCUDACluster(
                n_workers=workers,
                threads_per_worker=UNITS_PER_GPU + spare,
                resources={GPU: UNITS_PER_GPU},
                **_LOCAL,
            )
        ) as cluster,
        connected(cluster) as client,
    ):
        yield Cluster(client, *_THIS_MACHINE, workers, patience=WORKER_TTL)


@contextmanager
def running(execution: ExecutionConfig) -> Iterator[Cluster]:
    """Take the workers of the Dask scheduler whose address `execution.executor` is.

    The scheduler keeps what `_settle` sets, for whatever else it is given. ConfigError if it does not answer
    or has no workers, WorkerError if other versions are installed on them.
    """
    address = execution.executor
    with connected(address) as client:
        cluster = Cluster(
            client, f"The Dask scheduler at {address}", f"Start workers with `dask worker {address}`"
        )
        await_worker(cluster, WORKER_SECONDS)
        yield cluster


def with_gpu(execution: ExecutionConfig, arguments: list[str]) -> list[str]:
    """Return the arguments of a worker: where the device is cuda, one more for its GPU, if none is there."""
    declared = any("--resources" in str(argument) for argument in arguments)
    if declared or not execution.device.startswith("cuda"):
        return arguments
    return [*arguments, "--resources", f"{GPU}={UNITS_PER_GPU}"]


def await_worker(cluster: Cluster, seconds: float) -> None:
    """Wait for the first worker while any are on their way, and so many seconds; check workers' versions."""
    until, word = time.monotonic() + seconds, time.monotonic() + WORD
    while not look(cluster.client).workers:
        now = time.monotonic()
        if cluster.coming():
            until = now + seconds
        elif now >= until:
            raise ConfigError(f"{cluster.where} has no workers after {seconds:.0f} s. {cluster.remedy}.")
        if now >= word:
            word = now + WORD
            run_logger().info("%s has no worker yet: waiting for the first.", cluster.where)
        time.sleep(min(POLL, seconds))
    check_versions(cluster.client, cluster.where)


@contextmanager
def _on_this_machine(make: Callable[[], Any]) -> Iterator[Any]:
    """Yield the cluster that `make` starts on this machine."""
    from dask import config

    # A worker that died is started again, which on a busy machine takes longer than Dask waits for it (15 s).
    # Afterwards it never would be: a build whose workers have all died once would wait for ever.
    with config.set({"distributed.deploy.lost-worker-timeout": WORKER_TTL}):
        with shielded_from_interrupts():
            cluster = make()
        with cluster:
            yield cluster


@contextmanager
def connected(where: Any) -> Iterator["Client"]:
    """Yield a client of a scheduler, given its address or its cluster, that is settled for builds."""
    from distributed import Client

    try:
        client = Client(where, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"No Dask scheduler answers at {where} ({error}): start one with `dask scheduler`, "
            "or check the address and the network."
        ) from error
    with client:
        _settle(client)
        yield client


def _settle(client: "Client") -> None:
    """Have the scheduler, wherever it runs, treat units and workers as a build needs it."""

    # Nested, and of nothing but what stands in it: so it travels as code, and needs no negfacediff there.
    def settle(dask_scheduler: Any, ttl: float) -> None:
        # A unit whose worker died fails at once and comes back in the next round, as any other does.
        dask_scheduler.allowed_failures = 0
        dask_scheduler.worker_ttl = ttl

    client.run_on_scheduler(settle, ttl=WORKER_TTL)

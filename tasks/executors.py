"""Where units run: an executor yields a `Pool`; `EXECUTORS` is the table of them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import NamedTuple

from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import ConfigError
from tasks import clusters, kubernetes, slurm
from tasks.dask_pool import dask_pool
from tasks.machine import local_workers, uses_gpu
from tasks.pools import UNITS_PER_GPU, Pool, thread_pool


def _nothing(execution: ExecutionConfig) -> None:
    """Check nothing: Dask and threads are always there."""


class Executor(NamedTuple):
    """A row of the table.

    `open` yields the pool; `check` raises ConfigError for what `open` would miss. `package` is what it needs
    beside the project's own dependencies, by the name of its extra. `elastic`: it can be adaptive.
    """

    open: Callable[[ExecutionConfig], AbstractContextManager[Pool]]
    check: Callable[[ExecutionConfig], None] = _nothing
    package: str = ""
    elastic: bool = False


@contextmanager
def threads(execution: ExecutionConfig) -> Iterator[Pool]:
    """Run units in threads of this process. Where there is a GPU, threads of its own feed it."""
    gpu_units = UNITS_PER_GPU if uses_gpu(execution.device) else 0
    with thread_pool(local_workers(execution), gpu_units) as pool:
        yield pool


def _on(
    make: Callable[[ExecutionConfig], AbstractContextManager[clusters.Cluster]],
) -> Callable[[ExecutionConfig], AbstractContextManager[Pool]]:
    """Return the executor that runs units on the workers of the Dask cluster that `make` yields."""

    @contextmanager
    def on_cluster(execution: ExecutionConfig) -> Iterator[Pool]:
        with make(execution) as cluster, dask_pool(cluster) as pool:
            yield pool

    return on_cluster


def _check_address(execution: ExecutionConfig) -> None:
    with clusters.running(execution):
        return


def _check_gpus(execution: ExecutionConfig) -> None:
    gpus = _count_gpus("The executor cuda", "the executor threads or dask")
    if execution.workers > gpus:
        raise ConfigError(
            f"The executor cuda runs one worker a GPU: {execution.workers} workers were asked for and "
            f"there are {gpus} GPUs. Leave workers at 0 to use them all."
        )


EXECUTORS: dict[str, Executor] = {
    "threads": Executor(threads),
    "dask": Executor(_on(clusters.local), elastic=True),
    "cuda": Executor(_on(clusters.one_a_gpu), _check_gpus, "dask-cuda"),
    "address": Executor(_on(clusters.running), _check_address),
    "slurm": Executor(_on(slurm.slurm), slurm.check_slurm, "dask-jobqueue", elastic=True),
    "kubernetes": Executor(
        _on(kubernetes.kubernetes), kubernetes.check_kubernetes, "dask-kubernetes", elastic=True
    ),
}


def open_pool(execution: ExecutionConfig) -> AbstractContextManager[Pool]:
    """Return the pool that `execution.executor` names; anything with `://` in it is a scheduler's address."""
    return EXECUTORS[_name(execution)].open(execution)


def _name(execution: ExecutionConfig) -> str:
    return "address" if "://" in execution.executor else execution.executor


def check_available(execution: ExecutionConfig, *precisions: str) -> None:
    """Raise ConfigError if this machine, or the cluster, lacks what `execution` asks for.

    `precisions` are the number formats of the builds; what workers elsewhere have, they say.
    """
    name = _name(execution)
    executor = EXECUTORS[name]
    if executor.package and find_spec(executor.package.replace("-", "_")) is None:
        raise ConfigError(
            f"The executor {name} needs the package {executor.package}, which is not installed here: "
            f"install negfacediff[{name}], or use the executor threads or dask."
        )
    if execution.adaptive and not executor.elastic:
        fitting = ", ".join(one for one, row in EXECUTORS.items() if row.elastic)
        raise ConfigError(
            f"The executor {execution.executor} has a fixed number of workers: set adaptive to false, or use "
            f"one of {fitting}."
        )
    if execution.elsewhere and name != "address" and not execution.workers:
        raise ConfigError(f"The executor {name} starts as many workers as it is told: set workers.")
    if not execution.elsewhere and execution.device.startswith("cuda"):
        _count_gpus(f"The device {execution.device}", "the device cpu")
    if not execution.elsewhere and execution.faces_device.startswith("cuda"):
        _check_faces(execution)
    executor.check(execution)
    if precisions and not execution.elsewhere:
        from negfacediff_core.diffusion.precision import check_precision
        from negfacediff_core.stages.models import device_of

        for precision in precisions:
            check_precision(precision, device_of(execution.device))


def _check_faces(execution: ExecutionConfig) -> None:
    from negfacediff_core.faces.providers import lacking_cuda, missing_provider

    device = execution.faces_device
    _count_gpus(f"The faces_device {device}", "the faces_device cpu")
    if (what := missing_provider()) is not None:
        raise ConfigError(f"faces_device is {device}, but {what}; or set it to auto or cpu.")
    # a trial takes memory of the GPU, which only threads of this process are to take here
    if execution.executor == "threads" and (what := lacking_cuda(device)) is not None:
        raise ConfigError(f"faces_device is {device}. {what}")


def _count_gpus(what: str, otherwise: str) -> int:
    import torch

    gpus = torch.cuda.device_count()
    if gpus == 0:
        raise ConfigError(
            f"{what} needs an NVIDIA GPU and PyTorch sees none: check nvidia-smi and that PyTorch is a CUDA "
            f"build, or use {otherwise}."
        )
    return gpus

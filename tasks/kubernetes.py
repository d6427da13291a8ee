"""Workers that are pods, made by the Dask operator on Kubernetes; `kubernetes.yaml` describes a pod."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import ConfigError
from tasks.clusters import Cluster, await_worker, connected, with_gpu
from tasks.machine import shielded_from_interrupts

# Seconds that Kubernetes may take for a pod: where nodes come by demand, to start one and load the image.
POD_SECONDS = 1800.0
# Seconds after which Kubernetes deletes a cluster that nobody uses.
IDLE_SECONDS = 600


@contextmanager
def kubernetes(execution: ExecutionConfig) -> Iterator[Cluster]:
    """Have the Dask operator on Kubernetes start `execution.workers` pods, each of which is a worker.

    Image, resources, environment and the like are those of Dask's `kubernetes.yaml`.
    """
    from dask_kubernetes.operator import KubeCluster

    try:
        with shielded_from_interrupts():
            pods = KubeCluster(**kubernetes_options(execution), quiet=True)
    except Exception as error:  # of kr8s, httpx and dask-kubernetes, which have no common one
        raise ConfigError(
            f"Kubernetes did not start the Dask cluster ({error}): see `kubectl describe daskclusters` and "
            "`kubectl get pods`, and Dask's kubernetes.yaml."
        ) from error
    with pods, connected(pods) as client:
        if execution.adaptive:
            pods.adapt(minimum=1, maximum=execution.workers)
        cluster = Cluster(
            client,
            f"The Dask cluster {pods.name} on Kubernetes",
            "See `kubectl get pods` and `kubectl describe` for why its workers do not run",
            execution.workers,
            execution.adaptive,
            POD_SECONDS,
        )
        await_worker(cluster, POD_SECONDS)
        yield cluster


def kubernetes_options(execution: ExecutionConfig) -> dict[str, Any]:
    """Return what a KubeCluster is given beside kubernetes.yaml: the number of workers, and their command.

    Where the device is cuda, a worker declares its GPU, unless kubernetes.yaml has it declare resources.
    """
    from dask import config

    command = config.get("kubernetes.worker-command", "dask-worker")
    words = command.split() if isinstance(command, str) else list(command)
    return {
        # a driver that is killed cannot delete its cluster
        "idle_timeout": config.get("kubernetes.idle-timeout", None) or IDLE_SECONDS,
        "n_workers": 1 if execution.adaptive else execution.workers,
        "worker_command": with_gpu(execution, words),
    }


def check_kubernetes(execution: ExecutionConfig) -> None:
    """Raise ConfigError unless a Kubernetes cluster with the Dask operator answers."""
    import kr8s

    try:
        list(kr8s.get("daskclusters.kubernetes.dask.org"))
    except Exception as error:  # of kr8s, of httpx, or a plain ValueError
        raise ConfigError(
            f"No Kubernetes cluster with the Dask operator answers ({type(error).__name__}: {error}): check "
            "`kubectl get daskclusters` and KUBECONFIG, and that the operator is installed."
        ) from error

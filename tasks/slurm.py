"""Workers that are SLURM jobs. Dask's `jobqueue.yaml` describes a job."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import ConfigError
from tasks.clusters import WORKER_SECONDS, Cluster, await_worker, connected, with_gpu
from tasks.machine import shielded_from_interrupts

# Where a job is described, in words.
SECTION = "the section `jobqueue.slurm` of Dask's configuration, ~/.config/dask/jobqueue.yaml"


@contextmanager
def slurm(execution: ExecutionConfig) -> Iterator[Cluster]:
    """Submit `execution.workers` SLURM jobs, each of which is a worker; jobs that end are submitted again.

    Partition, memory, walltime and the like are those of Dask's `jobqueue.yaml`.
    """
    from dask_jobqueue import SLURMCluster

    with shielded_from_interrupts():
        jobs = SLURMCluster(**slurm_options(execution))
    with jobs, connected(jobs) as client:
        if execution.adaptive:
            jobs.adapt(minimum_jobs=1, maximum_jobs=execution.workers)
        else:
            jobs.scale(jobs=execution.workers)
        cluster = Cluster(
            client,
            "SLURM",
            "See `sacct` for its jobs, and what they wrote to the log-directory of jobqueue.yaml",
            execution.workers * int(jobs._job_kwargs["processes"]),
            execution.adaptive,
            coming=lambda: _in_queue([job.job_id for job in list(jobs.workers.values())]),
        )
        await_worker(cluster, WORKER_SECONDS)
        yield cluster


def slurm_options(execution: ExecutionConfig) -> dict[str, Any]:
    """Return what a SLURMCluster is given beside jobqueue.yaml: processes of a job, and workers' arguments.

    Where the device is cuda, a worker declares its GPU, unless jobqueue.yaml has it declare resources.
    """
    from dask import config

    # read by dask-jobqueue where it is imported
    arguments = list(config.get("jobqueue.slurm.worker-extra-args", None) or [])
    return {
        # Dask's own default would cut a job into several workers, which would all work on the same GPU
        "processes": config.get("jobqueue.slurm.processes", None) or 1,
        "worker_extra_args": with_gpu(execution, arguments),
    }


def check_slurm(execution: ExecutionConfig) -> None:
    """Raise ConfigError unless SLURM would take the jobs that `slurm` submits."""
    from dask import config
    from dask_jobqueue.slurm import SLURMJob

    if shutil.which("sbatch") is None:
        raise ConfigError(
            "The executor slurm submits jobs with sbatch, which is not on this machine: run the build on a "
            "login node of the SLURM cluster, or use another executor."
        )
    lacking = [f"`{name}`" for name in ("cores", "memory") if config.get(f"jobqueue.slurm.{name}") is None]
    if lacking:
        raise ConfigError(
            f"The executor slurm does not know how much of a node a job needs: set {' and '.join(lacking)} "
            f"in {SECTION}, as in `cores: 8` and `memory: 32GB`; begin with infra/slurm/jobqueue.yaml."
        )
    try:
        script = SLURMJob("tcp://127.0.0.1:8786", "check", **slurm_options(execution)).job_script()
    except ValueError as error:
        raise ConfigError(f"A value in {SECTION}, is not a job's: {error}.") from error
    tried = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True)
    if tried.returncode:
        raise ConfigError(f"SLURM does not take jobs of this kind ({tried.stderr.strip()}): check {SECTION}.")


def _in_queue(ids: list[str | None]) -> bool:
    """Say whether SLURM has some of the jobs waiting or starting."""
    if not all(ids):
        return True  # one is being submitted
    command = ["squeue", "--noheader", "--format=%i", f"--jobs={','.join(map(str, ids))}"]
    # an error is what one gets for jobs that have all ended long ago
    asked = subprocess.run(command, capture_output=True, text=True)
    return asked.returncode == 0 and bool(asked.stdout.strip())

"""How a build runs: `ExecutionConfig`, which decides no pixel and is never fingerprinted."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from negfacediff_core.config.choices import Acceleration, Speed
from negfacediff_core.config.model import Model


class ExecutionConfig(Model):
    """How a build runs. Nothing here changes a result beyond rounding: of another batch size, or device.

    Rounding moves a value of an image or a crop by a level of 255, rarely more, and an embedding by less than
    a thousandth of its length. A status may become another one where a face's score, or its cosine to a
    context, lies that near to a threshold. Completion records say what device a unit was made on.
    """

    executor: Annotated[str, BeforeValidator(lambda value: "threads" if value == "" else value)] = Field(
        default="threads",
        pattern=r"^(|threads|dask|cuda|slurm|kubernetes|(tcp|tls|ucx|ws|wss)://\S+)$",
        description="threads, dask (local processes), cuda (a process a GPU), slurm (a worker a job), "
        "kubernetes (a worker a pod), or a Dask scheduler, as tcp://scheduler:8786. Empty: threads.",
    )
    workers: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="Workers; 0: one a core or GPU. Jobs of slurm, pods of kubernetes, which need a number.",
    )
    adaptive: bool = Field(
        default=False,
        description="Let workers come, up to `workers`, and go with the work: dask, slurm or kubernetes.",
    )
    threads_per_worker: int = Field(default=1, ge=1, le=256, description="CPU threads of each worker.")
    batch_size: int = Field(default=0, ge=0, le=65_536, description="Images a batch; 0: fits the device.")
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="Where networks run: auto (a GPU where there is one), cpu, cuda, or one GPU as cuda:1.",
    )
    faces_device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="Where faces of a build's images are found and embedded: cpu (beside sampling), cuda or "
        "cuda:1 (between units that are sampled there; needs onnxruntime-gpu), auto (the GPU that samples, "
        "where onnxruntime can use it). Where a cluster has workers without GPU, they do it.",
    )
    acceleration: Acceleration = Field(
        default=Acceleration.auto,
        description="How the sampler's kernels are launched: eager (one by one), graphs (CUDA graphs), "
        "compile (minutes of warm-up, for long builds), auto (graphs on a GPU, eager elsewhere). Where one "
        "fails, the next slower one is taken, with a message.",
    )
    retries: int = Field(default=2, ge=0, le=20, description="Further rounds over units that failed.")
    approve_above_hours: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        allow_inf_nan=False,
        description="A build that would take more hours than this, by a short timed run, waits for approval: "
        "on the terminal, or paused in Prefect. 0: never.",
    )
    calibration: Speed = Field(
        default=Speed.timed,
        description="How approval knows the speed of the device: timed (in a run of a minute, here or on a "
        "worker of a Dask scheduler), or by what is stored of such devices: slurm and kubernetes cannot be "
        "timed. Of a100 and h100 the least possible time is known alone.",
    )
    accept_licences: bool = Field(
        default=False,
        description="Accept what the licences of the weights ask of a dataset, where that is more than "
        "credit: read them first. A terminal asks; in Prefect a build ends at once without it. What a run of "
        "the store has accepted is not asked again.",
    )

    @property
    def elsewhere(self) -> bool:
        """Whether units run on other machines than this one."""
        return "://" in self.executor or self.executor in ("slurm", "kubernetes")

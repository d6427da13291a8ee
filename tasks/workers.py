"""The workers of a Dask cluster: who is there, who may run what, and whether they are fit for a build."""

import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import WorkerError
from negfacediff_core.stopping import ended_when
from negfacediff_core.store.layout import StageSpec
from tasks.machine import installed_versions
from tasks.units import lacking_here
from tasks.worker_logs import logs_sent, send_from_worker

if TYPE_CHECKING:
    from distributed import Client

    from tasks.pools import Pool

# The resource of Dask that a worker with a GPU declares, one for each unit that the GPU has in hand.
GPU = "GPU"
# Stages that find and embed the faces of images.
FACES = ("aligned", "embeddings")
# Runs whose driver has the versions that are here.
_agreed: set[str] = set()


class Worker(NamedTuple):
    """A worker process: `gpus` of its `threads` are for units that want the GPU."""

    address: str
    name: str
    threads: int
    gpus: int


class Roster(NamedTuple):
    """The workers that a cluster has at a moment.

    Units that want a GPU run on workers that have one. All others run on workers without, if there are any:
    they leave the machines with GPUs, and their memory, to sampling. Otherwise they run on the threads that
    workers with GPUs have to spare.
    """

    workers: tuple[Worker, ...]

    @property
    def accelerated(self) -> tuple[Worker, ...]:
        """The workers with a GPU."""
        return tuple(worker for worker in self.workers if worker.gpus)

    @property
    def plain(self) -> tuple[Worker, ...]:
        """The workers without."""
        return tuple(worker for worker in self.workers if not worker.gpus)

    @property
    def mixed(self) -> bool:
        """Whether there are workers of both kinds."""
        return bool(self.accelerated and self.plain)

    def places(self, gpu: bool) -> tuple[Worker, ...]:
        """The workers that a unit may run on."""
        return (self.accelerated or self.plain) if gpu else (self.plain or self.accelerated)

    def slots(self, gpu: bool) -> int:
        """How many units run at a time: of those that want a GPU (0: no worker has one), or of all others."""
        if gpu:
            return sum(worker.gpus for worker in self.accelerated)
        spare = sum(worker.threads - worker.gpus for worker in self.places(gpu=False))
        return max(spare, 1) if self.workers else 0


def look(client: "Client") -> Roster:
    """Return the workers that the scheduler of a client has, and that take work.

    Raises
    ------
    ConnectionError
        The client has lost its scheduler, or is closed.
    """
    known = client.scheduler_info(n_workers=-1)
    if "workers" not in known:
        raise ConnectionError(f"{client} has no scheduler.")
    return Roster(
        tuple(
            Worker(address, str(one["name"]), one["nthreads"], int(one["resources"].get(GPU, 0)))
            for address, one in sorted(known["workers"].items())
            if one["status"] == "running"
        )
    )


def wants_gpu(spec: StageSpec) -> bool:
    """Say whether a stage samples images, as contexts too do that are those of generated faces."""
    return "generator" in spec.weights


def on_worker(run: str, versions: dict[str, str], function: Callable[..., Any], args: Sequence[Any]) -> None:
    """Call a function on a Dask worker for the driver whose versions these are; its run gets what it logs.

    Raises:
        WorkerError: if other versions are installed here, as on a worker that joined later.
        StoppedError: if nobody waits for it any more.
    """
    from distributed import get_worker

    if run not in _agreed:
        if differing := differences(versions, installed_versions()):
            raise other_versions(str(get_worker().name), differing)
        _agreed.add(run)
    with logs_sent(run, send_from_worker(run)), ended_when(released()):
        function(*args)


def released() -> Callable[[], bool]:
    """Return what tells whether nobody waits any more for the task that runs in this thread of a worker.

    Its build was cancelled, has moved it elsewhere, or its driver is gone: Dask forgets such a task, and its
    scheduler tells the worker, but the thread that is at it goes on.
    """
    from distributed import get_worker

    worker = get_worker()
    task = worker.state.tasks[worker.get_current_task()]
    return lambda: task.state == "cancelled"


def check_versions(client: "Client", where: str) -> None:
    """Raise WorkerError if other versions are installed on a worker of the cluster `where` than here."""
    try:
        workers = client.run(installed_versions)
    except ModuleNotFoundError as error:
        raise WorkerError(
            f"The workers of {where} cannot import {error.name}: install the same negfacediff there."
        ) from error
    here = installed_versions()
    for worker, there in sorted(workers.items()):
        if differing := differences(here, there):
            raise other_versions(worker, differing)


def differences(here: dict[str, str], there: dict[str, str]) -> list[str]:
    """List the packages whose versions differ, as text."""
    return [f"{name} {there[name]} (here {mine})" for name, mine in here.items() if there[name] != mine]


def other_versions(worker: str, differing: Iterable[str]) -> WorkerError:
    """Return the error for a worker with other versions than the driver's, which are called here."""
    return WorkerError(
        f"The Dask worker {worker} has other versions than this machine: {', '.join(differing)}. "
        "Install the same versions on both; mixed versions could change pixels."
    )


def check_workers(pool: "Pool", specs: Iterable[StageSpec], execution: ExecutionConfig) -> None:
    """Check that the workers of a pool have what units of prepared stages need, before work starts.

    Raises:
        WorkerError: if one does not see the store that this process has just written to, or lacks weights,
            or the device, of a stage that it would run; names the worker.
    """
    by_name = {spec.name: spec for spec in specs}
    spec = next(iter(by_name.values()))
    # That `stage.json` is there is not enough: another machine may have a store of its own at the same path.
    probe = f"writable-{uuid.uuid4().hex}"
    spec.location.write_atomic(probe, b"")
    try:
        answers = pool.ask(lacking_by_stage, list(by_name.values()), probe, execution)
    finally:
        spec.location.remove(probe)
    roster = Roster(tuple(worker for worker, _ in answers))
    for worker, lacking in answers:
        for name, what in lacking.items():
            if worker in roster.places(wants_gpu(by_name[name])):
                raise WorkerError(f"The Dask worker {worker.name} {what}")


def lacking_by_stage(specs: Sequence[StageSpec], probe: str, execution: ExecutionConfig) -> dict[str, str]:
    """Say what each stage lacks here, by name, where it does; `probe` is a file that the driver has made."""
    lacking = {}
    for spec in specs:
        what = lacking_here(spec)
        if what is None and wants_gpu(spec):
            what = no_device(execution.device)
        if what is None and spec.name in FACES:
            what = no_device_for_faces(execution.faces_device)
        if what is not None:
            lacking[spec.name] = what
    if not lacking and not specs[0].location.exists(probe):
        return dict.fromkeys(
            (spec.name for spec in specs),
            f"sees another store at {specs[0].store} than this machine, where {probe} was just written to "
            f"{specs[0].path}. Mount the same disk there on every machine, or take a store that all of them "
            "reach, such as s3://bucket/faces.",
        )
    return lacking


def no_device(device: str) -> str | None:
    """Say what to do where the device, auto, cpu, cuda or cuda:N, is not here; None where it is."""
    if not device.startswith("cuda"):
        return None
    import torch

    number = torch.device(device).index or 0
    if torch.cuda.device_count() > number:
        return None
    return (
        f"has no device {device}: PyTorch sees {torch.cuda.device_count()} GPUs there. Start workers with "
        "GPUs, with `dask worker ADDRESS --resources GPU=2`, or use the device cpu or auto."
    )


def no_device_for_faces(device: str) -> str | None:
    """Say what to do where faces cannot be found and embedded on `device` here; None where they can."""
    if not device.startswith("cuda"):
        return None
    if no_device(device) is not None:
        return (
            f"is to find and embed faces on {device} and has no such GPU. Workers without GPU take this work "
            "where there are any: set faces_device to auto or cpu, or build on workers with GPUs alone."
        )
    from negfacediff_core.faces.providers import missing_provider

    # not a trial, which would wait for a unit that samples there, and the worker's messages with it
    lacking = missing_provider()
    return None if lacking is None else f"is to find and embed faces on {device}: {lacking}."

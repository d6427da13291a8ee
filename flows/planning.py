"""The plan of a build: units, network evaluations, bytes and time, before any of it is made."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from flows.calibrations import calibration_names, load_calibration
from flows.rounds import task_runs
from negfacediff_core.config import BuildConfig, ExecutionConfig, Speed
from negfacediff_core.cost import Calibration, Estimate, estimate, evaluations_of
from negfacediff_core.errors import ConfigError
from negfacediff_core.operations import decoder_gflop, unet_gflop
from negfacediff_core.stages.build import describe_build
from negfacediff_core.stages.calibration import BUDGET, calibrate
from negfacediff_core.stages.costs import (
    Networks,
    networks_of,
    not_counted,
    passes_an_image,
    sizes_of,
    work_of,
)
from negfacediff_core.stages.sizes import StageSize, assumed_specs
from negfacediff_core.store.layout import StageSpec
from negfacediff_core.store.records import pending
from tasks.executors import check_available
from tasks.machine import local_workers, uses_gpu, workers_by_cores
from tasks.worker_calls import called_on_worker

# Seconds that a worker elsewhere may take to be timed, other work before it included.
PATIENCE = 600.0


@dataclass(frozen=True)
class Plan:
    """What a build would take; times are None where nothing tells how fast the device is.

    `passes` are those of the network an image takes, contexts in a pass -> passes; `gflop` is one network
    evaluation, `decoder_gflop` one image's decoding. `left` of everything is what the store does not hold.
    """

    name: str
    store: str
    identities: int
    images: int
    stages: dict[str, StageSize]
    task_runs: int
    passes: dict[int, int]
    gflop: float
    decoder_gflop: float
    assumed: tuple[str, ...]
    not_counted: tuple[str, ...]
    devices: int
    workers: int
    calibration: Calibration | None
    time: Estimate | None

    @property
    def evaluations(self) -> int:
        """Network evaluations of all images that are made; a last block is filled beyond the extent."""
        return evaluations_of(self.passes) * self.stages["samples"].rows

    @property
    def evaluations_left(self) -> int:
        """Those of the units that the store does not hold."""
        samples = self.stages["samples"]
        return self.evaluations * (samples.units - samples.done) // samples.units

    @property
    def hours(self) -> float:
        """Wall-clock hours that are left: the best guess, 0 where there is none."""
        return self.time.wall.seconds / 3600 if self.time else 0.0


def plan_of(
    build: BuildConfig, store: str, execution: ExecutionConfig, calibration: Calibration | None = None
) -> Plan:
    """Plan a build in `store` without making any of it.

    `calibration` tells how fast its device is; None times nothing and leaves time out. Raises what
    `build_dataset` raises for the build, but for weights that are not there, which are assumed.
    """
    return _plan(build, store, execution, *_described(build, store), calibration)


def timed_plan_of(build: BuildConfig, store: str, execution: ExecutionConfig) -> Plan:
    """Plan a build with the calibration that `execution` names, or one of the device that units would run on.

    That takes about a minute, here or on a worker of the Dask scheduler `execution.executor`. Raises
    ConfigError if this machine lacks what `execution` asks for, or `can_be_timed` says no; WorkerError for
    workers that cannot be used.
    """
    networks, specs = _described(build, store)
    if execution.calibration != Speed.timed:
        calibration = load_calibration(execution.calibration)
    elif not can_be_timed(execution):
        raise ConfigError(
            f"How fast the workers of {execution.executor} are is not known, as none is there to be timed: "
            f"name a stored calibration of such a device by --device ({', '.join(calibration_names())}), or "
            "leave time out by --no-calibrate."
        )
    elif execution.elsewhere:
        calibration, roster = called_on_worker(
            execution, PATIENCE, partial(calibrate, budget=BUDGET), build, networks, specs, execution
        )
        places = len(roster.places(gpu=True)) if calibration.gpu else 0, roster.slots(gpu=False)
        return _plan(build, store, execution, networks, specs, calibration, places)
    else:
        check_available(execution, str(build.samples.precision))
        calibration = calibrate(build, networks, specs, execution, budget=BUDGET)
    return _plan(build, store, execution, networks, specs, calibration)


def can_be_timed(execution: ExecutionConfig) -> bool:
    """Say whether the speed of a build's device is known, or can be found out without starting workers."""
    return execution.calibration != Speed.timed or execution.executor not in ("slurm", "kubernetes")


def places_of(execution: ExecutionConfig, calibration: Calibration | None = None) -> tuple[int, int]:
    """How many GPUs, and how many workers on CPUs beside them, a build runs on.

    The workers of a cluster elsewhere are as many as `execution.workers` says; it is not asked. Whether they
    have GPUs, the calibration tells, and without one the device.
    """
    cores = workers_by_cores(execution)
    if execution.elsewhere:
        workers = execution.workers or 1
        gpu = execution.device.startswith("cuda") if calibration is None else calibration.gpu
        return (workers if gpu else 0), workers
    if calibration is not None and calibration.floor:
        return execution.workers or 1, cores
    if not uses_gpu(execution.device):
        return 0, local_workers(execution)
    if execution.executor == "cuda":
        return execution.workers or _gpus(), cores
    return 1, local_workers(execution)


def _gpus() -> int:
    return torch.cuda.device_count()


def _described(build: BuildConfig, store: str) -> tuple[Networks, Sequence[StageSpec]]:
    networks = networks_of(build)
    return networks, assumed_specs(build, store) if networks.missing else describe_build(build, store)


def _plan(
    build: BuildConfig,
    store: str,
    execution: ExecutionConfig,
    networks: Networks,
    specs: Sequence[StageSpec],
    calibration: Calibration | None,
    places: tuple[int, int] | None = None,
) -> Plan:
    """Put a plan together; `places` are those of `places_of` where they were asked for."""
    sizes = sizes_of(specs, networks)
    devices, workers = places or places_of(execution, calibration)
    gflop = unet_gflop(networks.unet, networks.latent_shape, 1)
    time = None
    if calibration is not None:
        rates = calibration.with_network(str(build.samples.precision), gflop)
        work = work_of(build, specs, sizes, networks, calibration.faces_on_gpu)
        time = estimate(work, rates, devices, workers)
    return Plan(
        name=build.name,
        store=store,
        identities=build.identities,
        images=build.identities * build.images,
        stages=sizes,
        task_runs=task_runs(
            {spec.name: spec.grid.units() if networks.missing else pending(spec) for spec in specs}, workers
        ),
        passes=passes_an_image(build, networks),
        gflop=gflop,
        decoder_gflop=decoder_gflop(networks.decoder, networks.latent_shape),
        assumed=networks.assumed,
        not_counted=tuple(not_counted(build)),
        devices=devices,
        workers=workers,
        calibration=calibration,
        time=time,
    )

"""The plan of a build: units, network evaluations, bytes and time, before any of it is made."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flows.rounds import task_runs
from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.cost import Calibration, Estimate, estimate, evaluations_of
from negfacediff_core.operations import decoder_gflop, unet_gflop
from negfacediff_core.stages import describe_build
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
from tasks.machine import local_workers, uses_gpu, workers_by_cores


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
    """Plan a build with a calibration of the device at hand, which takes a minute or less."""
    networks, specs = _described(build, store)
    calibration = calibrate(build, networks, specs, execution, budget=BUDGET)
    return _plan(build, store, execution, networks, specs, calibration)


def places_of(execution: ExecutionConfig, calibration: Calibration | None = None) -> tuple[int, int]:
    """How many GPUs, and how many workers on CPUs beside them, a build runs on.

    The workers of a cluster elsewhere are as many as `execution.workers` says; it is not asked.
    """
    cores = workers_by_cores(execution)
    if calibration is not None and calibration.floor:
        return execution.workers or 1, cores
    if execution.elsewhere:
        workers = execution.workers or 1
        return (workers if execution.device.startswith("cuda") else 0), workers
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
) -> Plan:
    sizes = sizes_of(specs, networks)
    devices, workers = places_of(execution, calibration)
    gflop = unet_gflop(networks.unet, networks.latent_shape, 1)
    time = None
    if calibration is not None:
        rates = calibration.with_network(str(build.samples.precision), gflop)
        time = estimate(work_of(build, specs, sizes, networks), rates, devices, workers)
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

"""What sampling costs: network passes exactly, and the time that work takes at given rates.

An image of a sampler with N calls of its model takes sum_t (1 + sum_j [w_j(t) != 0]) network evaluations over
the timesteps t that the sampler visits: a term of the guidance whose weight is zero is not evaluated (see
`diffusion.guidance`). The timesteps are those that the sampler itself asks for.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from negfacediff_core.diffusion.engine import PIECEWISE, SamplerSettings
from negfacediff_core.diffusion.guidance import WEIGHTS, parse_curve, weight_over_time
from negfacediff_core.diffusion.samplers import SAMPLERS
from negfacediff_core.diffusion.schedule import linear
from negfacediff_core.errors import ConfigError

#: Share of the time by which the upper end is raised for what no calibration shows: workers that wait for
#: each other at the end and disturb each other meanwhile, units that are made again, other load.
NOT_MODELLED = 0.15


def passes_of(settings: SamplerSettings, T: int, negatives: int) -> dict[int, int]:
    """Count the passes of the network that one image takes: contexts in a pass -> passes.

    `negatives` is how many an identity has (0: the rule none), `T` the generator's timesteps. A pass with k
    contexts is k network evaluations. Raises `ConfigError` for settings that the sampler refuses.
    """
    curve = parse_curve(settings.curve) if settings.weight == PIECEWISE else WEIGHTS[settings.weight]
    away = weight_over_time(settings.w, T, curve, settings.interval)
    free = weight_over_time(settings.cfg, T, interval=settings.interval)
    passes: Counter[int] = Counter()

    def eps_model(x: Tensor, t: int) -> Tensor:
        passes[1 + negatives * (away(t) != 0.0) + (free(t) != 0.0)] += 1
        return x

    sampler = SAMPLERS[settings.sampler]
    options = {name: getattr(settings, name) for name in sampler.options}
    # which timesteps are visited depends on T alone, so any schedule and a latent of one number will do
    sampler.sample(eps_model, torch.zeros(1), linear(T), lambda t: torch.zeros(1), **options)
    return dict(passes)


def evaluations_of(passes: Mapping[int, int]) -> int:
    """Network evaluations of `passes`: contexts in a pass -> passes."""
    return sum(contexts * count for contexts, count in passes.items())


@dataclass(frozen=True)
class Rate:
    """Amount of work a second of one worker, and `spread`: half the range of its repeats over the median."""

    value: float
    spread: float = 0.0


@dataclass(frozen=True)
class NetworkRates:
    """GFLOP/s of a generator's networks: `gflop` is one evaluation of the U-Net that was timed."""

    precision: str
    gflop: float
    unet: Rate
    decoder: Rate


@dataclass(frozen=True)
class Calibration:
    """How fast a device is, and `how` that is known.

    `floor` says that rates are the most that the device can reach: times are then the least possible. `rates`
    are those of work on the CPU, by name, and may be missing: GFLOP/s, and MB/s of `write`. `warm_up` is the
    seconds that loading and the first batch took, which each worker pays once; `gpu` says that its networks
    run on a GPU, beside the CPU, and `faces_on_gpu` that those of faces do.
    """

    device: str
    how: str
    floor: bool
    generators: tuple[NetworkRates, ...]
    rates: dict[str, Rate] = field(default_factory=dict)
    warm_up: float = 0.0
    gpu: bool = False
    faces_on_gpu: bool = False

    def with_network(self, precision: str, gflop: float) -> dict[str, Rate]:
        """Return all rates, those of the networks for the generator that is nearest in size.

        Raises `ConfigError` if the device was not timed in that precision.
        """
        fitting = [one for one in self.generators if one.precision == precision]
        if not fitting:
            known = ", ".join(sorted({one.precision for one in self.generators}))
            raise ConfigError(
                f"the calibration of {self.device} has no rates for samples.precision {precision}, only for "
                f"{known}: plan with one of those, or on the device itself without --device."
            )
        nearest = min(fitting, key=lambda one: max(one.gflop / gflop, gflop / one.gflop))
        return {**self.rates, "unet": nearest.unet, "decoder": nearest.decoder}


@dataclass(frozen=True)
class Work:
    """A part of a stage: so much (`amount`, in the unit of `rate`), in `units` that can run side by side."""

    stage: str
    rate: str
    amount: float
    units: int
    on_device: bool = False


@dataclass(frozen=True)
class Span:
    """Seconds: the best guess, and what they lie between."""

    seconds: float
    low: float
    high: float

    def __add__(self, other: "Span") -> "Span":
        return Span(self.seconds + other.seconds, self.low + other.low, self.high + other.high)

    def over(self, workers: int) -> "Span":
        """The same work, shared by workers that do not disturb each other."""
        return Span(self.seconds / workers, self.low / workers, self.high / workers)


NO_TIME = Span(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Estimate:
    """Time of a build: by stage on one worker, `device` and `cpu` summed over workers, and `wall`.

    `missing` names stages of whose work the calibration knows no rate: they are in no sum.
    """

    stages: dict[str, Span]
    device: Span
    cpu: Span
    wall: Span
    missing: tuple[str, ...]


def estimate(work: Iterable[Work], rates: Mapping[str, Rate], devices: int, workers: int) -> Estimate:
    """Put together how long `work` takes on `workers` of the CPU and on `devices` (0: the CPU does all).

    Where there are devices the CPU works beside them, and the slower of the two decides.
    """
    stages: dict[str, Span] = {}
    sums, walls = {True: NO_TIME, False: NO_TIME}, {True: NO_TIME, False: NO_TIME}
    missing: dict[str, None] = {}
    for part in work:
        if part.amount == 0:
            continue
        if part.rate not in rates:
            missing[part.stage] = None
            continue
        on_device = part.on_device and devices > 0
        span = _span(part, rates[part.rate])
        stages[part.stage] = stages.get(part.stage, NO_TIME) + span
        sums[on_device] += span
        walls[on_device] += span.over(max(1, min(devices if on_device else workers, part.units)))
    wall = max(walls.values(), key=lambda span: span.seconds) if devices else walls[False]
    unknown = tuple(stage for stage in missing if stage not in stages)
    return Estimate(stages, sums[True], sums[False], wall, unknown)


def _span(part: Work, rate: Rate) -> Span:
    seconds = part.amount / rate.value
    return Span(seconds, seconds / (1 + rate.spread), seconds * (1 + rate.spread) * (1 + NOT_MODELLED))


def rate_of(amount: float, seconds: Sequence[float]) -> Rate:
    """The rate of work that took `seconds` in its repeats: the median, and half their range about it."""
    ordered = sorted(seconds)
    middle = ordered[len(ordered) // 2]
    return Rate(amount / middle, (ordered[-1] - ordered[0]) / 2 / middle)

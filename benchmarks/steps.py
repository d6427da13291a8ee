"""What the parts of the engine's benchmark share: rows, and the time of a guided step in both forms."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from floors import floor_seconds, operations_of, seconds_of
from networks import SIZES, rows_of, with_timesteps, without_decoder
from plain import IMAGES, PlainSampler
from torch import Tensor

from negfacediff_core.diffusion.checkpoint import Generator
from negfacediff_core.diffusion.engine import SamplerSettings, SamplingEngine

#: Weight of the negative.
W = 0.5

#: The least ratio, or the most share, that is aimed at, by device and row.
TARGETS = {
    "cpu": {
        "evaluations, fp32, batch 1": 1.4,
        "evaluations, fp32, batch 8": 1.15,
        "evaluations, bf16, batch 1": 2.0,
        "evaluations, bf16, batch 8": 2.0,
        "decoding, bf16": 2.0,
        "DPM-Solver++ 20 against plain DDPM-1000, bf16": 40.0,
    },
    "cuda": {
        "share of the bf16 matrix rate": 0.4,
        "DDPM-1000, bf16": 4.0,
        "DDIM-200, bf16": 4.0,
        "DDIM-50, bf16": 4.0,
        "DPM-Solver++ 20, bf16": 4.0,
        "decoding, bf16": 2.0,
        "DPM-Solver++ 20 against plain DDPM-1000, bf16": 120.0,
    },
}
#: The largest share of time outside the networks, and the largest relative difference in float32.
MOST_OUTSIDE, MOST_DIFFERENT = 0.05, 1e-5


class Row(NamedTuple):
    """One line of the table; times in seconds, `None` where there is no such number.

    `value` is the ratio plain / here, or what the row is about. `target` is the least value aimed at, or the
    most where `at_most`.
    """

    what: str
    value: float
    plain: float | None = None
    here: float | None = None
    floor: float | None = None
    target: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def verdict(self) -> str:
        """Whether the target is met; empty where there is none."""
        if self.target is None:
            return ""
        met = self.value <= self.target if self.at_most else self.value >= self.target
        return "met" if met else "MISSED"


@dataclass
class Setup:
    """What the parts share: the generator and its device, how much is timed, and what was measured once."""

    device: str
    size: str
    quick: bool
    generator: Generator
    rates: dict[str, float]
    once: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """`cpu` or `cuda`, without the number of the device."""
        return self.device.partition(":")[0]

    @property
    def precisions(self) -> list[str]:
        """The exact format, and the one that the targets are for."""
        return ["fp32", "bf16"]

    @property
    def plain_images(self) -> int:
        """Images in the plain form's batch: those of an identity, fewer where it has to be quick."""
        return 4 if self.quick else IMAGES

    @property
    def batch(self) -> int:
        """Images in the engine's batch, where only one is timed."""
        return self.once.get("best batch", 8 if self.kind == "cpu" else 256)

    def seconds(self, work: Callable[[], Any], repeats: int = 3) -> float:
        """Time a call on the device."""
        return seconds_of(work, self.kind, 1 if self.quick else repeats)

    def row(self, what: str, value: float, **others: Any) -> Row:
        """A row with the target of this device, if it has one for it and the networks are full-size."""
        target = TARGETS[self.kind].get(what) if self.size == "full" else None
        return Row(what, value, target=target, **others)


def engine_for(
    generator: Generator, sampler: str, steps: int, batch: int, precision: str, acceleration: str = "auto"
) -> SamplingEngine:
    """An engine with a negative of weight W."""
    settings = SamplerSettings(sampler, steps=steps, w=W)
    return SamplingEngine(generator, settings, batch, precision, acceleration)


def steps_timed(setup: Setup, batch: int) -> int:
    """How many steps are timed: enough for the clock, no more than patience allows on a CPU."""
    return 10 if setup.kind == "cuda" else max(1, 4 // batch)


def engine_step(setup: Setup, batch: int, precision: str, sampler: str = "dpm_solver") -> float:
    """Seconds of one guided step of the engine with `batch` images, contexts and noise included."""
    steps = steps_timed(setup, batch)
    generator = with_timesteps(setup.generator, steps) if sampler == "ddpm" else setup.generator
    engine = engine_for(without_decoder(generator), sampler, steps, batch, precision)
    rows = rows_of(generator, batch)
    if setup.kind == "cuda":  # kernels are chosen and graphs captured in the first call
        engine.sample(*rows, seed=0)
    seconds = setup.seconds(lambda: engine.sample(*rows, seed=0))
    if engine.batch_size < batch:
        raise torch.OutOfMemoryError(f"a batch of {batch} does not fit; the engine went on with less")
    return seconds / steps


def plain_step(setup: Setup, batch: int, products: str = "fp32") -> float:
    """Seconds of one guided step of the plain form with `batch` images of one identity; measured once."""
    key = f"plain step, {products}, batch {batch}"
    if key in setup.once:
        return setup.once[key]
    steps = steps_timed(setup, batch)
    sampler = PlainSampler(setup.generator, "dpm_solver", W, products, steps=steps)
    contexts, negatives, *_ = rows_of(setup.generator, 1)

    def sample() -> Tensor:
        return sampler.latents(contexts[0], negatives[0, 0], 0, range(batch), 0)

    if setup.kind == "cuda":
        sample()
    seconds = setup.once[key] = setup.seconds(sample) / steps
    return seconds


def step_error(setup: Setup, precision: str) -> float:
    """Relative difference of the engine's latents from the plain form's after one step."""
    seen: list[Tensor] = []
    engine = engine_for(without_decoder(setup.generator, seen.append), "dpm_solver", 1, 1, precision)
    contexts, negatives, shares, identities, replicates = rows_of(setup.generator, 1)
    engine.sample(contexts, negatives, shares, identities, replicates, seed=0)
    plain = PlainSampler(setup.generator, "dpm_solver", W, steps=1)
    expected = plain.latents(contexts[0], negatives[0, 0], 0, range(1), 0)
    return float((seen[0].float() - expected).norm() / expected.norm())


def pair_operations(setup: Setup) -> int:
    """Operations of a guided step of one image, two evaluations, that no sharing saves."""
    with torch.device("meta"):
        unet = type(setup.generator.unet)(**SIZES[setup.size][0])
        x, t = torch.zeros(1, *setup.generator.latent_shape), torch.zeros(1)
        pair = unet.project_context(torch.zeros(2, setup.generator.context_width))
        return operations_of(lambda: unet(x, t, pair))


def step_floor(setup: Setup, batch: int, precision: str) -> float:
    """The floor of a guided step: operations that no sharing saves, or reading the weights once."""
    width = 4 if precision == "fp32" else 2
    parameters = setup.generator.unet.named_parameters()
    weights = sum(w.numel() for name, w in parameters if "c_proj_in" not in name)
    return floor_seconds(batch * pair_operations(setup), width * weights, setup.rates, precision)

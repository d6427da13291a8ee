"""A short timed run on this process's device: rates of sampling, decoding, detecting, embedding and writing.

Every part is timed through what a build calls itself. What is slow the first time, loading and warm-up, is
counted apart. Where weights are not there, sampling is timed with random ones of the assumed size and the
rest with the demo pack's, whose rates are then taken for theirs.
"""

import gc
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.cost import Calibration, NetworkRates, Rate, rate_of
from negfacediff_core.diffusion.batch_size import even_size
from negfacediff_core.diffusion.checkpoint import Generator, load_generator
from negfacediff_core.diffusion.engine import SamplerSettings, SamplingEngine
from negfacediff_core.diffusion.first_stage import FirstStageSettings, VQDecoder
from negfacediff_core.diffusion.schedule import linear
from negfacediff_core.diffusion.unet import ConditionalUNet
from negfacediff_core.evaluation.scores import compare
from negfacediff_core.faces.align import TEMPLATE_112, similarity_transform, warp
from negfacediff_core.faces.detect import load_detector
from negfacediff_core.faces.embed import load_embedder
from negfacediff_core.faces.packs import find_network
from negfacediff_core.negatives import mine
from negfacediff_core.operations import GIGA, decoder_gflop, onnx_gflop, unet_gflop
from negfacediff_core.stages.aligned import SIZE
from negfacediff_core.stages.costs import LATENT, MEGA, Networks, passes_an_image
from negfacediff_core.stages.models import describe_device, device_of, faces_device_of, resolve_weights
from negfacediff_core.stages.sizes import IMAGE_SIZE, WIDTH, unit_bytes
from negfacediff_core.store.layout import StageSpec
from negfacediff_core.store.shards import commit, prepare
from negfacediff_core.store.tables import rows_of

Clock = Callable[[], float]

REPEATS = 3
# Sampling is timed at two numbers of steps: their difference is steps alone, the rest is the decoder.
SHORT, LONG = 1, 4
# Seconds that the timed runs of the sampler may take together. Where they would take more, fewer images are
# sampled in them, and one more run of few steps, of twice as long, tells what a batch of the build gains.
BUDGET = 20.0
# What is added to the spread of the network's rate for each time that the batch would have to be doubled to
# be the build's: on one core with AMX a doubling raised it by 7% in fp32 and by 24% in bf16.
A_DOUBLING = 0.25
# Images that are found and embedded, contexts that are mined, images whose pairs are scored.
FACES, MINED, POOL, SCORED = 16, 128, 4096, (96, 32)
DEMO_DETECTOR, DEMO_JUDGE = "packs/demo/faces", "packs/demo/judge"


def calibrate(
    build: BuildConfig,
    networks: Networks,
    specs: Sequence[StageSpec],
    execution: ExecutionConfig,
    clock: Clock = time.perf_counter,
    budget: float = BUDGET,
) -> Calibration:
    """Time what `build` would do on the device of `execution`, as one worker does it; takes about three times
    the `budget` at most.

    Writes to a temporary folder alone, and sets the number of torch's threads in this process. `clock` gives
    seconds: that of the processor where others use the machine. The GPU's memory is given back.
    """
    torch.set_num_threads(execution.threads_per_worker)
    device = device_of(execution.device)
    try:
        return _calibrate(build, networks, specs, execution, device, clock, budget)
    finally:
        if device != "cpu":
            gc.collect()  # engines hold themselves, by their graphs
            torch.cuda.empty_cache()


def _calibrate(
    build: BuildConfig,
    networks: Networks,
    specs: Sequence[StageSpec],
    execution: ExecutionConfig,
    device: str,
    clock: Clock,
    budget: float,
) -> Calibration:
    """Do what `calibrate` does; what it has loaded is let go at its end."""
    threads, precision = execution.threads_per_worker, str(build.samples.precision)
    faces = faces_device_of(execution)
    spec = next(spec for spec in specs if spec.name == "samples")
    passes = passes_an_image(build, networks)
    most = max(passes, key=lambda contexts: contexts * passes[contexts])
    begun = clock()
    sampler = _Sampler(_generator(networks, device), most, execution, precision, clock)
    loaded = clock() - begun
    unit = spec.grid.block_identities * spec.grid.block_replicates
    network, warm_up, how = _time_sampling(networks, sampler, unit, precision, budget)
    rates = {
        "detect": _time_detector(build, networks, sampler.sample(SHORT, 1)[1], threads, faces, clock),
        "embed": _time_judge(networks, threads, faces, clock),
        "write": _time_writing(spec, clock),
        "mine": _time_mining(clock),
        "score": _time_scoring(device, clock),
    }
    where = f"CPU, {threads} thread{'s' * (threads > 1)}" if device == "cpu" else describe_device(device)
    on_gpu = device != "cpu", faces != "cpu"
    return Calibration(where, how, False, (network,), rates, loaded + warm_up, *on_gpu)


def _generator(networks: Networks, device: str) -> Generator:
    """The generator of the build, or one of the assumed size with random weights."""
    if networks.generator is not None:
        return load_generator(networks.generator, device)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        unet, decoder = ConditionalUNet(), VQDecoder(FirstStageSettings())
    for network in (unet, decoder):
        network.eval().requires_grad_(False)
    return Generator(unet, linear(1000), decoder, None, LATENT, WIDTH, IMAGE_SIZE, Path("random"))


class _Sampler:
    """The generator's engine, made to sample random contexts with so many of them in each pass."""

    def __init__(
        self, generator: Generator, contexts: int, execution: ExecutionConfig, precision: str, clock: Clock
    ):
        self.width, self.contexts, self.clock = generator.context_width, contexts, clock
        self.draws = np.random.default_rng(0)
        self.engines = {
            steps: SamplingEngine(
                generator,
                SamplerSettings(steps=steps, w=float(contexts > 1)),
                execution.batch_size,
                precision,
                execution.acceleration,
            )
            for steps in (SHORT, LONG)
        }

    def sample(self, steps: int, count: int) -> tuple[float, NDArray[np.uint8]]:
        """Make `count` images in so many steps; return the seconds that it took, and them."""
        vectors = self.draws.standard_normal((count, self.contexts, self.width), np.float32)
        away = None if self.contexts == 1 else vectors[:, 1:]
        shares = None if away is None else np.full(away.shape[:2], 1 / away.shape[1], np.float32)
        rows = np.arange(count), np.zeros(count, np.int64)
        begun = self.clock()
        images = self.engines[steps].sample(vectors[:, 0], away, shares, *rows, 0).images
        return self.clock() - begun, images

    def batch(self, count: int) -> int:
        """How many of `count` images a build samples together; known when some have been sampled."""
        return even_size(count, self.engines[LONG].batch_size)

    def both(self, count: int) -> tuple[float, float]:
        """Seconds of `count` images in the short and in the long form."""
        return self.sample(SHORT, count)[0], self.sample(LONG, count)[0]


def _time_sampling(
    networks: Networks, sampler: _Sampler, unit: int, precision: str, budget: float
) -> tuple[NetworkRates, float, str]:
    """Time the engine; returns the rates, the seconds that warm-up took, and how it was done.

    `unit` is how many images a unit has. As many are sampled together as in a build where the budget allows.
    """
    warm_up, count, pairs = _time_pairs(sampler, unit, budget)
    # Other load may make the long form the shorter: a hundredth of it is no estimate, but a positive number.
    steps = [max(long - short, long / 100) for short, long in pairs]
    step = sorted(steps)[REPEATS // 2] / (LONG - SHORT)
    decoding = [max(short - SHORT * step, short / 100) for short, _ in pairs]
    shape, contexts = networks.latent_shape, sampler.contexts
    an_image = unet_gflop(networks.unet, shape, contexts)
    rates = NetworkRates(
        precision,
        unet_gflop(networks.unet, shape, 1),
        rate_of((LONG - SHORT) * count * an_image, steps),
        rate_of(count * decoder_gflop(networks.decoder, shape), decoding),
    )
    how = (
        f"{REPEATS} repeats of {SHORT} and of {LONG} steps, {contexts} contexts a pass, {count} images at a "
        f"time, {precision}"
    )
    batch = sampler.batch(unit)
    if count == batch:
        return rates, warm_up, how
    together = max(count, min(batch, int(2 * budget * count / min(short for short, _ in pairs))))
    spent = sampler.sample(SHORT, together)[0]
    stepping = max(spent - together * sorted(decoding)[REPEATS // 2] / count, spent / 100)
    spread = rates.unet.spread + A_DOUBLING * math.log2(batch / together)
    unet = Rate(SHORT * together * an_image / stepping, spread)
    return replace(rates, unet=unet), warm_up, f"{how}, and of {SHORT} step with {together}"


def _time_pairs(sampler: _Sampler, unit: int, budget: float) -> tuple[float, int, list[tuple[float, float]]]:
    """Time both forms REPEATS times with as many images as the budget allows, a batch of the build at most.

    Returns the seconds of warm-up, how many images it were, and the seconds of each pair.
    """
    first, seconds = sum(sampler.both(1)), sum(sampler.both(1))
    warm_up, count, batch = max(0.0, first - seconds), 1, sampler.batch(unit)
    # a larger batch may be no slower than a smaller one: on a GPU by far
    while count < batch and (fitting := int(budget * count / ((REPEATS + 1) * seconds))) >= 2 * count:
        count = min(batch, fitting)
        seconds = sum(sampler.both(count))
    pairs = [sampler.both(count) for _ in range(REPEATS)]
    return warm_up + max(0.0, seconds - max(map(sum, pairs))), count, pairs


def _repeated(amount: float, work: Callable[[], object], clock: Clock) -> Rate:
    """The rate of `work`, which is so much of it, after a first time that does not count."""
    work()
    seconds = []
    for _ in range(REPEATS):
        begun = clock()
        work()
        seconds.append(max(clock() - begun, 1e-6))
    return rate_of(amount, seconds)


def _time_detector(
    build: BuildConfig, networks: Networks, images: NDArray[np.uint8], threads: int, device: str, clock: Clock
) -> Rate:
    """Find faces, and warp each image as if one had been found."""
    path = networks.detector or find_network(resolve_weights(DEMO_DETECTOR), "detection")
    side = build.aligned.detector_size
    detector = load_detector(path, input_size=side, threads=threads, device=device)
    gflop = networks.detector_gflop if networks.detector else onnx_gflop(path, side)
    assert gflop is not None  # the demo pack's networks can be counted
    faces = np.resize(images, (FACES, *images.shape[1:]))
    matrix = similarity_transform(TEMPLATE_112 * images.shape[1] / SIZE, TEMPLATE_112)

    def work() -> None:
        detector.detect(faces)
        for face in faces:
            warp(face, matrix, SIZE)

    return _repeated(FACES * gflop, work, clock)


def _time_judge(networks: Networks, threads: int, device: str, clock: Clock) -> Rate:
    path = networks.judge or find_network(resolve_weights(DEMO_JUDGE), "recognition")
    judge = load_embedder(path, threads, device)
    gflop = networks.judge_gflop if networks.judge else onnx_gflop(path, SIZE)
    assert gflop is not None
    crops = np.random.default_rng(0).integers(0, 256, (FACES, SIZE, SIZE, 3), np.uint8)
    return _repeated(FACES * gflop, lambda: judge.embed(crops), clock)


def _time_writing(spec: StageSpec, clock: Clock) -> Rate:
    """Commit units of images to a temporary folder, each another one."""
    shape = (spec.grid.block_identities, spec.grid.block_replicates, *spec.arrays[0].item)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    blank = {"string": "", "float32": 0.0, "float64": 0.0, "int64": 0}
    columns = {name: [blank[kind]] * (shape[0] * shape[1]) for name, kind in spec.columns}
    with tempfile.TemporaryDirectory(prefix="negfacediff-calibration-") as folder:
        extent = (REPEATS + 1) * spec.grid.block_identities
        grid = replace(spec.grid, identities=extent, replicates=spec.grid.block_replicates, limit=None)
        there = replace(spec, store=folder, grid=grid)
        prepare(there)
        units, rows = iter(grid.units()), rows_of(there, columns)

        def work() -> None:
            commit(
                there,
                next(units),
                arrays={"image": pixels},
                rows=rows,
                started=0.0,
                seconds={},
                device="",
            )

        return _repeated(sum(unit_bytes(spec).values()) / MEGA, work, clock)


def _time_mining(clock: Clock) -> Rate:
    contexts = np.random.default_rng(0).standard_normal((POOL, WIDTH), np.float32)
    contexts /= np.linalg.norm(contexts, axis=1, keepdims=True)
    gflop = 2 * WIDTH * MINED * POOL / GIGA
    return _repeated(gflop, lambda: mine(contexts[:MINED], contexts, "far", 0), clock)


def _time_scoring(device: str, clock: Clock) -> Rate:
    identities, images = SCORED
    embeddings = np.random.default_rng(0).standard_normal((identities, images, WIDTH), np.float32)
    gflop = (identities * images) ** 2 * WIDTH / GIGA
    return _repeated(gflop, lambda: compare(embeddings, device=device), clock)

"""Stage `samples`: the generator's images."""

import threading
import time
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.config import BuildConfig, ExecutionConfig, SamplesConfig
from negfacediff_core.diffusion.engine import SamplerSettings, SamplingEngine
from negfacediff_core.diffusion.guidance import parse_curve
from negfacediff_core.diffusion.samplers import SAMPLERS
from negfacediff_core.errors import ConfigError
from negfacediff_core.negatives import mine
from negfacediff_core.stages import batch_sizes
from negfacediff_core.stages.contexts import contexts_of
from negfacediff_core.stages.models import describe_device, device_of, generator_of, generator_weight
from negfacediff_core.stages.negatives import StoredPool, stored_negatives
from negfacediff_core.store.layout import ArraySpec, Grid, StageSpec, Unit, Weight
from negfacediff_core.store.records import Record
from negfacediff_core.store.shards import commit
from negfacediff_core.store.tables import rows_of
from negfacediff_core.transforms import TRANSFORMS, safe_lower_bound

VERSION = 3
COLUMNS = (
    ("identity", "int64"),
    ("replicate", "int64"),
    ("seed", "int64"),
    ("negative", "int64"),
    ("sampler", "string"),
    ("steps", "int64"),
    ("w", "float64"),
    ("status", "string"),
    ("error", "string"),
    ("clipped", "float32"),
)


def plan(build: BuildConfig, store: str, upstream: Mapping[str, StageSpec]) -> StageSpec:
    """Describe the stage; the generator is loaded, and the sampler's settings are tried on it."""
    settings, contexts = build.samples, upstream["contexts"]
    weight = generator_weight(settings.generator)
    generator = generator_of(weight, "cpu")
    timesteps, sampler = generator.schedule.T, SAMPLERS[settings.sampler]
    most = sampler.most_steps(timesteps)
    if "steps" in sampler.options and settings.steps > most:
        raise ConfigError(
            f"samples.steps is {settings.steps}, but the generator {settings.generator} has {timesteps} "
            f"timesteps, of which the sampler {settings.sampler} takes {most} at most; set it to {most} or "
            "fewer."
        )
    if settings.cfg and not generator.unet.learn_empty_context:
        raise ConfigError(
            f"samples.cfg is {settings.cfg:g}, but the generator {settings.generator} has not learned an "
            "empty context to guide away from; set it to 0."
        )
    if settings.curve:
        parse_curve(settings.curve)
    shared = ("sampler", "w", "precision", "seed")
    chosen = (*shared, *sampler.options, *_options_in_effect(settings))
    config = {name: getattr(settings, name) for name in chosen}
    if settings.safe and "safe" in config:
        if build.negatives.pool < 2:
            raise ConfigError("samples.safe looks for the nearest identity in the pool: set negatives.pool.")
        config["pool"] = build.negatives.pool
    return StageSpec(
        store=store,
        name="samples",
        version=VERSION,
        # A sampler without the option `steps` takes all of them; rows and reports tell how many.
        config={"steps": timesteps, **config},
        inputs={name: upstream[name].fingerprint for name in ("contexts", "negatives")},
        grid=Grid(
            build.identities,
            build.images,
            build.block_identities,
            build.block_images,
            contexts.grid.limit,
        ),
        weights={"generator": weight},
        arrays=(ArraySpec("image", "u1", (generator.image_size, generator.image_size, 3)),),
        columns=COLUMNS,
    )


def _options_in_effect(settings: SamplesConfig) -> list[str]:
    """The options of guidance and transform that change an image; the others must not move it elsewhere."""
    options = []
    if settings.w:
        options.append("weight")
    if settings.w and settings.curve:
        options.append("curve")
    if settings.cfg:
        options.append("cfg")
    if settings.w or settings.cfg:
        options += [
            name
            for name, whole in (("interval_low", 0.0), ("interval_high", 1.0))
            if getattr(settings, name) != whole
        ]
    if settings.transform != "none":
        options += ["transform", "lower_bound", "safe"]
    return options


def run_unit(spec: StageSpec, unit: Unit, execution: ExecutionConfig) -> Record:
    """Sample the images of a unit."""
    started, begun = time.time(), time.perf_counter()
    identities = np.array(spec.grid.identities_of(unit), np.int64)
    replicates = np.array(spec.grid.replicates_of(unit), np.int64)
    stored = spec.input("contexts")
    contexts = contexts_of(stored, identities)
    chosen = stored_negatives(spec.input("negatives"), identities)
    away = _negative_contexts(stored, chosen.index, spec.input("negatives").config["rule"])
    lower_bound = _lower_bound(spec, contexts, identities)
    seconds = {"read": time.perf_counter() - begun}

    begun = time.perf_counter()
    device = device_of(execution.device)
    engine = _engine(spec, device, execution)
    seconds["warm_up"] = time.perf_counter() - begun

    times, seed = len(replicates), spec.config["seed"]
    rows = identities.repeat(times), np.tile(replicates, len(identities))
    towards = contexts.repeat(times, axis=0)
    if lower_bound is not None:
        towards = TRANSFORMS[spec.config["transform"]](towards, seed, *rows, lower_bound.repeat(times))
    shares = None if away is None else chosen.weight.repeat(times, axis=0)
    away = None if away is None else away.repeat(times, axis=0)
    with engine.turn:  # on a GPU another thread may be writing the unit before
        begun, warm_up = time.perf_counter(), engine.warm_up
        if finds_size := execution.batch_size == 0 and engine.device.type == "cuda":
            batch_sizes.recall(engine, away)
        images, clipped = engine.sample(towards, away, shares, *rows, seed)
        if finds_size:
            batch_sizes.remember(engine, away)
        captured = engine.warm_up - warm_up
        seconds["warm_up"] += captured
        seconds["sample"] = time.perf_counter() - begun - captured
    broken = np.isnan(clipped)
    images[broken] = 0
    count = len(images)
    table = rows_of(
        spec,
        {
            "identity": rows[0],
            "replicate": rows[1],
            "seed": [seed] * count,
            "negative": chosen.index[:, 0].repeat(times),
            "sampler": [spec.config["sampler"]] * count,
            "steps": [spec.config["steps"]] * count,
            "w": [spec.config["w"]] * count,
            "status": np.where(broken, "failed", "ok"),
            "error": [_NOT_FINITE if failed else None for failed in broken],
            "clipped": clipped,
        },
    )
    return commit(
        spec,
        unit,
        arrays={"image": images.reshape(len(identities), times, *images.shape[1:])},
        rows=table,
        started=started,
        seconds=seconds,
        device=describe_device(device),
    )


_NOT_FINITE = "the sampler left values that are not finite"


def _negative_contexts(stored: StageSpec, index: NDArray[np.int64], rule: str) -> NDArray[np.float32] | None:
    """Contexts `(N, K, W)` to push away from: none, the zero vector (rule null), or other identities'."""
    if rule == "none":
        return None
    if rule == "null":
        return np.zeros((*index.shape, *stored.arrays[0].item), np.float32)
    return contexts_of(stored, index.ravel()).reshape(*index.shape, -1)


def _lower_bound(
    spec: StageSpec, contexts: NDArray[np.float32], identities: NDArray[np.int64]
) -> NDArray[np.float64] | None:
    """The lowest cosine `(N,)` that the transform may leave to each identity; None if there is none."""
    if "transform" not in spec.config:
        return None
    lowest = np.full(len(identities), spec.config["lower_bound"])
    if not spec.config["safe"]:
        return lowest
    pool = StoredPool(spec.input("contexts"), spec.config["pool"])
    nearest = mine(contexts, pool, "close", 0, identities=identities).cosine[:, 0]
    return safe_lower_bound(spec.config["lower_bound"], nearest)


def sampler_settings(spec: StageSpec) -> SamplerSettings:
    """The settings of the stage's sampler, as the engine takes them."""
    taken = {name: spec.config[name] for name in SamplerSettings.__dataclass_fields__ if name in spec.config}
    taken["interval"] = (spec.config.get("interval_low", 0.0), spec.config.get("interval_high", 1.0))
    return SamplerSettings(**taken)


def _engine(spec: StageSpec, device: str, execution: ExecutionConfig) -> SamplingEngine:
    weight = spec.weights["generator"]
    with _making:
        return _cached_engine(
            weight.path,
            tuple(sorted(weight.sha256.items())),
            device,
            sampler_settings(spec),
            execution.batch_size,
            spec.config["precision"],
            execution.acceleration,
        )


# Threads that start together would otherwise each make an engine before the first has cached it.
_making = threading.Lock()


@lru_cache(maxsize=1)
def _cached_engine(
    path: str,
    hashes: tuple[tuple[str, str], ...],
    device: str,
    settings: SamplerSettings,
    batch_size: int,
    precision: str,
    acceleration: str,
) -> SamplingEngine:
    """An engine holds graphs and its own copy of the network in 16 bits, so it is made once a process."""
    generator = generator_of(Weight(path, dict(hashes)), device)
    return SamplingEngine(generator, settings, batch_size, precision, acceleration)

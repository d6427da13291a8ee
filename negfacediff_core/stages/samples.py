"""Stage `samples`: the generator's images."""

import time
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.diffusion.engine import SamplerSettings, SamplingEngine
from negfacediff_core.diffusion.samplers import SAMPLERS
from negfacediff_core.errors import ConfigError
from negfacediff_core.stages.contexts import contexts_of
from negfacediff_core.stages.models import describe_device, device_of, generator_of, generator_weight
from negfacediff_core.store.layout import ArraySpec, Grid, StageSpec, Unit, Weight
from negfacediff_core.store.records import Record
from negfacediff_core.store.shards import commit, read_rows
from negfacediff_core.store.tables import rows_of

VERSION = 1
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
    shared = ("sampler", "w", "weight", "precision", "seed")
    config = {name: getattr(settings, name) for name in (*shared, *sampler.options)}
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


def run_unit(spec: StageSpec, unit: Unit, execution: ExecutionConfig) -> Record:
    """Sample the images of a unit."""
    started, begun = time.time(), time.perf_counter()
    identities = np.array(spec.grid.identities_of(unit), np.int64)
    replicates = np.array(spec.grid.replicates_of(unit), np.int64)
    stored = spec.input("contexts")
    contexts = contexts_of(stored, identities)
    chosen = negatives_of(spec.input("negatives"), identities)
    away = _negative_contexts(stored, chosen, spec.input("negatives").config["rule"])
    device = device_of(execution.device)
    engine = _engine(spec, device, execution.batch_size)
    read = time.perf_counter() - begun

    begun = time.perf_counter()
    times = len(replicates)
    images, clipped = engine.sample(
        contexts.repeat(times, axis=0),
        None if away is None else away.repeat(times, axis=0),
        identities.repeat(times),
        np.tile(replicates, len(identities)),
        spec.config["seed"],
    )
    seconds = {"read": read, "sample": time.perf_counter() - begun}
    broken = np.isnan(clipped)
    images[broken] = 0
    count = len(images)
    rows = rows_of(
        spec,
        {
            "identity": identities.repeat(times),
            "replicate": np.tile(replicates, len(identities)),
            "seed": [spec.config["seed"]] * count,
            "negative": chosen.repeat(times),
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
        rows=rows,
        started=started,
        seconds=seconds,
        device=describe_device(device),
    )


_NOT_FINITE = "the sampler left values that are not finite"


def negatives_of(spec: StageSpec, identities: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the stored negatives `(N,)` of identity numbers `(N,)`; -1 where the rule names none."""
    blocks, rows = np.divmod(identities, spec.grid.block_identities)
    negatives = np.empty(len(identities), np.int64)
    for block in np.unique(blocks):
        column = read_rows(spec, Unit(int(block), 0)).column("negative").to_numpy()
        negatives[blocks == block] = column[rows[blocks == block]]
    return negatives


def _negative_contexts(
    stored: StageSpec, negatives: NDArray[np.int64], rule: str
) -> NDArray[np.float32] | None:
    """Contexts to push away from: none at all, the zero vector (rule null), or those of other identities."""
    if rule == "none":
        return None
    if rule == "null":
        return np.zeros((len(negatives), *stored.arrays[0].item), np.float32)
    return contexts_of(stored, negatives)


def _engine(spec: StageSpec, device: str, batch_size: int) -> SamplingEngine:
    taken = {name: spec.config[name] for name in SamplerSettings.__dataclass_fields__ if name in spec.config}
    weight = spec.weights["generator"]
    return _cached_engine(
        weight.path,
        tuple(sorted(weight.sha256.items())),
        device,
        SamplerSettings(**taken),
        batch_size,
        spec.config["precision"],
    )


@lru_cache(maxsize=1)
def _cached_engine(
    path: str,
    hashes: tuple[tuple[str, str], ...],
    device: str,
    settings: SamplerSettings,
    batch_size: int,
    precision: str,
) -> SamplingEngine:
    """An engine holds its own copy of the network in bfloat16, so it is made once a process."""
    generator = generator_of(Weight(path, dict(hashes)), device)
    return SamplingEngine(generator, settings, batch_size, precision)

"""Units of the demo preset made by their stage: against the plain form, and overlapped."""

import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from floors import seconds_of
from plain import PlainSampler

from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.diffusion.checkpoint import load_generator
from negfacediff_core.stages.build import plan_build, run_unit
from negfacediff_core.stages.contexts import contexts_of
from negfacediff_core.stages.negatives import stored_negatives
from negfacediff_core.store.layout import StageSpec, Unit
from negfacediff_core.store.records import read_record
from negfacediff_core.store.shards import prepare
from tasks.pools import UNITS_PER_GPU, thread_pool

PRESET = Path(__file__).parents[1] / "deployments" / "presets" / "demo.yaml"


def compare_units(device: str, precision: str, images: int) -> tuple[float, float, float]:
    """Seconds of the plain form, of the stage, and of the writing in it (by the clock), without loading."""
    execution, kind = ExecutionConfig(device=device), device.partition(":")[0]
    with tempfile.TemporaryDirectory() as folder:
        build, specs = _prepared(f"{folder}/store", precision, images, 2, execution)
        # A unit holds a whole block of identities: as many are made by the plain form.
        count = build.identities
        run_unit(specs["samples"], Unit(0, 1), execution)  # loads the networks
        records = []
        here = seconds_of(lambda: records.append(run_unit(specs["samples"], Unit(0, 0), execution)), kind)
        identities = np.arange(count)
        contexts = contexts_of(specs["contexts"], identities)
        chosen = stored_negatives(specs["negatives"], identities).index[:, 0]
        negatives = contexts_of(specs["contexts"], chosen)
        generator = load_generator(build.samples.generator, device)
        options = {"steps": build.samples.steps}
        plain = PlainSampler(generator, build.samples.sampler, build.samples.w, **options)
        seconds = seconds_of(
            lambda: plain.write(Path(folder), contexts, negatives, images, build.samples.seed), kind
        )
        return seconds, here, records[0].seconds["write"]


def overlap_units(device: str, precision: str, images: int, units: int) -> dict[str, dict[str, float]]:
    """Make so many units one after the other, and as many as the threads of a build make them.

    Of either: seconds by the clock, and the share of them in which nothing was sampled.
    """
    execution, found = ExecutionConfig(device=device), {}
    with tempfile.TemporaryDirectory() as folder:
        _, specs = _prepared(f"{folder}/store", precision, images, 2 * units + 1, execution)
        spec = specs["samples"]
        first, *others = spec.grid.units()
        run_unit(spec, first, execution)  # loads the networks, and captures their graphs
        for name, threads, some in (
            ("one by one", 1, others[:units]),
            ("overlapped", UNITS_PER_GPU, others[units:]),
        ):
            with thread_pool(1, gpu_units=threads) as pool:
                begun = time.perf_counter()
                made = [
                    pool.submit(run_unit, spec, unit, execution, key=unit.name, gpu=True) for unit in some
                ]
                for future in made:
                    future.result()
                wall = time.perf_counter() - begun
            sampled = sum(read_record(spec, unit).seconds["sample"] for unit in some)
            found[name] = {"seconds": wall, "idle": 1 - sampled / wall}
    return found


def _prepared(
    store: str, precision: str, images: int, units: int, execution: ExecutionConfig
) -> tuple[BuildConfig, dict[str, StageSpec]]:
    """Plan a demo of so many units, of as many images of each identity, and make what sampling reads."""
    values = yaml.safe_load(PRESET.read_text())
    values |= {"identities": values["block_identities"], "images": units * images, "block_images": images}
    values["samples"]["precision"] = precision
    build = BuildConfig.model_validate(values)
    specs = {spec.name: spec for spec in plan_build(build, store)}
    for name in ("contexts", "negatives", "samples"):
        prepare(specs[name])
    for name in ("contexts", "negatives"):
        run_unit(specs[name], Unit(0, 0), execution)
    return build, specs

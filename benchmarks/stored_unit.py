"""A unit of the demo preset made by its stage, and the same images by the plain form."""

import tempfile
from pathlib import Path

import numpy as np
import yaml
from floors import seconds_of
from plain import PlainSampler

from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.diffusion.checkpoint import load_generator
from negfacediff_core.stages import plan_build, run_unit
from negfacediff_core.stages.contexts import contexts_of
from negfacediff_core.stages.negatives import stored_negatives
from negfacediff_core.store.layout import Unit
from negfacediff_core.store.shards import prepare

PRESET = Path(__file__).parents[1] / "deployments" / "presets" / "demo.yaml"


def compare_units(device: str, precision: str, images: int) -> tuple[float, float, float]:
    """Seconds of the plain form, of the stage, and of the writing in it (by the clock), without loading."""
    values = yaml.safe_load(PRESET.read_text())
    # A unit holds a whole block of identities: as many are made by the plain form.
    count = values["block_identities"]
    values |= {"identities": count, "images": 2 * images, "block_images": images}
    values["samples"]["precision"] = precision
    build = BuildConfig.model_validate(values)
    execution, kind = ExecutionConfig(device=device), device.partition(":")[0]
    with tempfile.TemporaryDirectory() as folder:
        specs = {spec.name: spec for spec in plan_build(build, f"{folder}/store")}
        for name in ("contexts", "negatives", "samples"):
            prepare(specs[name])
        for name in ("contexts", "negatives"):
            run_unit(specs[name], Unit(0, 0), execution)
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

"""What a build asks of its devices: its networks, counted without being loaded, and the work of each stage.

Where weights are not there yet, their usual kind is assumed, and the assumption is put into words.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from negfacediff_core.config import BuildConfig
from negfacediff_core.cost import Work, passes_of
from negfacediff_core.diffusion.checkpoint import open_release
from negfacediff_core.diffusion.engine import SamplerSettings
from negfacediff_core.diffusion.first_stage import FirstStageSettings, VQDecoder
from negfacediff_core.diffusion.unet import ConditionalUNet
from negfacediff_core.errors import WeightsError
from negfacediff_core.evaluation.bootstrap import SUBSETS
from negfacediff_core.faces.packs import Task, find_network
from negfacediff_core.operations import GIGA, decoder_gflop, onnx_gflop, unet_gflop
from negfacediff_core.stages.aligned import SIZE
from negfacediff_core.stages.models import named, resolve_weights
from negfacediff_core.stages.sizes import IMAGE_SIZE, StageSize, assumed_specs, size_of, unit_bytes
from negfacediff_core.store.layout import StageSpec

# SCRFD-10GF: 10 G multiply-adds at 640 x 480 (arXiv 2105.04714). R100: counted on this project's own.
DETECTOR_GFLOP_A_PIXEL = 2 * 10.0 / (640 * 480)
JUDGE_GFLOP = 24.2
#: Rules that compare every identity with the whole pool.
MINING_RULES = ("close", "mid", "far")
#: Sources of contexts whose time is no part of an estimate.
SLOW_SOURCES = ("folder", "two_stage", "packed")
MEGA = 1e6
# One draw of the bootstrap in one subset of 320 identities x 50 images, on one core (benchmarks/README.md).
DRAW_SECONDS = 0.08
# Levels of the published U-Net and first stage between an image and a latent.
LATENT = (3, IMAGE_SIZE // 4, IMAGE_SIZE // 4)


@dataclass(frozen=True)
class Networks:
    """The networks of a build, for their costs: `unet` and `decoder` are on the meta device.

    `generator`, `detector` and `judge` are files or folders, None where they are not there; `assumed` says
    in words what is then taken in their place.
    """

    unet: ConditionalUNet
    decoder: VQDecoder
    latent_shape: tuple[int, int, int]
    timesteps: int
    generator: Path | None
    detector: Path | None
    judge: Path | None
    detector_gflop: float
    judge_gflop: float
    assumed: tuple[str, ...]

    @property
    def missing(self) -> bool:
        """Whether weights are not there, so that the places of the stages cannot be known."""
        return None in (self.generator, self.detector, self.judge)


def networks_of(build: BuildConfig) -> Networks:
    """Find the networks of a build and count their operations; nothing but shapes is read.

    Raises `WeightsError` or `ConfigError` for weights that are there and of no use.
    """
    assumed: list[str] = []
    generator = _found(build.samples.generator)
    if generator is None:
        unet, decoder = _full_size()
        latent_shape, timesteps = LATENT, 1000
        assumed.append(
            f"there is no generator at {build.samples.generator}: the full-size network of IDiff-Face is "
            "assumed, 216 M parameters with cross-attention, 1,000 timesteps, images of 128 x 128"
        )
    else:
        with named("samples.generator"):
            release = open_release(generator)
        unet, decoder, latent_shape = release.unet, release.decoder, release.latent_shape
        timesteps = release.schedule.T
    side = build.aligned.detector_size
    detector, detector_gflop = _network(
        "aligned.detector",
        build.aligned.detector,
        "detection",
        side,
        DETECTOR_GFLOP_A_PIXEL * side * side,
        "SCRFD-10GF",
        assumed,
    )
    judge, judge_gflop = _network(
        "embeddings.judge", build.embeddings.judge, "recognition", SIZE, JUDGE_GFLOP, "a ResNet-100", assumed
    )
    return Networks(
        unet.eval(),
        decoder.eval(),
        latent_shape,
        timesteps,
        generator,
        detector,
        judge,
        detector_gflop,
        judge_gflop,
        tuple(assumed),
    )


def sampler_settings(build: BuildConfig) -> SamplerSettings:
    """The settings of a build's sampler, as the engine takes them."""
    settings = build.samples
    taken = {
        name: getattr(settings, name) for name in SamplerSettings.__dataclass_fields__ if name != "interval"
    }
    return SamplerSettings(**taken, interval=(settings.interval_low, settings.interval_high))


def passes_an_image(build: BuildConfig, networks: Networks) -> dict[int, int]:
    """The passes that one image takes: contexts in a pass -> passes, as `cost.passes_of`."""
    negatives = 0 if build.negatives.rule == "none" else build.negatives.count
    return passes_of(sampler_settings(build), networks.timesteps, negatives)


def sizes_of(specs: Sequence[StageSpec], networks: Networks) -> dict[str, StageSize]:
    """The sizes of the stages, by name; what is done is known where all weights are there."""
    return {spec.name: size_of(spec, known=not networks.missing) for spec in specs}


def specs_without_weights(build: BuildConfig, store: str) -> list[StageSpec]:
    """The stages of a build whose weights are not there, as far as their sizes go."""
    return assumed_specs(build, store)


def work_of(
    build: BuildConfig,
    specs: Sequence[StageSpec],
    sizes: Mapping[str, StageSize],
    networks: Networks,
    faces_on_gpu: bool = False,
) -> list[Work]:
    """What is left to do in each stage, in the units of the rates of a `Calibration`.

    `faces_on_gpu` says that the GPU that samples finds and embeds the faces, too.
    """
    by_name = {spec.name: spec for spec in specs}
    left = {name: size.units - size.done for name, size in sizes.items()}
    rows = {name: left[name] * size.rows // size.units for name, size in sizes.items() if size.units}
    passes = passes_an_image(build, networks)
    gflop = sum(
        count * unet_gflop(networks.unet, networks.latent_shape, contexts)
        for contexts, count in passes.items()
    )
    decoded = decoder_gflop(networks.decoder, networks.latent_shape)
    width = by_name["contexts"].arrays[0].item[0]
    pool = build.negatives.pool or build.identities
    compared = pool if build.negatives.rule in MINING_RULES else 0
    # a set that is large enough is scored in bands, by a stage of its own
    scoring = "scores" if sizes["scores"].units else "evaluation"
    share = left[scoring] / sizes[scoring].units
    judge_gflop = networks.judge_gflop * (2 if build.embeddings.flip else 1)
    return [
        Work("negatives", "mine", 2 * width * rows["negatives"] * compared / GIGA, left["negatives"]),
        Work("samples", "unet", rows["samples"] * gflop, left["samples"], on_device=True),
        Work("samples", "decoder", rows["samples"] * decoded, left["samples"], on_device=True),
        Work("aligned", "detect", rows["aligned"] * networks.detector_gflop, left["aligned"], faces_on_gpu),
        Work("embeddings", "embed", rows["embeddings"] * judge_gflop, left["embeddings"], faces_on_gpu),
        *(
            Work(name, "write", left[name] * sum(unit_bytes(by_name[name]).values()) / MEGA, left[name])
            for name in ("samples", "aligned", "embeddings")
        ),
        Work(scoring, "score", _scored_gflop(build, by_name["embeddings"]) * share, max(1, left[scoring])),
        Work("evaluation", "score", _strays_gflop(build, by_name["embeddings"]) * left["evaluation"], 1),
    ]


def not_counted(build: BuildConfig) -> list[str]:
    """What the time of a build has besides, and no estimate counts, in words."""
    left_out = ["the start of Prefect and of the workers, about 15 s"]
    if build.contexts.source in SLOW_SOURCES:
        left_out.append(f"making the contexts (source {build.contexts.source})")
    further = [
        name
        for name in ("recogniser", "quality", "attributes")
        if getattr(build.embeddings, name) is not None
    ]
    if further:
        left_out.append(f"embeddings.{', embeddings.'.join(further)}")
    if build.evaluation.bootstrap:
        minutes = math.ceil(build.evaluation.bootstrap * SUBSETS * DRAW_SECONDS / 60)
        left_out.append(f"{build.evaluation.bootstrap:,} draws for the intervals, at most {minutes} min")
    return left_out


def _scored_gflop(build: BuildConfig, embeddings: StageSpec) -> float:
    """Every pair of images once: two operations a number of an embedding."""
    identities, images = build.identities, build.images
    if build.evaluation.protocol == "paper":
        identities, images = min(identities, 1000), min(images, 20)
    return (identities * images) ** 2 * embeddings.arrays[0].item[0] / GIGA


def _strays_gflop(build: BuildConfig, embeddings: StageSpec) -> float:
    """Every image with every identity's centre: products in float64, which take twice those in float32."""
    return 4 * build.identities**2 * build.images * embeddings.arrays[0].item[0] / GIGA


def _network(
    field: str, path: str, task: Task, side: int, usual_gflop: float, usual: str, assumed: list[str]
) -> tuple[Path | None, float]:
    folder = _found(path)
    if folder is None:
        assumed.append(f"there is no network at {path}: {usual} is assumed, {usual_gflop:.1f} GFLOP an image")
        return None, usual_gflop
    with named(field):
        file = find_network(folder, task)
    counted = onnx_gflop(file, side)
    if counted is None:
        assumed.append(f"the operations of {file.name} cannot be counted: those of {usual} are assumed")
    return file, usual_gflop if counted is None else counted


@lru_cache(maxsize=1)
def _full_size() -> tuple[ConditionalUNet, VQDecoder]:
    with torch.device("meta"):
        return ConditionalUNet(), VQDecoder(FirstStageSettings())


def _found(path: str) -> Path | None:
    try:
        return resolve_weights(path)
    except WeightsError:
        return None

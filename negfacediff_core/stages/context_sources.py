"""What each context source of a build reads: hashed for the plan, and loaded for the work."""

from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.config import CONTEXT_FIELDS, BuildConfig, ContextsConfig
from negfacediff_core.contexts import (
    Contexts,
    Given,
    IdentityDistribution,
    ImageFolder,
    list_images,
    load_identities,
    load_reference,
)
from negfacediff_core.contexts.images import Embed, Generate
from negfacediff_core.diffusion.engine import SamplerSettings, SamplingEngine
from negfacediff_core.diffusion.samplers import SAMPLERS
from negfacediff_core.errors import ConfigError, ContextsError, NegFaceDiffError, WeightsError
from negfacediff_core.faces.align import align
from negfacediff_core.faces.detect import Detector, main_face
from negfacediff_core.faces.embed import Embedder
from negfacediff_core.stages.models import (
    Hashes,
    check_unchanged,
    conditioner_hash,
    detector_of,
    embedder_of,
    file_weight,
    folder_weight,
    generator_of,
    generator_weight,
    named,
    network_weight,
    resolve_weights,
)
from negfacediff_core.store.layout import StageSpec, Weight

# Lowest detection score of a face that an identity is made of.
THRESHOLD = 0.5
# Fields that stand for files, which are hashed; all others go into the stage's configuration.
_PLACES = frozenset({"file", "folder", "generator", "recogniser"})


def settings_of(contexts: ContextsConfig) -> dict[str, object]:
    """Return what the chosen source reads besides files: the rest must not move its results elsewhere."""
    fields = [name for name in CONTEXT_FIELDS[contexts.source] if name not in _PLACES and name != "count"]
    settings = {name: getattr(contexts, name) for name in fields}
    if contexts.source not in ("file", "folder"):
        settings["seed"] = contexts.seed
    if contexts.max_cosine < 1:
        settings["max_cosine"] = contexts.max_cosine
    return settings


def weights_of(build: BuildConfig) -> dict[str, Weight]:
    """Find and hash the files that the source reads, by role.

    Raises WeightsError where there is nothing, ContextsError for a folder without images, and ConfigError
    for a recogniser that the generator of the samples was not trained with.
    """
    contexts = build.contexts
    read = CONTEXT_FIELDS[contexts.source]
    weights = {}
    if contexts.file is not None:
        with named("contexts.file"):
            weights["contexts"] = embeddings_weight(contexts.file)
    if contexts.folder is not None:
        with named("contexts.folder"):
            weights["folder"] = _images_weight(contexts.folder)
    if "generator" in read:
        with named("contexts.generator"):
            weights["generator"] = generator_weight(contexts.generator)
    if "recogniser" in read:
        with named("contexts.recogniser"):
            weights["detector"] = network_weight(contexts.recogniser, "detection")
            weights["recogniser"] = network_weight(contexts.recogniser, "recognition")
        trained_with = conditioner_hash(build.samples.generator)
        if trained_with not in (None, weights["recogniser"].sha256["file"]):
            raise ConfigError(
                f"contexts.recogniser is {contexts.recogniser}, but {build.samples.generator} was trained "
                "with another recogniser, whose embeddings mean something else; give that one."
            )
    return weights


def given_of(spec: StageSpec, device: str, batch_size: int, threads: int) -> Given:
    """Load what the source of a planned stage reads; WeightsError if a file is not what was hashed."""
    config, weights = spec.config, spec.weights
    whole = config["source"] in ("file", "mixup")
    return Given(
        width=config["width"],
        reference=_reference(weights["contexts"], config["width"]) if whole else None,
        distribution=_distribution(weights["contexts"]) if config["source"] == "fitted" else None,
        margin=config.get("margin", 0.0),
        folder=_image_folder(weights["folder"]) if "folder" in weights else None,
        generate=_generate(spec, device, batch_size) if "generator" in weights else None,
        embed=_embed(spec, threads) if "recogniser" in weights else None,
        count=config.get("count", 0),
        steps=config.get("packing_steps", 0),
    )


def embed_faces(images: NDArray[np.uint8], detector: Detector, embedder: Embedder) -> NDArray[np.float32]:
    """Embed the main face of each of `(N, H, W, 3)` uint8 RGB images: `(N, width)`, NaN where there is none.

    A crop is embedded alone, so that an identity's context does not depend on those made with it.
    """
    embeddings = np.full((len(images), embedder.width), np.nan, np.float32)
    for row, (image, faces) in enumerate(zip(images, detector.detect(images), strict=True)):
        if not len(faces.scores):
            continue
        landmarks = faces.landmarks[main_face(faces, *image.shape[:2])]
        try:
            crop = align(image, landmarks, embedder.input_size)
        except NegFaceDiffError:  # landmarks that no face has
            continue
        embeddings[row] = embedder.embed(crop[None])[0]
    embeddings[~embeddings.any(axis=1)] = np.nan
    return embeddings


def embeddings_weight(path: str) -> Weight:
    """Find and hash a file of embeddings, or all files of a Zarr store, which is a folder."""
    place = resolve_weights(path)
    if not place.is_dir():
        return file_weight(path)
    return folder_weight(path, (file for file in place.rglob("*") if file.is_file()))


def _embed(spec: StageSpec, threads: int) -> Embed:
    detector = detector_of(spec.weights["detector"], spec.config["detector_size"], THRESHOLD, threads)
    embedder = embedder_of(spec.weights["recogniser"], threads)
    if embedder.width != spec.config["width"]:
        raise ContextsError(
            f"the recogniser {embedder.weights} gives embeddings of width {embedder.width}, but the "
            f"generator takes contexts of width {spec.config['width']}: give the one that it was trained with"
        )
    return partial(embed_faces, detector=detector, embedder=embedder)


def _generate(spec: StageSpec, device: str, batch_size: int) -> Generate:
    """Return a function that makes images with no context, by DDIM."""
    weight, steps = spec.weights["generator"], spec.config["steps"]
    generator = generator_of(weight, device)
    if generator.unet.is_context_conditional and not generator.unet.learn_empty_context:
        raise WeightsError(
            f"the generator {weight.path} makes faces of given identities alone: it is conditional and has "
            "learned no empty context; set contexts.generator to an unconditional one."
        )
    most = SAMPLERS["ddim"].most_steps(generator.schedule.T)
    if steps > most:
        raise ConfigError(
            f"contexts.steps is {steps}, but the generator {weight.path} has {most} timesteps; set it to "
            f"{most} or fewer."
        )
    engine = SamplingEngine(generator, SamplerSettings(sampler="ddim", steps=steps, w=0.0), batch_size)

    def generate(
        identities: NDArray[np.int64], replicates: NDArray[np.int64], seed: int
    ) -> NDArray[np.uint8]:
        made = engine.sample(
            contexts=None,
            negatives=None,
            shares=None,
            identities=identities,
            replicates=replicates,
            seed=seed,
        )
        made.images[np.isnan(made.clipped)] = 0  # no face will be found where values are not finite
        return made.images

    return generate


def _reference(weight: Weight, width: int) -> Contexts:
    check_unchanged(weight, embeddings_weight(weight.path))
    return _read_reference(weight.path, tuple(weight.sha256.items()), width)


@lru_cache(maxsize=1)
def _read_reference(path: str, hashes: Hashes, width: int) -> Contexts:
    """The unit vectors of a file, for as long as it is what was hashed."""
    return load_reference(path, width)


def _distribution(weight: Weight) -> IdentityDistribution:
    check_unchanged(weight, embeddings_weight(weight.path))
    return load_identities(weight.path)


def _image_folder(weight: Weight) -> ImageFolder:
    check_unchanged(weight, _images_weight(weight.path))
    return list_images(Path(weight.path))


def _images_weight(path: str) -> Weight:
    place = resolve_weights(path)
    if not place.is_dir():
        raise ContextsError(f"contexts.folder is {path}, which is a file: give the folder of images")
    return folder_weight(path, chain.from_iterable(list_images(place).images))

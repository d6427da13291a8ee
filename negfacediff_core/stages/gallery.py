"""Stage `gallery`: the people that generated faces must not be, as one or two recognisers see them.

An `identity` of this stage is an image of the gallery, by its number; who it shows is its `person`.
"""

import time
from collections.abc import Mapping
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.config import ExecutionConfig
from negfacediff_core.contexts import ImageFolder, list_images, load_contexts
from negfacediff_core.contexts.files import ContextsFile
from negfacediff_core.contexts.images import read_image
from negfacediff_core.errors import ContextsError, NegFaceDiffError
from negfacediff_core.faces.align import similarity_transform, warp
from negfacediff_core.faces.detect import Detector, main_face
from negfacediff_core.stages.aligned import SIZE, TEMPLATES
from negfacediff_core.stages.context_sources import embeddings_weight
from negfacediff_core.stages.models import (
    Hashes,
    check_unchanged,
    detector_of,
    embedder_of,
    folder_weight,
    named,
    resolve_weights,
)
from negfacediff_core.store.layout import ArraySpec, Grid, StageSpec, Unit, Weight
from negfacediff_core.store.records import Record
from negfacediff_core.store.shards import commit
from negfacediff_core.store.tables import rows_of

VERSION = 1
# Images of a unit: minutes of work.
BLOCK = 256
COLUMNS = (
    ("identity", "int64"),
    ("name", "string"),
    ("person", "int64"),
    ("status", "string"),
    ("error", "string"),
)
# What a folder holds that is an array store and not a folder of images.
_ZARR = ("zarr.json", ".zgroup", ".zarray")


def plan(
    store: str,
    path: str,
    recognisers: Mapping[str, Weight],
    detector: Weight,
    settings: Mapping[str, object],
) -> StageSpec:
    """Describe the stage of a gallery: a folder of images, or a file of embeddings.

    Args:
        store: folder or URL.
        path: images, one a person or a sub-folder of them a person; or embeddings, as contexts are read: one
            a person, or with names that tell who it is.
        recognisers: by role, `first` and maybe `second`.
        detector: what finds the faces in images.
        settings: `detector_size`, `threshold` and `template` of the generated images' stage `aligned`.

    Raises:
        ContextsError, WeightsError: for what cannot be read, embeddings of another width than the recogniser,
            and embeddings where two recognisers are asked, whose embeddings differ.
    """
    with named("gallery"):
        images = is_images(path)
        gallery = _images_weight(path) if images else embeddings_weight(path)
    widths = {role: embedder_of(weight, threads=1).width for role, weight in recognisers.items()}
    if images:
        count = len(_folder(gallery.path, _hashes(gallery)).paths)
        detector_of(detector, int(str(settings["detector_size"])), float(str(settings["threshold"])), 1)
    else:
        count = len(_checked_embeddings(gallery, widths).contexts)
    return StageSpec(
        store=store,
        name="gallery",
        version=VERSION,
        config={"kind": "images", **settings} if images else {"kind": "embeddings"},
        inputs={},
        grid=Grid(count, 1, BLOCK, 1, limit=count),
        weights={"gallery": gallery, "detector": detector, **recognisers} if images else {"gallery": gallery},
        arrays=tuple(ArraySpec(f"{role}_embedding", "f4", (width,)) for role, width in widths.items()),
        columns=COLUMNS,
        per_replicate=False,
    )


def run_unit(spec: StageSpec, unit: Unit, execution: ExecutionConfig) -> Record:
    """Embed a unit of the gallery's images, or take its rows from the file; where no face is it is zero."""
    started, begun = time.time(), time.perf_counter()
    numbers = np.array(spec.grid.identities_of(unit), np.int64)
    make = _from_images if spec.config["kind"] == "images" else _from_file
    arrays, columns = make(spec, numbers, execution.threads_per_worker)
    return commit(
        spec,
        unit,
        arrays=arrays,
        rows=rows_of(spec, {"identity": numbers, **columns}),
        started=started,
        seconds={"embed": time.perf_counter() - begun},
        device="cpu",
    )


def is_images(path: str) -> bool:
    """Tell whether a gallery is a folder of images; everything else is a file of embeddings."""
    place = resolve_weights(path)
    return place.is_dir() and not any((place / name).exists() for name in _ZARR)


def crop_images(
    spec: StageSpec, numbers: NDArray[np.int64], threads: int
) -> tuple[NDArray[np.uint8], list[tuple[str, str | None] | None]]:
    """Align the main faces of images of a gallery's folder, by their numbers `(N,)`.

    Returns the crops `(N, 112, 112, 3)` uint8 RGB and, where there is none, its status and error.
    """
    gallery = spec.weights["gallery"]
    paths = _folder(gallery.path, _hashes(gallery)).paths
    detector = detector_of(
        spec.weights["detector"], spec.config["detector_size"], spec.config["threshold"], threads
    )
    crops = np.zeros((len(numbers), SIZE, SIZE, 3), np.uint8)
    template = TEMPLATES[spec.config["template"]]
    problems = [
        _crop(paths[number], detector, template, crop) for number, crop in zip(numbers, crops, strict=True)
    ]
    return crops, problems


def people_listed(spec: StageSpec) -> NDArray[np.int64]:
    """Return the person of each row `(M,)` of a gallery that is planned, whether a face is found or not."""
    gallery = spec.weights["gallery"]
    if spec.config["kind"] == "images":
        return np.array(_folder(gallery.path, _hashes(gallery)).people, np.int64)
    contexts, names = _embeddings(gallery.path, _hashes(gallery))
    return np.unique(names, return_inverse=True)[1] if names else np.arange(len(contexts))


def image_path(spec: StageSpec, name: str) -> Path:
    """Return where an image of the gallery lies, by its name."""
    return Path(spec.weights["gallery"].path, name)


class _Listing(NamedTuple):
    """The images of a folder in order, with the number of the person on each."""

    paths: tuple[Path, ...]
    people: tuple[int, ...]


def _from_images(
    spec: StageSpec, numbers: NDArray[np.int64], threads: int
) -> tuple[dict[str, NDArray], dict[str, object]]:
    gallery = spec.weights["gallery"]
    listing = _folder(gallery.path, _hashes(gallery))
    crops, problems = crop_images(spec, numbers, threads)
    usable = np.array([problem is None for problem in problems])
    arrays = {}
    for array in spec.arrays:
        embeddings = np.zeros((len(numbers), *array.item), np.float32)
        if usable.any():
            embedder = embedder_of(spec.weights[array.name.removesuffix("_embedding")], threads)
            embeddings[usable] = embedder.embed(crops[usable])
        arrays[array.name] = embeddings
    for embeddings in arrays.values():
        lengths = np.linalg.norm(embeddings, axis=1)
        for row in np.flatnonzero(usable & ~(np.isfinite(lengths) & (lengths > 0))):
            problems[row] = problems[row] or ("failed", "its embedding is not finite or zero")
            embeddings[row] = 0
    return arrays, {
        "name": [listing.paths[number].relative_to(gallery.path).as_posix() for number in numbers],
        "person": [listing.people[number] for number in numbers],
        "status": ["ok" if problem is None else problem[0] for problem in problems],
        "error": [None if problem is None else problem[1] for problem in problems],
    }


def _from_file(
    spec: StageSpec, numbers: NDArray[np.int64], threads: int
) -> tuple[dict[str, NDArray], dict[str, object]]:
    widths = {array.name.removesuffix("_embedding"): array.item[0] for array in spec.arrays}
    contexts, names = _checked_embeddings(spec.weights["gallery"], widths)
    people = people_listed(spec)
    return {"first_embedding": contexts[numbers]}, {
        "name": [names[number] if names else str(number) for number in numbers],
        "person": people[numbers],
        "status": ["ok"] * len(numbers),
        "error": [None] * len(numbers),
    }


def _crop(
    path: Path, detector: Detector, template: NDArray[np.float64], crop: NDArray[np.uint8]
) -> tuple[str, str | None] | None:
    """Fill `crop` with the aligned main face of an image; returns status and error where there is none."""
    image = read_image(path)
    if image is None:
        return "failed", "it cannot be read"
    faces = detector.detect(image[None])[0]
    if not len(faces.scores):
        return "no_face", None
    landmarks = faces.landmarks[main_face(faces, *image.shape[:2])]
    try:
        crop[:] = warp(image, similarity_transform(landmarks, template), SIZE)
    except NegFaceDiffError as error:
        return "failed", str(error)
    return None


def _images_weight(path: str) -> Weight:
    return folder_weight(path, chain.from_iterable(list_images(resolve_weights(path)).images))


def _hashes(weight: Weight) -> Hashes:
    return tuple(sorted(weight.sha256.items()))


@lru_cache(maxsize=2)
def _folder(path: str, hashes: Hashes) -> _Listing:
    """The images of a folder that is what was hashed; WeightsError if it is not."""
    check_unchanged(Weight(path, dict(hashes)), _images_weight(path))
    folder: ImageFolder = list_images(Path(path))
    people = [[person] * len(images) for person, images in enumerate(folder.images)]
    return _Listing(tuple(chain.from_iterable(folder.images)), tuple(chain.from_iterable(people)))


def _checked_embeddings(gallery: Weight, widths: Mapping[str, int]) -> ContextsFile:
    """Read a gallery's embeddings; ContextsError where they cannot be compared with the recogniser's."""
    if len(widths) > 1:
        raise ContextsError(
            f"the gallery {gallery.path} holds embeddings, which are of one recogniser, but two are asked: "
            "give one recogniser, the one that made them, or the folder of images"
        )
    file = _embeddings(gallery.path, _hashes(gallery))
    (width,) = widths.values()
    if file.contexts.ndim != 2 or file.contexts.shape[1] != width or not len(file.contexts):
        raise ContextsError(
            f"the gallery {gallery.path} holds embeddings {file.contexts.shape}, but those of the recogniser "
            f"are (images, {width}): give the recogniser that made them"
        )
    lengths = np.linalg.norm(file.contexts, axis=1)
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(bad):
        raise ContextsError(
            f"the gallery {gallery.path} has {len(bad)} rows that are not finite or zero (the first is row "
            f"{bad[0]}): take them out"
        )
    return file


@lru_cache(maxsize=1)
def _embeddings(path: str, hashes: Hashes) -> ContextsFile:
    check_unchanged(Weight(path, dict(hashes)), embeddings_weight(path))
    return load_contexts(path)

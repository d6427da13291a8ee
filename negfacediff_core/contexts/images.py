"""Contexts that are embeddings of face images: of a folder of them, or of what a generator makes unasked.

The images go through `Embed`, which finds the face in each, aligns it and embeds it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from negfacediff_core import noise
from negfacediff_core.contexts.vectors import Contexts, normalise
from negfacediff_core.errors import ContextsError

#: `(N, H, W, 3)` uint8 RGB images to `(N, width)` float32 embeddings; NaN where there is no face.
Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
#: (identities `(N,)`, replicates `(N,)`, seed) to `(N, H, W, 3)` uint8 RGB images, by a generator's noise.
Generate = Callable[[NDArray[np.int64], NDArray[np.int64], int], NDArray[np.uint8]]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
#: Images that are tried for one context before the generator is given up.
TRIES = 16
# Files that an error names; the rest are counted.
_NAMED = 3
# Takes the place of the step in the counter of the stream CONTEXTS, where `draws` has 0 and 1.
_SEEDS = 2


class ImageFolder(NamedTuple):
    """Images by identity: `names` `(N,)` in order, and of each identity the paths of its `images`."""

    names: tuple[str, ...]
    images: tuple[tuple[Path, ...], ...]


def list_images(folder: Path) -> ImageFolder:
    """List a folder that holds either one image an identity, or one sub-folder of images an identity.

    Identities are sorted by name, character by character (10.png stands before 2.png), as are an identity's
    images. Hidden files and files that are no images, by their suffix, are passed over. Raises ContextsError
    for a folder without images, with both images and sub-folders, or with sub-folders that hold none.
    """
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    images = [path for path in inside if _is_image(path)]
    folders = [path for path in inside if path.is_dir()]
    if images and folders:
        raise ContextsError(
            f"the folder {folder} holds both images ({_some(images)}) and folders ({_some(folders)}): give "
            "one image an identity, or one sub-folder an identity"
        )
    if not images and not folders:
        raise ContextsError(
            f"the folder {folder} holds no images: put one image an identity there, or one sub-folder of "
            f"images an identity ({', '.join(SUFFIXES)})"
        )
    groups = [tuple(sorted(filter(_is_image, each.iterdir()))) for each in folders]
    empty = [each for each, group in zip(folders, groups, strict=True) if not group]
    if empty:
        raise ContextsError(
            f"these sub-folders of {folder} hold no images: {_some(empty)}; every identity needs one at least"
        )
    if folders:
        return ImageFolder(tuple(each.name for each in folders), tuple(groups))
    return ImageFolder(tuple(each.name for each in images), tuple((each,) for each in images))


def read_image(path: Path) -> NDArray[np.uint8] | None:
    """Read an image as `(H, W, 3)` uint8 RGB, upright; None for one that cannot be read."""
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception:  # pillow raises a dozen unrelated types for a damaged file
        return None


def from_folder(identities: NDArray[np.int64], folder: ImageFolder, embed: Embed) -> Contexts:
    """Embed the identities numbered `(N,)`: of each, the mean of its images' unit embeddings, `(N, W)`.

    An image without a face is left out; ContextsError, naming the first few, where an identity has no face at
    all or an image cannot be read.
    """
    contexts, faceless, unreadable = [], [], []
    for identity in identities:
        images = {path: read_image(path) for path in folder.images[identity]}
        unreadable += [path for path, image in images.items() if image is None]
        faces = [embed(image[None])[0] for image in images.values() if image is not None]
        seen = [face for face in faces if np.isfinite(face).all()]
        if seen:
            contexts.append(normalise(np.array(seen)).mean(axis=0))
        else:
            faceless.append(folder.images[identity][0])
    if unreadable:
        raise ContextsError(
            f"{len(unreadable)} images cannot be read: {_some(unreadable)}; mend these files or take them out"
        )
    if faceless:
        raise ContextsError(
            f"{len(faceless)} identities show no face in any of their images: {_some(faceless)}; take them "
            "out, or set contexts.detector_size so that faces are found"
        )
    return normalise(np.array(contexts))


def two_stage(
    seed: int,
    identities: NDArray[np.int64],
    generate: Generate,
    embed: Embed,
    attempts: NDArray[np.int64] | None = None,
) -> Contexts:
    """Embed the face in an image that a generator makes unconditionally ("two-stage", arXiv 2308.04995).

    `identities` `(N,)` and `attempts` `(N,)` (None: all 0) number the images; where there is no face, further
    ones are made, up to TRIES for an attempt. The generator's seed is derived from `seed`, so that these are
    no images of the dataset. Returns `(N, W)`; ContextsError if all tries for an identity fail.
    """
    own_seed = int(noise.uniform(seed, [0], [0], _SEEDS, (1,), stream=noise.CONTEXTS).item() * 2**53)
    first = np.zeros_like(identities) if attempts is None else attempts * TRIES
    missing = np.arange(len(identities))
    parts: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
    for attempt in range(TRIES):
        images = generate(identities[missing], first[missing] + attempt, own_seed)
        embeddings = embed(images)
        seen = np.isfinite(embeddings).all(axis=1)
        parts.append((missing[seen], embeddings[seen]))
        missing = missing[~seen]
        if not len(missing):
            rows, found = (np.concatenate(each) for each in zip(*parts, strict=True))
            return normalise(found[np.argsort(rows)])
    raise ContextsError(
        f"the generator made no face for {len(missing)} of {len(identities)} identities in {TRIES} images "
        f"each (first: identity {identities[missing[0]]}): give another generator, or more steps"
    )


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _some(paths: Sequence[Path]) -> str:
    """Name the first few: "a.png, b.png, c.png and 4 more"."""
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return ", ".join(str(Path(path.parent.name, path.name)) for path in paths[:_NAMED]) + more

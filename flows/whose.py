"""`negfacediff whose`: does an image come from a store?"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from flows.resume import Store
from flows.words import count_text, names_text
from negfacediff_core.errors import ConfigError

if TYPE_CHECKING:
    from negfacediff_core.stages.origin import Origin

# Exit code where no image comes from the store; bad input has another.
NOT_FROM_THERE = 1


def whose(
    image: Annotated[Path, typer.Argument(help="An image, or a folder of images.")],
    store: Store,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read images and the store.")] = 4,
) -> None:
    """Say whether an image was made in a store, and which one it is: same pixels, or recompressed or resized.

    Every image of the store is looked at, as it was generated and as it was aligned. The exit code is 0 if
    some image comes from there, and 1 if none does; images that cannot be read are named, and count for
    neither.
    """
    from flows.progress import CallbackBar
    from negfacediff_core.contexts.images import SUFFIXES
    from negfacediff_core.stages.origin import find_origins
    from negfacediff_core.store.status import check_store

    check_store(store)
    if not image.exists():
        raise ConfigError(f"There is no image {image}: check the path.")
    paths = [image]
    if image.is_dir():
        paths = sorted(path for path in image.rglob("*") if path.suffix.lower() in SUFFIXES)
    hashes, unread = _hashes(paths, workers)
    compared = [path for path in paths if path not in unread]
    if not compared:
        reasons = names_text([f"{path} ({reason})" for path, reason in unread.items()]) if unread else "empty"
        raise ConfigError(f"No image ({', '.join(SUFFIXES)}) can be compared at {image}: {reasons}.")
    with CallbackBar("compare", "units") as bar:
        origins = find_origins(store, hashes, lambda number: _pixels(compared[number]), workers, bar)
    lines = {path: _line(origin, store) for path, origin in zip(compared, origins, strict=True)}
    lines |= {path: f"not compared, {reason}" for path, reason in unread.items()}
    for path in paths:
        print(f"{path}: {lines[path]}.")
    found = sum(origin.found for origin in origins)
    if len(paths) > 1:
        left = f", {len(unread):,} not compared" if unread else ""
        print(f"{count_text(len(paths), 'image')}: {found:,} from there, {len(origins) - found:,} not{left}.")
    if not found:
        raise typer.Exit(NOT_FROM_THERE)


def _hashes(paths: list[Path], threads: int) -> tuple[NDArray[np.uint8], dict[Path, str]]:
    """Hash the images at the paths, `(M, 32)`, and say of the others why they have none."""
    from negfacediff_core.export.perceptual import LOWEST, image_hash

    def hash_of(path: Path) -> NDArray[np.uint8] | str:
        picture = _pixels(path)
        if min(picture.shape) == 0:
            return "no image that can be read"
        if min(picture.shape[:2]) < LOWEST:
            return f"too small: an image has {LOWEST} x {LOWEST} pixels at least"
        return image_hash(picture[None])

    with ThreadPoolExecutor(threads) as pool:
        made = dict(zip(paths, pool.map(hash_of, paths), strict=True))
    unread = {path: one for path, one in made.items() if isinstance(one, str)}
    hashes = [one for one in made.values() if not isinstance(one, str)]
    return np.concatenate([np.empty((0, 32), np.uint8), *hashes]), unread


def _pixels(path: Path) -> NDArray[np.uint8]:
    """Read an image; one of no pixels where that cannot be."""
    from negfacediff_core.contexts.images import read_image

    picture = read_image(path)
    return np.empty((0, 0, 3), np.uint8) if picture is None else picture


def _line(origin: "Origin", store: str) -> str:
    """What is said of an image."""
    from negfacediff_core.export.perceptual import BITS
    from negfacediff_core.stages.origin import ALIKE

    if not origin.found:
        return (
            f"not from {store} (the nearest differs in {origin.distance} of {BITS} bits; up to {ALIKE} is a "
            "copy)"
        )
    how = "the same pixels" if origin.exact else f"a copy, {origin.distance} of {BITS} bits differ"
    runs = f"of the run {names_text(origin.runs)}" if origin.runs else "of no run any more"
    return f"identity {origin.identity}, image {origin.replicate} {runs}, {origin.stage} ({how})"

"""`negfacediff whose`: does an image come from a store?"""

from pathlib import Path
from typing import Annotated

import typer

from flows.resume import Store
from flows.words import names_text
from negfacediff_core.errors import ConfigError

# Exit code where no image comes from the store; bad input has another.
NOT_FROM_THERE = 1


def whose(
    image: Annotated[Path, typer.Argument(help="An image, or a folder of images.")],
    store: Store,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read the store.")] = 4,
) -> None:
    """Say whether an image was made in a store, and which one it is: same pixels, or recompressed or resized.

    Every image of the store is looked at, as it was generated and as it was aligned. The exit code is 0 if
    some image comes from there, and 1 if none does.
    """
    from flows.progress import CallbackBar
    from negfacediff_core.contexts.images import SUFFIXES, read_image
    from negfacediff_core.export.perceptual import BITS, LOWEST
    from negfacediff_core.stages.origin import ALIKE, find_origins
    from negfacediff_core.store.status import check_store

    check_store(store)
    if not image.exists():
        raise ConfigError(f"There is no image {image}: check the path.")
    paths = [image]
    if image.is_dir():
        paths = sorted(path for path in image.rglob("*") if path.suffix.lower() in SUFFIXES)
    pictures = [read_image(path) for path in paths]
    read = [(path, picture) for path, picture in zip(paths, pictures, strict=True) if picture is not None]
    if not read:
        raise ConfigError(f"{image} holds no image that can be read ({', '.join(SUFFIXES)}).")
    if small := [str(path) for path, picture in read if min(picture.shape[:2]) < LOWEST]:
        raise ConfigError(
            f"{names_text(small)}: too small, an image has {LOWEST} x {LOWEST} pixels at least."
        )
    with CallbackBar("compare", "units") as bar:
        origins = find_origins(store, [picture for _, picture in read], workers, bar)
    for (path, _), origin in zip(read, origins, strict=True):
        if not origin.found:
            print(
                f"{path}: not from {store} (the nearest differs in {origin.distance} of {BITS} bits; up to "
                f"{ALIKE} is a copy)."
            )
            continue
        how = "the same pixels" if origin.exact else f"a copy, {origin.distance} of {BITS} bits differ"
        runs = f"of the run {names_text(origin.runs)}" if origin.runs else "of no run any more"
        print(f"{path}: identity {origin.identity}, image {origin.replicate} {runs}, {origin.stage} ({how}).")
    if not any(origin.found for origin in origins):
        raise typer.Exit(NOT_FROM_THERE)

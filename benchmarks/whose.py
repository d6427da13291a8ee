"""How well `negfacediff whose` knows copies of a store's images, and how far other images stay from it.

    OMP_NUM_THREADS=1 python benchmarks/whose.py STORE RUN

The run may be any with at least a thousand images, such as that of
`./run build demo --store STORE --set identities=64 --set images=16`. Some of its images are recompressed,
resized or cropped, and count as found where the hash of the copy differs from that of the image in no more
bits than `whose` allows. All pairs of different images of the run tell how near a wrong one comes. The time
of a question is that of the whole store.
"""

import argparse
import io
import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from measure import best_seconds, machine, write_results
from numpy.typing import NDArray
from PIL import Image

from negfacediff_core.export.perceptual import BITS, distances, image_hash
from negfacediff_core.stages.origin import ALIKE, find_origins
from negfacediff_core.store.extents import read_array, read_column
from negfacediff_core.store.runs import read_run, stages_of_run

COPIED, AT_ONCE = 200, 64
Picture = Image.Image


def jpeg(picture: Picture, quality: int) -> Picture:
    """Compress and read again."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def resized(picture: Picture, by: float) -> Picture:
    """Resize with Lanczos' filter."""
    width, height = (round(by * side) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def cropped(picture: Picture, share: float) -> Picture:
    """Cut that share off at each side."""
    width, height = picture.size
    across, down = (max(1, round(share * side)) for side in picture.size)
    return picture.crop((across, down, width - across, height - down))


COPIES: dict[str, Callable[[Picture], Picture]] = {
    **{f"JPEG of quality {quality}": lambda p, q=quality: jpeg(p, q) for quality in (75, 50, 30, 10)},
    **{f"resized by {by:g}": lambda p, b=by: resized(p, b) for by in (0.5, 0.8, 3)},
    "half the size, then JPEG 50": lambda p: jpeg(resized(p, 0.5), 50),
    "twice the size, then JPEG 30": lambda p: jpeg(resized(p, 2), 30),
    "2% cut off at each side": lambda p: cropped(p, 0.02),
}


def images_of(store: str, run: str, stage: str) -> NDArray[np.uint8]:
    """Read the images `(N, H, W, 3)` of a run that are ok."""
    content, specs = read_run(store, run), stages_of_run(store, run)
    if content is None or stage not in specs:
        raise SystemExit(f"there is no run {run} with images in {store}: see negfacediff status {store}")
    extent = content["stages"][stage]["identities"], content["stages"][stage]["replicates"]
    images = read_array(specs[stage], "image", *extent)
    return images[read_column(specs[stage], "status", *extent) == "ok"]


def found(images: NDArray[np.uint8], copy: Callable[[Picture], Picture]) -> float:
    """The share of copies that are known for what they are."""
    chosen = images[np.linspace(0, len(images) - 1, COPIED).astype(int)]
    copies = [np.asarray(copy(Image.fromarray(image))) for image in chosen]
    hashes = np.concatenate([image_hash(one[None]) for one in copies])
    return float((distances(hashes, image_hash(chosen)).diagonal() <= ALIKE).mean())


def nearest_other(images: NDArray[np.uint8]) -> tuple[int, int]:
    """The least distance of two different images, and the number of pairs."""
    hashes, least = image_hash(images), BITS + 1
    for start in range(0, len(hashes), AT_ONCE):
        apart = distances(hashes[start : start + AT_ONCE], hashes[start:])
        apart[np.arange(len(apart)), np.arange(len(apart))] = BITS + 1
        least = min(least, int(apart.min()))
    return least, len(hashes) * (len(hashes) - 1) // 2


def asked(store: str, image: NDArray[np.uint8]) -> dict[str, float]:
    """Processor seconds of the first question to a store, which hashes its images, and of the second."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache

        def ask() -> Any:
            return find_origins(store, image_hash(image[None]), lambda _: image, 1, lambda *_: None)

        first, second = best_seconds(ask, 1), best_seconds(ask)
    return {"first_s": first, "second_s": second}


def main() -> None:
    """Run and print everything; write `results/whose.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("run")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "copies": COPIED, "alike": ALIKE}
    for stage in ("aligned", "samples"):
        images = images_of(arguments.store, arguments.run, stage)
        least, pairs = nearest_other(images)
        print(f"{stage}: {images.shape[2]}x{images.shape[1]}; nearest of {pairs:,} pairs: {least} bits")
        shares = {}
        for name, copy in COPIES.items():
            shares[name] = found(images, copy)
            print(f"  {name:>30} {shares[name]:>6.0%}")
        results[stage] = {"found": shares, "pairs": pairs, "nearest_other": least}
    times = results["question"] = asked(arguments.store, images[0])
    print(
        f"a question to the store, processor time: {times['first_s']:.2f} s the first time, then "
        f"{times['second_s']:.2f} s"
    )
    print(f"written to {write_results('whose', results)}")


if __name__ == "__main__":
    main()

"""Whether an image comes from a store: it is compared with every image there, as generated and as aligned."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.export.perceptual import BITS, distances
from negfacediff_core.stages.unit_hashes import unit_hashes, unit_images
from negfacediff_core.store.layout import StageSpec, Unit
from negfacediff_core.store.records import committed
from negfacediff_core.store.runs import read_runs
from negfacediff_core.store.status import stages

#: Bits in which the hashes of an image and of its recompressed or resized copy differ at most.
ALIKE = 24
# Stages that hold images.
_HELD = ("samples", "aligned")
# Pairs of hashes that a thread compares at a time: a few tens of megabytes.
_COMPARED = 1 << 21
# Added to the distance of images whose pixels differ: equal ones come first.
_DIFFER = BITS + 1


class Origin(NamedTuple):
    """The image of a store that is nearest to one in question.

    `distance` counts the bits in which their hashes differ, and `exact` says that all pixels are equal. It is
    the image `replicate` of `identity` in the stage directory `stage`; `runs` are those that it is part of.
    """

    distance: int
    exact: bool
    stage: str
    identity: int
    replicate: int
    runs: tuple[str, ...] = ()

    @property
    def found(self) -> bool:
        """Whether the image comes from there, as far as its hash can tell."""
        return self.exact or self.distance <= ALIKE


class _Nearest(NamedTuple):
    """Of each image in question `(M,)` the nearest one: the distance, with _DIFFER, and its numbers."""

    apart: NDArray[np.int64]
    identity: NDArray[np.int64]
    replicate: NDArray[np.int64]


def find_origins(
    store: str,
    hashes: NDArray[np.uint8],
    read: Callable[[int], NDArray[np.uint8]],
    threads: int,
    progress: Callable[[int, int], None],
) -> list[Origin]:
    """Return for each image in question the nearest one of all committed units of a store.

    Args:
        store: folder or URL.
        hashes: of the images, `(M, 32)`, as `image_hash` makes them.
        read: returns image number m, `(H, W, 3)` RGB. It is called from any thread, for images whose hash is
            like that of a stored one.
        threads: units that are looked through at a time.
        progress: is told how many units were looked through, and how many there are.

    Raises:
        StoreError: if a unit whose images are needed is damaged.
    """
    work = [(spec, unit) for spec in stages(store) if spec.name in _HELD for unit in committed(spec)]
    nearest = _nothing(len(hashes))
    owner = np.full(len(hashes), -1)  # the place in `work`
    progress(0, len(work))
    with ThreadPoolExecutor(threads) as pool:
        # a few at a time: what waits to be compared is as large as the questions are many
        for start in range(0, len(work), 4 * threads):
            some = work[start : start + 4 * threads]
            parts = pool.map(lambda each: _nearest(each[0], each[1], hashes, read), some)
            for place, found in enumerate(parts, start=start):
                # all else equal, what is found first stays
                nearer = found.apart < nearest.apart
                owner[nearer] = place
                for mine, theirs in zip(nearest, found, strict=True):
                    mine[nearer] = theirs[nearer]
                progress(place + 1, len(work))
    runs = read_runs(store)
    directories = [work[place][0].path if place >= 0 else "" for place in owner]
    return [
        _origin(int(apart), directory, int(identity), int(replicate), runs)
        for directory, apart, identity, replicate in zip(directories, *nearest, strict=True)
    ]


def _nothing(count: int) -> _Nearest:
    """What stands for images that nothing is near to."""
    return _Nearest(np.full(count, _DIFFER + BITS + 1), np.full(count, -1), np.full(count, -1))


def _nearest(
    spec: StageSpec, unit: Unit, hashes: NDArray[np.uint8], read: Callable[[int], NDArray[np.uint8]]
) -> _Nearest:
    """The nearest image of a unit to each in question; pixels are read of those whose hashes are alike."""
    stored = unit_hashes(spec, unit)
    if not len(stored):
        return _nothing(len(hashes))
    pixels: NDArray[np.uint8] | None = None
    apart, place = np.empty(len(hashes), np.int64), np.empty(len(hashes), np.int64)
    step = max(1, _COMPARED // len(stored))
    for start in range(0, len(hashes), step):
        part = distances(hashes[start : start + step], stored["hash"])
        place[start : start + step] = part.argmin(axis=1)
        least = part.min(axis=1)
        apart[start : start + step] = _DIFFER + least.astype(np.int64)
        for row in np.flatnonzero(least <= ALIKE):
            pixels = unit_images(spec, unit, stored) if pixels is None else pixels
            image = read(start + int(row))
            alike = np.flatnonzero(part[row] <= ALIKE)
            equal = next((index for index in alike if np.array_equal(image, pixels[index])), None)
            if equal is not None:
                place[start + row], apart[start + row] = equal, part[row, equal]
    return _Nearest(apart, stored["identity"][place], stored["replicate"][place])


def _origin(apart: int, directory: str, identity: int, replicate: int, runs: dict[str, dict]) -> Origin:
    exact = apart < _DIFFER
    found = Origin(apart if exact else apart - _DIFFER, exact, directory, identity, replicate)
    return found._replace(runs=_runs_of(found, runs))


def _runs_of(one: Origin, runs: dict[str, dict]) -> tuple[str, ...]:
    """The runs whose extent in the stage directory holds an image."""
    name, _, digest = one.stage.partition("/")
    return tuple(
        run
        for run, content in runs.items()
        if (place := content["stages"].get(name)) is not None
        and place["fingerprint"] == digest
        and one.identity < place["identities"]
        and one.replicate < place["replicates"]
    )

"""Whether an image comes from a store: it is compared with every image there, as generated and as aligned."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.export.perceptual import BITS, distances, image_hash
from negfacediff_core.store.layout import StageSpec, Unit
from negfacediff_core.store.records import committed
from negfacediff_core.store.runs import read_runs
from negfacediff_core.store.shards import read_arrays, read_rows
from negfacediff_core.store.status import stages

#: Bits in which the hashes of an image and of its recompressed or resized copy differ at most.
ALIKE = 24
# Stages that hold images.
_HELD = ("samples", "aligned")


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


def find_origins(
    store: str, images: Sequence[NDArray[np.uint8]], threads: int, progress: Callable[[int, int], None]
) -> list[Origin]:
    """Return for each image `(H, W, 3)` RGB the nearest one of all committed units of a store.

    `progress` is told how many units were looked through, and how many there are. Every unit is read once,
    whatever the number of images.

    Raises:
        StoreError: if a unit is damaged.
    """
    nearest = [Origin(BITS + 1, False, "", -1, -1)] * len(images)
    hashes = np.concatenate([image_hash(image[None]) for image in images])
    work = [(spec, unit) for spec in stages(store) if spec.name in _HELD for unit in committed(spec)]
    progress(0, len(work))
    with ThreadPoolExecutor(threads) as pool:
        parts = pool.map(lambda each: _nearest(each[0], each[1], images, hashes), work)
        for done, found in enumerate(parts, start=1):
            # all else equal, what is found first stays
            nearest = [min(pair, key=_order) for pair in zip(nearest, found, strict=True)]
            progress(done, len(work))
    runs = read_runs(store)
    return [one._replace(runs=_runs_of(one, runs)) for one in nearest]


def _order(one: Origin) -> tuple[bool, int]:
    return not one.exact, one.distance


def _nearest(
    spec: StageSpec, unit: Unit, images: Sequence[NDArray[np.uint8]], hashes: NDArray[np.uint8]
) -> list[Origin]:
    """The nearest image of a unit to each; images that failed, which are black, are passed over."""
    stored, rows = read_arrays(spec, unit)["image"], read_rows(spec, unit)
    ok = np.array(rows.column("status").to_pylist()) == "ok"
    if not ok.any():
        return [Origin(BITS + 1, False, "", -1, -1)] * len(images)
    place = (
        rows.column("identity").to_numpy()[ok] - spec.grid.identities_of(unit).start,
        rows.column("replicate").to_numpy()[ok] - spec.grid.replicates_of(unit).start,
    )
    pixels = stored[place]
    apart = distances(hashes, image_hash(pixels))
    found = []
    for image, row in zip(images, apart, strict=True):
        least = int(row.argmin())
        # equal pixels have equal hashes, but not only they
        equal = [
            int(index)
            for index in np.flatnonzero(row == 0)
            if image.shape == pixels.shape[1:] and np.array_equal(image, pixels[index])
        ]
        index = equal[0] if equal else least
        found.append(
            Origin(
                distance=int(row[index]),
                exact=bool(equal),
                stage=spec.path,
                identity=int(rows.column("identity").to_numpy()[ok][index]),
                replicate=int(rows.column("replicate").to_numpy()[ok][index]),
            )
        )
    return found


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

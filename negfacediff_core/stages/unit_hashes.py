"""Perceptual hashes of a store's images, which are computed once: they are kept in the user's cache folder.

A file there is named after the SHA-256 of what a unit holds, so that a unit that was made anew has another.
What is lost with the folder is time: it is never an error that it cannot be read or written.
"""

import logging

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import StoreError
from negfacediff_core.export.perceptual import FORM, image_hash
from negfacediff_core.stages.user_cache import cache_folder
from negfacediff_core.store.layout import StageSpec, Unit, fingerprint
from negfacediff_core.store.records import read_record
from negfacediff_core.store.shards import read_arrays, read_rows
from negfacediff_core.tensor_files import replacing

logger = logging.getLogger(__name__)

#: What is kept of an image.
HASHED = np.dtype([("identity", "<i8"), ("replicate", "<i8"), ("hash", "u1", (32,))])


def unit_hashes(spec: StageSpec, unit: Unit) -> NDArray[np.void]:
    """Return the `HASHED` images `(N,)` of a unit; those that failed, which are black, are left out.

    Raises StoreError if the unit is not committed, or, where its hashes are not kept yet, damaged.
    """
    content = {"form": FORM, "files": read_record(spec, unit).sha256}
    path = cache_folder() / "hashes" / spec.fingerprint / f"{fingerprint(content)}.npy"
    try:
        kept: NDArray[np.void] = np.load(path)
        if kept.dtype == HASHED:
            return kept
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, EOFError) as error:
        logger.warning("the hashes of %s are computed anew: %s", path, error)
    made = _computed(spec, unit)
    try:
        with replacing(path) as file:
            np.save(file, made)
    except StoreError as error:
        logger.info("the hashes of a unit are not kept for the next time: %s", error)
    return made


def unit_images(spec: StageSpec, unit: Unit, hashed: NDArray[np.void]) -> NDArray[np.uint8]:
    """Read the images `(N, H, W, 3)` of a unit that are `HASHED` `(N,)`; errors as `read_arrays`."""
    images: NDArray[np.uint8] = read_arrays(spec, unit)["image"]
    return images[
        hashed["identity"] - spec.grid.identities_of(unit).start,
        hashed["replicate"] - spec.grid.replicates_of(unit).start,
    ]


def _computed(spec: StageSpec, unit: Unit) -> NDArray[np.void]:
    rows = read_rows(spec, unit)
    ok = np.array(rows.column("status").to_pylist()) == "ok"
    hashed = np.zeros(int(ok.sum()), HASHED)
    for axis in ("identity", "replicate"):
        hashed[axis] = rows.column(axis).to_numpy()[ok]
    if len(hashed):
        hashed["hash"] = image_hash(unit_images(spec, unit, hashed))
    return hashed

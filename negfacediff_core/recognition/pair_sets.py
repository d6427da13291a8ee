"""Sets of image pairs: each genuine or impostor, by which recognisers are verified, or not told."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.recognition.crop_lists import CropList
from negfacediff_core.recognition.fold_accuracy import FOLDS


@dataclass(frozen=True)
class PairSet:
    """Pairs of crops: `pairs` `(P, 2)` number the crops, `same` `(P,)` says which pairs are genuine.

    Every crop stands in `crops` once, however many pairs it is in. `folds` `(P,)` is the fold of each pair.
    `digest` is another one where anything of the set has changed; empty where that is not known.
    """

    name: str
    crops: CropList
    pairs: NDArray[np.int64]
    same: NDArray[np.bool_]
    folds: NDArray[np.int64]
    digest: str = ""


@dataclass(frozen=True)
class ComparisonList:
    """Pairs `(P, 2)` of which nobody says whether they are genuine: challenges keep that to themselves.

    For `digest` see `PairSet`.
    """

    name: str
    crops: CropList
    pairs: NDArray[np.int64]
    digest: str = ""


def digest_of(parts: Iterable[bytes]) -> str:
    """Return the SHA-256, in hexadecimal digits, of parts each of which counts with its length."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()


def file_stamp(name: str, facts: os.stat_result) -> bytes:
    """Return what tells that a file is the one that it was, without reading it: name, size, and time."""
    return f"{name} {facts.st_size} {facts.st_mtime_ns}".encode()


def check_pairs(same: NDArray[np.bool_], folds: NDArray[np.int64], where: str) -> None:
    """Raise NegFaceDiffError, naming `where`, unless there are both kinds of pairs and pairs in each fold."""
    genuine = int(same.sum())
    if not 0 < genuine < len(same):
        kind = "genuine" if genuine else "impostor"
        raise NegFaceDiffError(
            f"{where} holds {len(same):,} pairs, all of them {kind}: verification takes pairs of the same "
            "person and pairs of different people"
        )
    missing = sorted(set(range(FOLDS)) - set(folds.tolist()))
    if missing:
        raise NegFaceDiffError(
            f"{where} holds {len(same):,} pairs, of which none is in fold {missing[0]} of 0 to {FOLDS - 1}: "
            f"every one of the {FOLDS} folds needs pairs"
        )

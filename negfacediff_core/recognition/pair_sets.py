"""Sets of image pairs: each genuine or impostor, by which recognisers are verified, or not told."""

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
    """

    name: str
    crops: CropList
    pairs: NDArray[np.int64]
    same: NDArray[np.bool_]
    folds: NDArray[np.int64]


@dataclass(frozen=True)
class ComparisonList:
    """Pairs `(P, 2)` of which nobody says whether they are genuine: challenges keep that to themselves."""

    name: str
    crops: CropList
    pairs: NDArray[np.int64]


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

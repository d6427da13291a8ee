"""The table of context sources."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.contexts.draws import IdentityDistribution, fitted, mixup, uniform
from negfacediff_core.contexts.images import Embed, Generate, ImageFolder, from_folder, two_stage
from negfacediff_core.contexts.packing import packed
from negfacediff_core.contexts.vectors import Contexts, check_enough
from negfacediff_core.errors import ContextsError


@dataclass(frozen=True)
class Given:
    """What contexts are made from, besides the seed; each source takes what it needs.

    `width` is that of the generator's contexts; `reference` `(M, width)` holds unit vectors of known
    identities; `count` is the number of identities that are packed together, in `steps` steps.
    """

    width: int
    reference: Contexts | None = None
    distribution: IdentityDistribution | None = None
    margin: float = 0.25
    folder: ImageFolder | None = None
    generate: Generate | None = None
    embed: Embed | None = None
    count: int = 0
    steps: int = 0


Numbers = NDArray[np.int64]


def _uniform(seed: int, identities: Numbers, attempts: Numbers, given: Given) -> Contexts:
    return uniform(seed, identities, given.width, attempts)


def _fitted(seed: int, identities: Numbers, attempts: Numbers, given: Given) -> Contexts:
    assert given.distribution is not None
    mean, covariance, _ = given.distribution
    if len(mean) != given.width:
        raise ContextsError(
            f"the reference identities have width {len(mean)}, but the generator takes contexts of width "
            f"{given.width}: bring embeddings of the recogniser that it was trained with"
        )
    return fitted(seed, identities, mean, covariance, attempts)


def _file(seed: int, identities: Numbers, attempts: Numbers, given: Given) -> Contexts:
    assert given.reference is not None
    check_enough(len(given.reference), int(np.max(identities, initial=-1)) + 1)
    return given.reference[identities]


def _mixup(seed: int, identities: Numbers, attempts: Numbers, given: Given) -> Contexts:
    assert given.reference is not None
    return mixup(seed, identities, given.reference, given.margin, attempts)


def _folder(seed: int, identities: Numbers, attempts: Numbers, given: Given) -> Contexts:
    assert given.folder is not None and given.embed is not None
    return from_folder(identities, given.folder, given.embed)


def _two_stage(seed: int, identities: Numbers, attempts: Numbers, given: Given) -> Contexts:
    assert given.generate is not None and given.embed is not None
    return two_stage(seed, identities, given.generate, given.embed, attempts)


def _packed(seed: int, identities: Numbers, attempts: Numbers, given: Given) -> Contexts:
    return packed(seed, given.count, given.width, given.steps)[identities]


#: Each source gives unit contexts `(N, width)` of (seed, identities `(N,)`, attempts `(N,)`, what is given).
SOURCES: dict[str, Callable[[int, Numbers, Numbers, Given], Contexts]] = {
    "uniform": _uniform,
    "fitted": _fitted,
    "file": _file,
    "folder": _folder,
    "two_stage": _two_stage,
    "mixup": _mixup,
    "packed": _packed,
}

#: Sources of which another attempt gives another context; the others have one for each identity.
REDRAWN = frozenset({"uniform", "fitted", "mixup", "two_stage"})

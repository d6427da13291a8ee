"""Score files of the challenge FRCSyn (arXiv 2404.10378): `<dataset>/baseline.txt` and `proposed.txt`.

A line is that of a comparison, in their order: `score,decision`. The score is the cosine of both embeddings,
the decision 1 (the same person) where it is above a threshold and 0 elsewhere. The challenge admits nothing
but training data for the choice of that threshold.
"""

from collections.abc import Callable, Sequence
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import ConfigError
from negfacediff_core.evaluation.distributions import unit_vectors
from negfacediff_core.recognition.embedding import Embedding, embed_all
from negfacediff_core.recognition.fold_accuracy import best_threshold
from negfacediff_core.recognition.ijbc import TemplateSet
from negfacediff_core.recognition.pair_sets import PairSet
from negfacediff_core.recognition.verification_sets import VerificationSet
from negfacediff_core.recognition.verify import pair_scores

#: Below the folder of the tables, that of the score files.
FOLDER = "frcsyn"


def score_path(dataset: str, system: str) -> str:
    """Return where the score file of a dataset lies, below the folder of the tables."""
    return f"{FOLDER}/{dataset}/{system}.txt"


def systems(recognisers: Sequence[str]) -> dict[str, str]:
    """Return which of the challenge's systems each recogniser is: of two, the first one is the baseline.

    Raises ConfigError for more than two.
    """
    if len(recognisers) > 2:
        raise ConfigError(
            f"FRCSyn compares a proposed system with a baseline, and {len(recognisers)} recognisers are "
            "given: give the baseline first, and the proposed one second; or the proposed one alone"
        )
    return dict(zip(recognisers, ("baseline", "proposed")[-len(recognisers) :], strict=True))


def check_datasets(tested: Sequence[VerificationSet]) -> None:
    """Raise ConfigError for sets that have no score files: templates, and names that no folder can have."""
    for one in tested:
        if isinstance(one, TemplateSet):
            raise ConfigError(
                f"{one.name} is a set of templates: FRCSyn's score files are of pairs; leave it out"
            )
        if PurePath(one.name).name != one.name:
            raise ConfigError(
                f"no folder of score files can be called {one.name!r}: name the set, PATH,name=NAME"
            )


def threshold_pairs(found: Sequence[VerificationSet]) -> PairSet:
    """Return the one set of pairs that a threshold is chosen on; ConfigError if it is something else."""
    if len(found) != 1 or not isinstance(found[0], PairSet):
        raise ConfigError(
            "FRCSyn's threshold is chosen on one set of pairs that are said to be genuine or impostor: give "
            "a list of path1,path2,same, or a .bin, of the training data"
        )
    return found[0]


def choose_threshold(
    pairs: PairSet, how: Embedding, committed: Callable[[int], None] = lambda count: None
) -> float:
    """Return the cosine above which most of the pairs are judged rightly; `committed` as of `embed_all`."""
    unit = unit_vectors(embed_all(pairs.crops, how, committed))
    distances = pair_scores(unit, pairs.pairs)[1]
    return 1 - best_threshold(distances, pairs.same) / 2


def score_file(cosines: NDArray[np.floating], threshold: float) -> bytes:
    """Return the file of comparisons with these cosines `(P,)`."""
    return "".join(f"{cosine:.6f},{cosine > threshold:d}\n" for cosine in cosines.tolist()).encode()

"""Identity contexts: float32 unit vectors `(identities, width)` that a generator is conditioned on.

`sources` is the table of where they come from; `draws`, `images`, `files` and `packing` are its rows.
`unique` keeps identities apart; `vectors` says what is wrong with contexts and how close the closest are.
"""

from negfacediff_core.contexts.draws import IdentityDistribution, fit_identities, fitted, mixup, uniform
from negfacediff_core.contexts.files import ContextsFile, load_contexts, load_identities, load_reference
from negfacediff_core.contexts.images import ImageFolder, from_folder, list_images, two_stage
from negfacediff_core.contexts.packing import pack, packed
from negfacediff_core.contexts.sources import REDRAWN, SOURCES, Given
from negfacediff_core.contexts.unique import Unique, check_distinct, check_possible, draw_unique
from negfacediff_core.contexts.vectors import (
    Closest,
    Contexts,
    check_contexts,
    check_enough,
    closest,
    lowest_worst_cosine,
    normalise,
)

__all__ = [
    "REDRAWN",
    "SOURCES",
    "Closest",
    "Contexts",
    "ContextsFile",
    "Given",
    "IdentityDistribution",
    "ImageFolder",
    "Unique",
    "check_contexts",
    "check_distinct",
    "check_enough",
    "check_possible",
    "closest",
    "draw_unique",
    "fit_identities",
    "fitted",
    "from_folder",
    "list_images",
    "load_contexts",
    "load_identities",
    "load_reference",
    "lowest_worst_cosine",
    "mixup",
    "normalise",
    "pack",
    "packed",
    "two_stage",
    "uniform",
]

"""Which other identities each identity is pushed away from: the rules, and exact search in bounded memory."""

from negfacediff_core.negatives.memory import MEMORY, Blocks, plan_blocks
from negfacediff_core.negatives.rules import (
    NO_NEGATIVE,
    RULES,
    WEIGHTS,
    Negatives,
    check_negatives,
    mine,
)
from negfacediff_core.negatives.search import Pool

__all__ = [
    "MEMORY",
    "NO_NEGATIVE",
    "RULES",
    "WEIGHTS",
    "Blocks",
    "Negatives",
    "Pool",
    "check_negatives",
    "mine",
    "plan_blocks",
]

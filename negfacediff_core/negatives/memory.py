"""How much of a search is held at once: block sizes, and the bytes they take, from sizes alone."""

import math
from typing import NamedTuple

from negfacediff_core.errors import ContextsError

#: Bytes that a search takes unless told otherwise: a tenth of a small machine's memory.
MEMORY = 512 * 2**20

# The blocks at full size: wide enough for a matrix product at its full rate, small enough that several
# workers share a machine.
_ROWS, _POOL, _PAIRS = 1024, 8192, 2**21
_EXAMINED, _SCORED = 2**18, 2**15
# What Python and its libraries allocate around the arrays, whatever their size.
_OVERHEAD = 2**16


class Blocks(NamedTuple):
    """Sizes of what a search holds at once, and `bytes`, an upper bound on what it allocates.

    `rows` contexts are compared with `pool` rows of the pool. Of their similarities, `examined` rows at a
    time are looked at closely, and `scored` pairs at a time are scored in float64. The rule mid keeps `pairs`
    candidates.
    """

    rows: int
    pool: int
    examined: int
    scored: int
    pairs: int
    bytes: int


def plan_blocks(rows: int, pool: int, width: int, count: int, limit: int = MEMORY) -> Blocks:
    """Return the largest blocks with which `rows` contexts are searched in `pool` x `width` for `count` each.

    The bytes hold for every rule, the results included, the contexts and the pool themselves not. Raises
    ContextsError where even the smallest blocks take more than `limit` bytes.
    """
    halvings, smallest = 0, math.ceil(math.log2(max(_ROWS, _POOL, _PAIRS)))
    while (blocks := _blocks(rows, pool, width, count, halvings)).bytes > limit:
        if halvings == 2 * smallest:
            raise ContextsError(
                f"mining {count} negatives for {rows} identities in a pool of {pool} x {width} takes at "
                f"least {blocks.bytes} bytes, more than the limit of {limit}: raise the limit, or mine fewer "
                "identities at a time"
            )
        halvings += 1
    return blocks


def _blocks(rows: int, pool: int, width: int, count: int, halvings: int) -> Blocks:
    """The blocks when what they take is halved that often, by halving one side of them and the other in turn,
    and what they take.
    """
    chunk = max(1, min(rows, _ROWS >> halvings // 2))
    block = max(1, min(pool, _POOL >> (halvings + 1) // 2))
    examined = max(1, min(chunk, (_EXAMINED >> halvings) // block))
    scored = max(1, (_SCORED >> halvings) // width)
    pairs = max(pool, min(chunk * pool, _PAIRS >> halvings))
    parts = (
        rows * (28 * count + 96),  # results, identity numbers
        (2 * 4 + 6) * chunk * width,  # contexts, as read and as multiplied, and in bfloat16
        (2 * 4 + 6) * block * width,  # a block of the pool, likewise
        9 * chunk * block,  # similarities, in both precisions, or of a sample and partly sorted
        chunk * (64 * count + 128),  # the best so far
        examined * (112 * block + 112 * count),  # candidates of a block, and their ranking
        24 * scored * width,  # float64 products
        88 * pairs + 24 * pool,  # candidates of the rule mid, and the ranking of one row
    )
    return Blocks(chunk, block, examined, scored, pairs, sum(parts) + _OVERHEAD)

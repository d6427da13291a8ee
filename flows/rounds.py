"""How the units of a build are grouped and cut into the chunks that Prefect's task runs handle."""

from collections.abc import Iterable

from negfacediff_core.store.layout import Unit

# Stages of one group run unit by unit, one behind the other; a group starts when the one before is complete.
GROUPS = (
    ("contexts",),
    ("negatives",),
    ("samples", "aligned", "embeddings"),
    ("scores",),
    ("evaluation",),
)
# A round of a group is at most this many Prefect task runs, so that a build stays under about 500 of them.
CHUNKS = 80
# Units a chunk has at least for each worker, so that starting chunks costs nothing that matters.
UNITS_PER_WORKER = 4


def chunk_size(units: int, workers: int) -> int:
    """Return how many of a round's units one task run handles."""
    return max(UNITS_PER_WORKER * workers, -(-units // CHUNKS))


def task_runs(pending: dict[str, Iterable[Unit]], workers: int) -> int:
    """Return how many task runs the first round over the `pending` units of the stages is.

    A round for units that failed adds its own.
    """
    total = 0
    for group in GROUPS:
        units = len({unit for stage in group for unit in pending[stage]})
        total += -(-units // chunk_size(units, workers)) if units else 0
    return total

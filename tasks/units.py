"""One unit, where it runs: is everything there that it needs, then it is made, and counted."""

import sys
from collections.abc import Callable
from pathlib import Path

from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import StoreError, WorkerError
from negfacediff_core.store.layout import StageSpec, Unit
from negfacediff_core.store.records import Record
from tasks.metrics import counted

RunUnit = Callable[[StageSpec, Unit, ExecutionConfig], Record]

# Stage directories whose needs have been found here.
_found: set[str] = set()


def make_unit(run_unit: RunUnit, spec: StageSpec, unit: Unit, execution: ExecutionConfig) -> None:
    """Make one unit with `run_unit`.

    Raises:
        WorkerError: on a Dask worker that joined later, if it lacks what the unit needs: so does every other
            unit there, which would fail one after the other.
        NegFaceDiffError: as `run_unit`.
    """
    if spec.directory not in _found and (worker := _worker()):
        if lacking := lacking_here(spec):
            raise WorkerError(f"The Dask worker {worker} {lacking}")
        _found.add(spec.directory)
    counted(spec, lambda: run_unit(spec, unit, execution))


def lacking_here(spec: StageSpec) -> str | None:
    """Say what units of a stage need and this machine lacks, and what to do; None if all is there."""
    try:
        if not spec.location.exists("stage.json"):
            return (
                f"does not see the store {spec.store}: {spec.directory} is not there. Mount it at the same "
                "path on every machine, or take a store that all of them reach, such as s3://bucket/faces."
            )
    except StoreError as error:
        return f"cannot read the store {spec.store}: {error}"
    for role, weight in spec.weights.items():
        if not Path(weight.path).exists():
            return (
                f"lacks the weights of {spec.name} ({role}): there is nothing at {weight.path}. Copy or "
                "mount them there on every machine."
            )
    return None


def _worker() -> str | None:
    """Return the Dask worker that this thread belongs to; None anywhere else."""
    if "distributed.worker" not in sys.modules:
        return None
    from distributed import get_worker

    try:
        return str(get_worker().name)
    except ValueError:
        return None

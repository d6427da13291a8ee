"""One call on one worker of a running Dask cluster whose answer the driver wants, such as how fast it is."""

import uuid
from collections.abc import Callable
from typing import Any

from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import WorkerError
from negfacediff_core.stopping import ended_when
from tasks.clusters import running
from tasks.workers import GPU, Roster, look, no_device, released


def called_on_worker(
    execution: ExecutionConfig, seconds: float, function: Callable[..., Any], *args: Any
) -> tuple[Any, Roster]:
    """Return `function(*args)` as a worker of the scheduler `execution.executor` gives it, and who is there.

    The worker is one with a GPU if there are any, and then has it to itself. Raises as `clusters.running` and
    `function`; WorkerError if the worker lacks the device, or has not answered in so many seconds.
    """
    with running(execution) as cluster:
        roster = look(cluster.client)
        worker = roster.places(gpu=True)[0]
        flight = cluster.client.submit(
            _call,
            execution.device,
            function,
            args,
            key=f"call-{uuid.uuid4().hex}",
            pure=False,
            workers=[worker.address],
            resources={GPU: worker.gpus} if worker.gpus else None,
        )
        try:
            return flight.result(timeout=seconds), roster
        except TimeoutError as error:
            raise WorkerError(
                f"The Dask worker {worker.name} of {execution.executor} has not answered in {seconds:.0f} s: "
                "it is busy with other work; try again when that is done."
            ) from error
        finally:
            flight.release()


def _call(device: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    from distributed import get_worker

    if what := no_device(device):
        raise WorkerError(f"The Dask worker {get_worker().name} {what}")
    with ended_when(released()):
        return function(*args)

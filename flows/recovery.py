"""The flow `resume_failed`: what the commands `resume` and `retry-failed` do, for people at Prefect."""

from typing import Any, cast

from prefect import flow, get_run_logger
from prefect.states import Completed

from flows.build import CHUNK_RUNNER, DEFAULT_EXECUTION, make_dataset
from flows.form import STORE, MaybeName
from flows.gate import leakage_gate
from flows.leakage import GateRecord, on_cpu
from flows.resume import complete_text, find_failed, find_open, forget_failed, recorded
from flows.turns import turn
from negfacediff_core.config import BuildConfig, ExecutionConfig


@flow(
    name="resume-failed",
    flow_run_name="resume-failed {run}",
    task_runner=CHUNK_RUNNER,
)
def resume_failed(
    run: MaybeName = "",
    failed_images: bool = True,
    execution: ExecutionConfig = DEFAULT_EXECUTION,
    store: str = STORE,
) -> dict[str, Any]:
    """Go on with a build or a leakage gate that failed, was cancelled or has crashed, as its record says.

    Nothing that is committed is made again, but units with failed images where asked for. Returns what the
    flow returns that made the run, nothing where every run is complete. Raises as that flow; besides,
    StoreError if there is no such store or run, if several come into question, or if the run's weights are
    others now.

    Args:
        run: Name of the run. Empty: the only one that is not complete or has failed images.
        failed_images: Make units with failed images, and what was made from them, again as well.
        execution: How it runs; nothing here changes a pixel.
        store: The store.
    """
    found = (find_failed if failed_images else find_open)(store, run or None)
    if found is None:
        return cast("dict[str, Any]", Completed(message=complete_text(store), data={}))
    made_by = recorded(store, found.run, execution)
    if failed_images:
        with turn(store):
            for sentence in forget_failed(store, found):
                get_run_logger().info(sentence)
    if isinstance(made_by, GateRecord):
        return leakage_gate.fn(store, made_by.run, made_by.settings, on_cpu(execution))
    name = found.run
    # read again when its turn has come: the run may have grown meanwhile
    return make_dataset(lambda: cast("BuildConfig", recorded(store, name, execution)), execution, store)

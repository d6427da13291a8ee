"""The flow `grow_dataset`: a run of a store gets more identities, more images of each, or both."""

from typing import Any

from prefect import flow, get_run_logger

from flows.build import CHUNK_RUNNER, DEFAULT_EXECUTION, make_dataset
from flows.form import STORE, More, Name
from flows.growth import grown
from negfacediff_core.config import BuildConfig, ExecutionConfig


@flow(
    name="grow-dataset",
    flow_run_name="{run}",
    task_runner=CHUNK_RUNNER,
)
def grow_dataset(
    run: Name,
    identities: More = 0,
    images: More = 0,
    until_identities: More = 0,
    execution: ExecutionConfig = DEFAULT_EXECUTION,
    store: str = STORE,
) -> dict[str, Any]:
    """Add identities, or images of each, to a run; nothing that it has changes or moves.

    A run that is not complete is finished instead, so that a growth that was interrupted can be retried, and
    a schedule never piles up work. A growth that waits for another run of the store adds to what is there
    when its turn has come. Returns and raises as `build_dataset`; besides, StoreError if there is no
    such run or its weights are others now, ConfigError if nothing is to be added.

    Args:
        run: Name of the run in the store.
        identities: Identities to add. Allowed: from 0 to 10,000,000.
        images: Images of each identity to add. Allowed: from 0 to 10,000,000.
        until_identities: Stop at so many identities: a schedule then finds nothing left to do. 0: no end.
        execution: How it runs; nothing here changes a pixel.
        store: The store.
    """
    told: set[str] = set()

    def settle() -> BuildConfig:
        build, said = grown(store, run, identities, images, until_identities)
        if said not in told:
            get_run_logger().info(said)
        told.add(said)
        return build

    # in this flow run, so that its page shows progress and figures
    return make_dataset(settle, execution, store)

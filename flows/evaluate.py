"""The flow `evaluate`: the images of a finished run get figures by other settings, or by another judge."""

from typing import Any

from prefect import flow

from flows.build import CHUNK_RUNNER, DEFAULT_EXECUTION, make_dataset
from flows.form import STORE, MaybeName, Name
from flows.growth import evaluated
from negfacediff_core.config import EvaluationConfig, ExecutionConfig

DEFAULT_EVALUATION = EvaluationConfig()


@flow(
    name="evaluate",
    flow_run_name="{run}",
    task_runner=CHUNK_RUNNER,
)
def evaluate(
    run: Name,
    evaluation: EvaluationConfig = DEFAULT_EVALUATION,
    judge: str = "",
    name: MaybeName = "",
    execution: ExecutionConfig = DEFAULT_EXECUTION,
    store: str = STORE,
) -> dict[str, Any]:
    """Compute the figures of a finished run anew; its images stay, and so do its own figures.

    Returns and raises as `build_dataset`; besides, StoreError if there is no such run, it is not finished or
    its weights are others now, ConfigError if the name is that of other images.

    Args:
        run: Name of the run in the store.
        evaluation: The settings of the new figures.
        judge: insightface model pack with the recogniser that judges. Empty: that of the run.
        name: Name of the run that the new figures belong to; the run's own name replaces its figures. Empty:
            the run's name and ".evaluated".
        execution: How it runs; nothing here changes a figure.
        store: The store.
    """
    return make_dataset(lambda: evaluated(store, run, evaluation.model_dump(), judge, name), execution, store)

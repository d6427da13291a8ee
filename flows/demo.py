"""The flow `demo`: two datasets from the same contexts and noise, without and with a negative."""

from typing import Any

from prefect import flow

from flows.build import DEFAULT_EXECUTION, build_dataset, stages_of
from flows.compare import Dataset, write_comparison
from flows.presets import demo_builds, demo_store
from negfacediff_core.config import BuildConfig, ExecutionConfig


@flow(name="demo")
def demo(out: str = "demo", execution: ExecutionConfig = DEFAULT_EXECUTION) -> dict[str, Any]:
    """Build both datasets in `out`/store, compare them, and write the comparison to the folder `out`.

    Returns the report, as `report.json` has it. Raises what `build_dataset` raises.
    """
    store = demo_store(out)
    builds = demo_builds()
    for build in builds:
        build_dataset(build, execution, store)
    datasets = {_label(build): Dataset(build.name, stages_of(build, store)) for build in builds}
    return write_comparison("Negative contexts: the demo", datasets, out)


def _label(build: BuildConfig) -> str:
    return f"{build.negatives.rule}, w = {build.samples.w:g}"

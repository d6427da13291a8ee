"""The flow `demo`: two datasets from the same contexts and noise, without and with a negative."""

import json
from collections.abc import Mapping
from typing import Any

from prefect import flow

from flows.build import DEFAULT_EXECUTION, build_dataset, stages_of
from flows.presets import demo_builds, demo_store
from flows.results import publish, report_of, seconds_of
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.evaluation.plots import contact_sheet, score_histogram
from negfacediff_core.evaluation.report import render_report
from negfacediff_core.stages.evaluation import score_panel, sheet_panel
from negfacediff_core.store.layout import StageSpec
from negfacediff_core.store.location import locate

# Identities and images of each that the contact sheet shows.
SHEET = (8, 6)


@flow(name="demo")
def demo(out: str = "demo", execution: ExecutionConfig = DEFAULT_EXECUTION) -> dict[str, Any]:
    """Build both datasets in `out`/store, compare them, and write the comparison to the folder `out`.

    Returns the report, as `report.json` has it. Raises what `build_dataset` raises.
    """
    store = demo_store(out)
    builds = demo_builds()
    figures = [build_dataset(build, execution, store)["figures"] for build in builds]
    datasets = [{**one, "name": f"{one['rule']}, w = {one['w']:g}"} for one in figures]
    specs = [stages_of(build, store) for build in builds]
    seconds = seconds_of(spec for stages in specs for spec in stages.values())
    report = report_of("Negative contexts: the demo", datasets, specs[-1], seconds)
    pictures = _pictures({one["name"]: stages for one, stages in zip(datasets, specs, strict=True)})
    folder = locate(out)
    for name, png in pictures.items():
        folder.write_atomic(f"{name}.png", png)
    folder.write_atomic("report.html", render_report(report, pictures).encode())
    folder.write_atomic("report.json", (json.dumps(report, indent=2) + "\n").encode())
    publish("demo", report, pictures)
    return report


def _pictures(datasets: Mapping[str, Mapping[str, StageSpec]]) -> dict[str, bytes]:
    """Draw the datasets, given by label, in one contact sheet and, where pairs can be scored, a histogram."""
    scores = [score_panel(specs["evaluation"], label) for label, specs in datasets.items()]
    sheets = [sheet_panel(specs["evaluation"], label, *SHEET) for label, specs in datasets.items()]
    pictures = {"contact_sheet": contact_sheet(sheets)}
    if all(panel.genuine.size and panel.impostor.size for panel in scores):
        pictures["histogram"] = score_histogram(scores)
    return pictures

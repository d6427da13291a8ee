"""The flow `compare`: finished runs of one store side by side, in figures, plots and pictures."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prefect import flow

from flows.results import figures_of, publish, report_of, seconds_of
from flows.words import command_text, count_text
from negfacediff_core.errors import ConfigError, StoreError
from negfacediff_core.evaluation.plots import COLOURS, det_curves, score_histogram
from negfacediff_core.evaluation.report import render_report
from negfacediff_core.evaluation.sheets import contact_sheet
from negfacediff_core.stages.evaluation import difference_intervals, score_panel, sheet_panel
from negfacediff_core.store.layout import StageSpec
from negfacediff_core.store.location import locate
from negfacediff_core.store.records import pending
from negfacediff_core.store.runs import stages_of_run

#: Identities and images of each that the contact sheet shows.
SHEET = (8, 6)


class Dataset(NamedTuple):
    """A finished run and its stages."""

    run: str
    stages: Mapping[str, StageSpec]


@flow(name="compare")
def compare(store: str, runs: Sequence[str], out: str = "comparison") -> dict[str, Any]:
    """Compare finished runs of `store` with the first of them; write report and pictures to the folder `out`.

    Returns the report, as `report.json` has it. ConfigError for a selection that cannot be compared,
    StoreError where a run is missing or not finished.
    """
    return write_comparison(" and ".join(runs), read_datasets(store, runs), out)


def read_datasets(store: str, runs: Sequence[str]) -> dict[str, Dataset]:
    """Return finished runs by name; raises ConfigError and StoreError as `compare` does."""
    if len(set(runs)) != len(runs) or not 2 <= len(runs) <= len(COLOURS):
        raise ConfigError(
            f"A comparison takes 2 to {len(COLOURS)} different runs, not {', '.join(runs) or 'none'}: "
            f"{command_text('status', store)} lists them."
        )
    datasets = {}
    for run in runs:
        stages = stages_of_run(store, run)
        lacking = sum(len(pending(spec)) for spec in stages.values())
        if lacking:
            raise StoreError(
                f"The run {run} is not finished, it lacks {count_text(lacking, 'unit')}: "
                f"{command_text('resume', store, run)}"
            )
        datasets[run] = Dataset(run, stages)
    return datasets


def write_comparison(title: str, datasets: Mapping[str, Dataset], out: str) -> dict[str, Any]:
    """Write report.html, report.json and the pictures of datasets, by label, to `out`; return the report.

    The differences are those to the first dataset.
    """
    figures = [{**figures_of(*dataset), "name": label} for label, dataset in datasets.items()]
    first, *others = datasets.values()
    for dataset, shown in zip(others, figures[1:], strict=True):
        shown |= _differences(dataset, first)
    stages = [dataset.stages for dataset in datasets.values()]
    report = report_of(
        title, figures, stages[-1], seconds_of(spec for one in stages for spec in one.values())
    )
    pictures = _pictures(datasets)
    folder = locate(out)
    for name, content in pictures.items():
        folder.write_atomic(name, content)
    folder.write_atomic("report.html", render_report(report, pictures).encode())
    folder.write_atomic("report.json", (json.dumps(report, indent=2) + "\n").encode())
    publish(title, report, pictures)
    return report


def _differences(dataset: Dataset, first: Dataset) -> dict[str, Any]:
    """Intervals of the differences to the first dataset, by figure, where both drew the same identities."""
    try:
        intervals = difference_intervals(dataset.stages["evaluation"], first.stages["evaluation"])
    except StoreError:  # other identities, or none drawn: the difference stands without an interval
        return {}
    return {f"{name}_difference": list(limits) for name, limits in intervals.items()}


def _pictures(datasets: Mapping[str, Dataset]) -> dict[str, bytes]:
    """Draw the datasets in one contact sheet and, where pairs can be scored, histogram and DET curves."""
    evaluations = {label: dataset.stages["evaluation"] for label, dataset in datasets.items()}
    shown = tuple(
        min(size, *(spec.config[axis] for spec in evaluations.values()))
        for size, axis in zip(SHEET, ("identities", "images"), strict=True)
    )
    sheets = [sheet_panel(spec, label, *shown) for label, spec in evaluations.items()]
    pictures = {"contact_sheet.png": contact_sheet(sheets)}
    scores = [score_panel(spec, label) for label, spec in evaluations.items()]
    if all(panel.genuine.size and panel.impostor.size for panel in scores):
        for form in ("png", "svg"):
            pictures[f"histogram.{form}"] = score_histogram(scores, form)
            pictures[f"det.{form}"] = det_curves(scores, form)
    return pictures

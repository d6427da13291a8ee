"""docs/figures.md explains every figure that a report shows or holds."""

import json
import re
from dataclasses import fields

import pytest

from negfacediff_core.evaluation.distribution_plots import LABELS, distribution_plots
from negfacediff_core.evaluation.figures import FIGURES, SETTINGS
from negfacediff_core.evaluation.metrics import Separability
from negfacediff_core.evaluation.summaries import summarise
from negfacediff_core.stages.dataset_figures import DATASET_COLUMNS, RANGES
from negfacediff_core.stages.models import PROJECT
from negfacediff_core.store.runs import stages_of_run
from negfacediff_core.store.shards import read_file

PAGE = (PROJECT / "docs" / "figures.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.key)
def test_every_figure_has_its_row(figure):
    rows = [line for line in PAGE.splitlines() if line.startswith("|") and f"`{figure.key}`" in line]
    assert len(rows) == 1, f"{figure.key} has {len(rows)} rows"
    assert figure.title in rows[0]


def test_every_key_of_the_report_and_of_the_rows_is_explained():
    explained = set(re.findall(r"`(\w+)`", PAGE))
    assert {field.name for field in fields(Separability)} <= explained
    assert {name for name, _ in DATASET_COLUMNS} <= explained
    assert RANGES.keys() == LABELS.keys() <= explained


def test_every_key_of_a_real_report_is_explained(tiny_store):
    specs = stages_of_run(str(tiny_store), "tiny")
    unit, *_ = specs["evaluation"].grid.units()
    report = json.loads(read_file(specs["evaluation"], unit, "report.json"))
    held = set(report) | {key for point in (*report["at_fmr"], *report["at_threshold"]) for key in point}
    held |= {key for summary in report["distributions"].values() for key in summary}
    # settings are explained where they are set
    held -= {*SETTINGS, *specs["samples"].config, "protocol", "bootstrap", "evaluation_seed"}
    shown = {key for key in held if re.fullmatch(r"\w+_interval", key)}
    assert shown and shown <= {f"{figure.key}_interval" for figure in FIGURES}
    explained = set(re.findall(r"`(\w+)`", PAGE))
    assert held - shown <= explained, f"docs/figures.md lacks {held - shown - explained}"


def test_every_distribution_is_drawn_and_the_same_twice():
    summaries = {name: summarise([float(n % 7) for n in range(40)]) for name in LABELS}
    drawn = distribution_plots(summaries, "svg").decode()
    assert all(label.partition(" >")[0] in drawn for label in LABELS.values())
    assert distribution_plots(summaries) == distribution_plots(summaries)
    fewer = distribution_plots({"yaw": summaries["yaw"]}, "svg").decode()
    assert LABELS["yaw"].partition(" >")[0] in fewer and LABELS["age"] not in fewer

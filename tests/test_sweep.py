"""Sweeps of builds: what they hold, what comes of them, and what is refused."""

import json
import re

import pytest
import yaml
from typer.testing import CliRunner

from flows import sweep as sweep_module
from flows.cli import app
from flows.sweep import Sweep, Variation, cases, load_sweep, run_sweep, sweep_texts
from flows.sweep_page import AXES, LISTED, MEASURES, plot_of, shifts_of, table_of
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import ConfigError
from negfacediff_core.evaluation.figures import FIGURES
from negfacediff_core.stages.models import PROJECT

THREADS = ExecutionConfig(workers=1, device="cpu")


@pytest.fixture
def tiny_sweep(tiny_build, tmp_path):
    """A sweep file of two settings and two seeds, on the tiny build."""
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(tiny_build.model_dump(mode="json")))
    content = {
        "name": "two",
        "title": "Two settings",
        "axis": "evaluations",
        "base": str(base),
        "seeds": [0, 7],
        "set": {"evaluation.bootstrap": 0},
        "builds": [
            {"name": "short", "group": "DDIM"},
            {"name": "plain", "group": "plain", "set": {"negatives.rule": "none", "samples.w": 0}},
        ],
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("name", sweep_texts())
def test_every_sweep_that_ships_can_be_built(name):
    described = load_sweep(name)
    built = list(cases(described))
    assert len(built) == len(described.builds) * len(described.seeds) >= 3 * 10
    assert len({case.build.name for case in built}) == len(built)
    assert all(case.build.identities >= 64 and case.build.images >= 16 for case in built)
    assert {case.build.samples.seed for case in built} == set(described.seeds)


def test_the_ablation_holds_every_rule_and_the_steps_every_sampler():
    rules = {case.build.negatives.rule for case in cases(load_sweep("ablation"))}
    assert rules == {"none", "null", "rand", "close", "mid", "far"}
    weights = {case.build.samples.w for case in cases(load_sweep("ablation"))}
    assert min(weights - {0.0}) == 0.1 and max(weights) == 2.0
    steps = {(case.build.samples.sampler, case.build.samples.steps) for case in cases(load_sweep("steps"))}
    assert {("ddim", n) for n in (10, 25, 50, 100, 200)} | {("dpm_solver", n) for n in (10, 15, 20)} < steps


def test_seeds_and_fields_reach_the_builds(tiny_sweep):
    short, _, plain, _ = cases(load_sweep(str(tiny_sweep)))
    assert (short.build.name, short.build.negatives.rule, short.build.evaluation.bootstrap) == (
        "two-short-0",
        "far",
        0,
    )
    assert (plain.build.name, plain.build.negatives.rule) == ("two-plain-0", "none")
    assert [case.build.contexts.seed for case in cases(load_sweep(str(tiny_sweep)))] == [0, 7, 0, 7]


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.slow
def test_a_sweep_that_stops_leaves_what_is_done_and_goes_on(tiny_sweep, tmp_path, monkeypatch):
    described, out = load_sweep(str(tiny_sweep)), tmp_path / "out"
    real, made = sweep_module.build_dataset, []

    def stops_at_the_third(build, execution, store):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(build.name)
        return real(build, execution, store)

    monkeypatch.setattr(sweep_module, "build_dataset", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(described, str(tmp_path / "store"), str(out), THREADS)
    assert [row["seed"] for row in json.loads((out / "rows.json").read_text())] == [0, 7]
    monkeypatch.setattr(sweep_module, "build_dataset", real)
    rows = run_sweep(described, str(tmp_path / "store"), str(out), THREADS)
    assert json.loads((out / "rows.json").read_text()) == json.loads(json.dumps(rows))
    assert [(row["variation"], row["seed"]) for row in rows] == [
        ("short", 0),
        ("short", 7),
        ("plain", 0),
        ("plain", 7),
    ]
    # two steps, each with a negative in one setting and without in the other
    assert [row["network_evaluations"] for row in rows] == [4, 4, 2, 2]
    assert (out / "table.md").read_text() == table_of(rows)
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert b"DDIM" in (out / "plot.svg").read_bytes()


def row(variation, seed, **figures):
    known = {"fdr": 2.0, "eer": 0.1, "detected_fraction": 1.0, "embedding_diversity": 0.3, "fmr100": 0.125}
    known["seconds"] = 1250.0
    return {
        "variation": variation,
        "group": "DDIM",
        "seed": seed,
        "network_evaluations": 40,
        "w": 0.5,
        **known,
        **figures,
    }


def test_the_table_has_the_weight_where_it_varies():
    head, _, first, second = table_of([row("a", 0), row("b", 0, w=0.25)]).splitlines()
    assert head.startswith("| setting | group | w | network") and "| a | DDIM | 0.5 |" in first
    assert "| b | DDIM | 0.25 |" in second and "| 100.00% |" in second
    assert table_of([row("a", 0)]).startswith("| setting | group | network")


def test_the_table_has_means_over_seeds_and_what_they_lie_between():
    rows = [row("a", 0, fdr=2.0), row("a", 1, fdr=3.0), row("b", 0, fdr=1.0, network_evaluations=2000)]
    lines = table_of(rows).splitlines()
    assert "FMR100" in lines[0] and "| 12.5% |" in lines[3] and "| 1,250 |" in lines[3]
    assert "| 2.50 (2.00 to 3.00) |" in lines[2] and lines[2].endswith("| 2 |")
    assert "| 2,000 | 1.00 |" in lines[3]


@pytest.mark.parametrize("axis", AXES)
def test_figures_that_do_not_exist_are_left_out(axis):
    """A build in which no pair could be compared has no FDR; it must not stop the sweep."""
    rows = [row("a", 0), row("b", 0, fdr=None, eer=None), row("c", 0, w=1.0, network_evaluations=80)]
    assert "| n/a |" in table_of(rows)
    assert b"DDIM" in plot_of(rows, axis, "title", "svg")


def test_single_settings_at_one_place_are_drawn_side_by_side():
    line, alone, others = [0.1, 0.5, 1.0], [0.0], [[0.5], [0.5], [0.5], [1.0]]
    stays, apart, *beside = shifts_of([line, alone, *others])
    assert stays == apart == 0
    # three about the line's point at 0.5, one beside that at 1
    assert len(set(beside[:3])) == 3 and 0 not in beside and min(beside) < 0 < max(beside)
    first, second = shifts_of([[0.5], [0.5]])
    assert first == 0 != second
    # so little that none seems to lie elsewhere
    assert max(map(abs, beside)) <= 2


def test_groups_have_looks_of_their_own_and_lines_begin_where_there_is_no_weight(monkeypatch):
    rows = [row(str(number), 0, group=f"rule {number}") for number in range(8)]
    rows += [row(f"far {w}", 0, group="rule 7", w=w) for w in (1.0, 2.0)]
    rows.append(row("none", 0, group="none", w=0.0, fdr=0.75))
    drawn = []
    monkeypatch.setattr("flows.sweep_page.draw", lambda figure, form: drawn.append(figure) or b"")
    plot_of(rows, "w", "title")
    looks = {(line.get_color(), line.get_marker()) for line in drawn[0].legends[0].get_lines()}
    assert len(looks) == 9 and len({colour for colour, _ in looks}) == 8
    fdr, _, found, _ = drawn[0].axes
    (start,) = [line for line in fdr.lines if line.get_linestyle() == ":"]
    assert start.get_xydata().tolist() == [[0, 0.75], [0.5, 2.0]]
    assert found.get_ylim()[0] <= 0.95 and 1 < found.get_ylim()[1] < 1.01


def test_the_documented_sweep_can_be_built_and_help_points_to_it(tmp_path):
    text = (PROJECT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    path = tmp_path / "my_sweep.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    described = load_sweep(str(path))
    built = list(cases(described))
    assert len(built) == 9 and built[0].build.name == "pool-64-0"
    assert (built[-1].build.negatives.pool, built[-1].build.samples.w) == (256, 1.0)
    assert all(f"`{field}`" in text for field in (*Sweep.model_fields, *Variation.model_fields))
    assert "docs/sweeps.md" in CliRunner().invoke(app, ["sweep", "--help"]).output


def test_what_a_sweep_shows_are_figures_of_reports():
    known = {figure.key for figure in FIGURES}
    assert {measure.key for measure in (*MEASURES, *LISTED)} <= known and AXES["evaluations"][0] in known


@pytest.mark.parametrize(
    "change, message",
    [
        ({"axis": "time"}, "axis is 'time'"),
        ({"seeds": []}, "seeds is"),
        ({"typo": 1}, "no field typo"),
        ({"builds": [{"name": "a", "group": "g", "set": {"samples.stps": 3}}]}, "samples.steps"),
        ({"base": "nothing"}, "no preset 'nothing'"),
        ({"set": [1]}, "set is"),
        ({"builds": [1]}, "builds.0 is 1"),
    ],
)
def test_a_wrong_sweep_says_what_is_wrong(tiny_sweep, change, message):
    content = yaml.safe_load(tiny_sweep.read_text())
    tiny_sweep.write_text(yaml.safe_dump({**content, **change}))
    with pytest.raises(ConfigError, match=message):
        list(cases(load_sweep(str(tiny_sweep))))


@pytest.mark.parametrize("text", ["[1]", "a: [", "[" * 3000, "when: !!timestamp x", "name: \0"])
def test_a_file_that_is_no_sweep(text, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as said:
        load_sweep(str(path))
    assert "\n" not in str(said.value) and str(path) in str(said.value)


@pytest.mark.parametrize("source", ["nothing", "/nowhere/sweep.yaml"])
def test_a_sweep_that_is_not_there(source):
    with pytest.raises(ConfigError, match=f"{source}"):
        load_sweep(source)

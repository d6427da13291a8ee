"""Runs that are grown or evaluated anew: which build that is, and what is refused."""

import json
import shutil
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
from stage_builds import changed, make

from flows import cli, evaluate, grow, growing, recovery
from flows.growth import evaluated, grown
from flows.results import record_run
from negfacediff_core.errors import ConfigError, StoreError
from negfacediff_core.stages.build import plan_build
from negfacediff_core.store.records import pending


@pytest.fixture(scope="module")
def built(tiny_build, tmp_path_factory):
    store = tmp_path_factory.mktemp("grown") / "store"
    record_run(tiny_build, make(tiny_build, store), str(store), seconds=1.0)
    return store


@pytest.fixture
def store(built, tmp_path):
    return str(shutil.copytree(built, tmp_path / "store"))


def specs_of(build, store):
    return {spec.name: spec for spec in plan_build(build, store)}


def lose_a_unit(store, build):
    """Make a run incomplete: its last unit of samples was not committed."""
    spec = specs_of(build, store)["samples"]
    unit = spec.grid.units()[-1]
    spec.location.remove(f"done/{unit.name}.json")
    return unit


def test_growth_makes_only_what_is_new_and_moves_no_negative(store, tiny_build):
    build, said = grown(store, "tiny", identities=2, images=1)
    assert (build.identities, build.images) == (7, 4)
    assert said == "tiny grows from 5 identities x 3 images to 7 x 4."
    before, after = specs_of(tiny_build, store), specs_of(build, store)
    assert after["negatives"].config["pool"] == 5
    for stage in ("contexts", "negatives", "samples", "aligned", "embeddings"):
        assert after[stage].fingerprint == before[stage].fingerprint
    # all but the seventh identity lie in blocks of two that were begun and filled
    assert {unit.name for unit in pending(after["samples"])} == {"00003-000", "00003-001"}


@pytest.mark.parametrize(
    ("until", "identities", "said"),
    [(6, 6, "tiny grows"), (5, 5, "has 5 identities already"), (3, 5, "has 5 identities already")],
)
def test_growth_ends_at_its_bound(until, identities, said, store):
    build, words = grown(store, "tiny", identities=100, images=0, until=until)
    assert build.identities == identities and said in words


def test_a_run_that_is_not_complete_is_finished_and_not_grown(store, tiny_build):
    unit = lose_a_unit(store, tiny_build)
    build, said = grown(store, "tiny", identities=100, images=0)
    assert (build.identities, build.images) == (5, 3) and "lacks 1 unit and is finished first" in said
    assert [one.name for one in pending(specs_of(build, store)["samples"])] == [unit.name]


def test_growth_by_nothing_or_beyond_all_bounds_is_refused(store):
    with pytest.raises(ConfigError, match="grow by nothing: give identities or images"):
        grown(store, "tiny", 0, 0)
    with pytest.raises(ConfigError, match="the run tiny, grown: images is 10003"):
        grown(store, "tiny", 0, 10_000)
    with pytest.raises(StoreError, match="no run tony"):
        grown(store, "tony", 1, 0)


def test_growth_with_other_weights_is_refused(store, tiny_build):
    path = Path(store, "runs/tiny.json")
    record = json.loads(path.read_text())
    record["stages"]["samples"]["fingerprint"] = "0" * 16
    path.write_text(json.dumps(record))
    with pytest.raises(StoreError, match="would not go on but begin anew from its samples"):
        grown(store, "tiny", 1, 0)


def test_an_evaluation_keeps_the_images_and_what_is_not_given(store, tiny_build):
    build = evaluated(store, "tiny", {"seed": 7})
    assert build.name == "tiny.evaluated"
    assert (build.evaluation.seed, build.evaluation.bootstrap) == (7, tiny_build.evaluation.bootstrap)
    left = {name for name, spec in specs_of(build, store).items() if pending(spec)}
    assert left == {"evaluation"}
    assert evaluated(store, "tiny", {}, name="tiny").name == "tiny"


def test_another_judge_embeds_the_same_crops(store, tiny_pack, tmp_path):
    other = shutil.copytree(tiny_pack / "judge", tmp_path / "other")
    (other / "judge.onnx").rename(other / "recogniser.onnx")
    build = evaluated(store, "tiny", {}, judge=str(other), name="other")
    assert build.embeddings.judge == str(other)


def test_an_evaluation_that_cannot_be_is_refused(store, tiny_build):
    with pytest.raises(ConfigError, match=r"evaluation of tiny: evaluation\.bootstrap is -1"):
        evaluated(store, "tiny", {"bootstrap": -1})
    other = changed(tiny_build, name="other", samples__seed=1)
    record_run(other, specs_of(other, store), store)
    with pytest.raises(ConfigError, match="a run other of other images"):
        evaluated(store, "tiny", {}, name="other")
    lose_a_unit(store, tiny_build)
    with pytest.raises(StoreError, match="not finished, it lacks 1 unit: negfacediff resume"):
        evaluated(store, "tiny", {})


@pytest.fixture
def runs(monkeypatch):
    """The builds that commands and flows run, without Prefect."""
    ran = []
    monkeypatch.setattr(growing, "build_in", lambda store, build, *rest: ran.append(build))
    for module in (grow, evaluate, recovery):
        monkeypatch.setattr(module, "make_dataset", lambda settle, execution, store: ran.append(settle()))
    for module in (grow, recovery):
        monkeypatch.setattr(module, "get_run_logger", lambda: SimpleNamespace(info=print))
    return ran


def test_commands_and_flows_run_the_same_builds(store, runs, capsys):
    cli.app(["grow", store, "tiny", "--identities", "+2"], standalone_mode=False)
    assert "tiny grows from 5 identities" in capsys.readouterr().out
    grow.grow_dataset.fn("tiny", 2, 0, 0, cli.DEFAULTS, store)
    cli.app(["evaluate", store, "tiny", "--bootstrap", "20"], standalone_mode=False)
    evaluate.evaluate.fn("tiny", runs[0].evaluation.model_copy(update={"bootstrap": 20}), "", "", None, store)
    assert runs[0] == runs[1] and runs[0].identities == 7
    assert runs[2] == runs[3] and runs[2].evaluation.bootstrap == 20


def test_the_command_runs_the_flow_that_waits_for_its_turn_and_looks_again(store, monkeypatch):
    launched = []
    monkeypatch.setattr(growing, "build_in", lambda store, build, execution, verbose, run: run(execution))
    monkeypatch.setattr("flows.launch.launch", lambda flow, **given: launched.append((flow, given)))
    cli.app(["grow", store, "tiny", "--images", "+1"], standalone_mode=False)
    ((flow, given),) = launched
    bound = signature(flow.fn).bind(**given).arguments
    assert flow is grow.grow_dataset and (bound["run"], bound["identities"], bound["images"]) == (
        "tiny",
        0,
        1,
    )


def test_the_only_open_run_is_resumed_and_a_complete_store_left_alone(store, tiny_build, runs):
    resume = recovery.resume_failed.fn
    assert resume("", True, cli.DEFAULTS, store).message == f"Every run in {store} is complete."
    lose_a_unit(store, tiny_build)
    resume("", False, cli.DEFAULTS, store)
    resume("", True, cli.DEFAULTS, store)
    assert [(build.name, build.identities) for build in runs] == [("tiny", 5)] * 2
    with pytest.raises(StoreError, match="no run tony"):
        resume("tony", True, cli.DEFAULTS, store)

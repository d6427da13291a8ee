"""Comparing finished runs, and sweeps of builds, on tiny random weights."""

import json
import re
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from flows.build import build_dataset
from flows.cli import BAD_INPUT, main
from flows.compare import (
    Dataset,
    _crowding_note,
    _what_sheets_share,
    _why_unpaired,
    compare,
    read_datasets,
    title_of,
    write_comparison,
)
from flows.results import PAGE, figures_of
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import ConfigError, StoreError
from negfacediff_core.evaluation.schema import check_report, report_schema
from negfacediff_core.stages.evaluation import RESAMPLES
from negfacediff_core.store.layout import fingerprint
from negfacediff_core.store.records import read_record, records, write_record

pytestmark = pytest.mark.usefixtures("prefect_server")

THREADS = ExecutionConfig(workers=1, device="cpu")


def varied(build, name, **sections):
    values = build.model_dump()
    for section, fields in sections.items():
        values[section] = {**values[section], **fields} if isinstance(fields, dict) else fields
    return type(build).model_validate({**values, "name": name})


@pytest.fixture(scope="module")
def store(tiny_build, tmp_path_factory):
    """Two finished runs, `plain` and `far`, and one that has only begun, `begun`."""
    folder = tmp_path_factory.mktemp("compared")
    store = str(folder)
    build_dataset(varied(tiny_build, "plain", negatives={"rule": "none"}, samples={"w": 0}), THREADS, store)
    build_dataset(varied(tiny_build, "far"), THREADS, store)
    run = json.loads((folder / "runs/far.json").read_text())
    for stage in run["stages"].values():
        stage["identities"] += 4
    (folder / "runs/begun.json").write_text(json.dumps({**run, "name": "begun"}))
    return store


def test_runs_stand_side_by_side_with_everything_that_is_promised(store, tmp_path):
    report = compare(store, ["plain", "far"], str(tmp_path))
    check_report(report)
    assert [dataset["name"] for dataset in report["datasets"]] == ["plain", "far"]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2 and "contact sheet" in page
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.html",
        "report.json",
        *(f"{plot}.{form}" for plot in ("histogram", "det") for form in ("png", "svg")),
        "contact_sheet.png",
    }
    assert report["title"] == "plain and far" and report["warnings"] == report["notes"] == []
    assert "same noise" in report["captions"]["contact_sheet"]
    for dataset in report["datasets"]:
        assert dataset["seconds"] > 0 and {"generator", "judge", "protocol"} <= dataset["settings"].keys()
        own = json.loads(Path(store, "runs", f"{dataset['name']}.json").read_text())["stages"]
        assert dataset["lineage"] == {name: place["fingerprint"] for name, place in own.items()}


def test_reports_of_one_dataset_and_of_several_fit_the_published_schema(store, tmp_path):
    check = Draft202012Validator(report_schema(), format_checker=Draft202012Validator.FORMAT_CHECKER).validate
    datasets = read_datasets(store, ["plain", "far"])
    check(compare(store, ["plain", "far"], str(tmp_path)))
    for run in datasets.values():
        written = json.loads(Path(run.stages["evaluation"].directory, PAGE).read_text())
        check(written)
        assert written["datasets"] == [json.loads(json.dumps(figures_of(*run)))]


def test_what_rests_on_other_match_thresholds_is_said_not_to_compare():
    first, same, other = (
        {"name": name, "match_cosine": cosine} for name, cosine in zip("abc", (0.3, 0.3, 0.4), strict=True)
    )
    assert _crowding_note([first, same]) == []
    assert "capacity do not compare" in _crowding_note([first, other])[0]
    assert "(a: 0.300; b: 0.300; c: 0.400; d: none)" in _crowding_note([first, same, other, {"name": "d"}])[0]


def changed(dataset, stage, **config):
    """The dataset as if a stage had been made with other settings."""
    spec = dataset.stages[stage]
    return Dataset(dataset.run, {**dataset.stages, stage: replace(spec, config={**spec.config, **config})})


def test_other_judges_and_protocols_are_said_loudly_and_all_are_named(store, tmp_path, monkeypatch):
    monkeypatch.setattr("flows.compare.publish", lambda *arguments: None)
    datasets = read_datasets(store, ["plain", "far"])
    embedded = datasets["far"].stages["embeddings"]
    judge = replace(embedded.weights["judge"], path="/elsewhere/judge.onnx", sha256={"judge.onnx": "ab" * 32})
    embedded = replace(embedded, weights={**embedded.weights, "judge": judge})
    datasets["far"] = Dataset("far", {**datasets["far"].stages, "embeddings": embedded})
    monkeypatch.setattr("flows.compare.protocol_of", lambda specs: str(specs["embeddings"] is embedded))
    report = write_comparison("both", datasets, str(tmp_path))
    assert [re.search(r"the (\w+) differ", words)[1] for words in report["warnings"]] == [
        "judges",
        "protocols",
    ]
    assert "far: elsewhere/judge.onnx (SHA-256 abababababab...)" in report["warnings"][0]
    assert len(report["judge"].split("; ")) == 2
    parts = [entry["source"] for entry in report["licences"] if entry["part"] == "embeddings: judge"]
    assert len(parts) == 2 and "elsewhere/judge.onnx" in parts[1]
    page = (tmp_path / "report.html").read_text()
    assert page.index('class="warning"') < page.index("<h2>Figures")


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"protocol": "paper"}, r"other protocol \(paper and full\)"),
        ({"bootstrap": 0}, "evaluation.bootstrap is 0"),
        ({"seed": 7, "identities": 4}, r"other identities \(4 and 5\), seed \(7 and 0\)"),
        ({"identities": 10_000}, r"other identities \(10,000 and 5\)"),
        ({}, ""),
    ],
)
def test_why_a_difference_has_no_interval_is_said(store, config, reason):
    datasets = read_datasets(store, ["plain", "far"])
    one, two = changed(datasets["far"], "evaluation", **config), datasets["plain"]
    why = _why_unpaired(one.stages["evaluation"], two.stages["evaluation"])
    assert re.search(reason, why) and bool(why) == bool(reason)


def test_the_sheets_caption_claims_only_what_is_so(store):
    plain, far = read_datasets(store, ["plain", "far"]).values()
    assert "same noise" in _what_sheets_share([plain.stages, far.stages])
    assert "the noise is another" in _what_sheets_share(
        [plain.stages, changed(far, "samples", seed=9).stages]
    )
    other = changed(far, "contexts", seed=9)
    assert "need not be one identity" in _what_sheets_share([plain.stages, other.stages])


def test_a_run_that_kept_no_draws_is_compared_without_intervals(store, tmp_path, monkeypatch):
    """Evaluations of the first version hold figures, and neither operating points nor draws."""
    monkeypatch.setattr("flows.compare.publish", lambda *arguments: None)
    copy = shutil.copytree(store, tmp_path / "store")
    datasets = read_datasets(str(copy), ["plain", "far"])
    spec = datasets["far"].stages["evaluation"]
    record = read_record(spec, spec.grid.units()[0])
    held = {path: digest for path, digest in record.sha256.items() if not path.endswith(RESAMPLES)}
    write_record(spec, replace(record, sha256=held))
    report = write_comparison("both", datasets, str(tmp_path / "out"))
    assert "older version" in report["notes"][-1]
    assert not any(key.endswith("_difference") for key in report["datasets"][1])


def test_the_same_store_gives_the_same_page(store, tmp_path, monkeypatch):
    monkeypatch.setattr("flows.compare.publish", lambda *arguments: None)
    pages = []
    for name in ("one", "two"):
        write_comparison("both", read_datasets(store, ["plain", "far"]), str(tmp_path / name))
        pages.append((tmp_path / name / "report.html").read_bytes())
    assert pages[0] == pages[1]
    stages = [spec for one in read_datasets(store, ["plain", "far"]).values() for spec in one.stages.values()]
    newest = datetime.fromtimestamp(max(r.finished for spec in stages for r in records(spec)), UTC)
    assert f"{newest:%Y-%m-%d};".encode() in pages[0]


def test_a_comparison_needs_neither_weights_nor_the_code_that_made_them(store, tmp_path):
    copy = shutil.copytree(store, tmp_path / "store")
    for path in copy.rglob("stage.json"):
        content = json.loads(path.read_text().replace("/tiny_pack", "/gone"))
        del content["checksum"]
        path.write_text(json.dumps(content | {"checksum": fingerprint(content)}))
    report = compare(str(copy), ["far", "plain"], str(tmp_path / "out"))
    assert [dataset["w"] for dataset in report["datasets"]] == [0.5, 0.0]


@pytest.mark.parametrize(
    "runs, error, message",
    [
        (["plain"], ConfigError, "2 to 7 different runs, not plain: negfacediff status"),
        (["far", "far"], ConfigError, "2 to 7 different runs"),
        (["plain", "nobody"], StoreError, "no run nobody in .*; runs there: begun, far, plain"),
        (["plain", "begun"], StoreError, r"begun is not finished, it lacks \d+ units: negfacediff resume"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_written(store, runs, error, message):
    with pytest.raises(error, match=message):
        read_datasets(store, runs)


def test_the_command_refuses_before_prefect_starts(store, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["compare", store, "plain", "nobody", "--out", str(tmp_path / "out")])
    assert end.value.code == BAD_INPUT
    assert "no run nobody" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("runs", "title"), [(["a"], "a"), (["a", "b"], "a and b"), ("abc", "a, b and c")])
def test_a_comparison_is_named_after_its_runs(runs, title):
    assert title_of(runs) == title

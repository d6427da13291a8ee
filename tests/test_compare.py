"""Comparing finished runs, and sweeps of builds, on tiny random weights."""

import json
import shutil
from pathlib import Path

import pytest
from prefect.testing.utilities import prefect_test_harness

from flows.build import build_dataset
from flows.cli import BAD_INPUT, main
from flows.compare import compare, read_datasets
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import ConfigError, StoreError
from negfacediff_core.evaluation.figures import check_report
from negfacediff_core.store.layout import fingerprint

THREADS = ExecutionConfig(workers=1, device="cpu")


@pytest.fixture(scope="module", autouse=True)
def prefect_server():
    with prefect_test_harness(server_startup_timeout=300):
        yield


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
    for dataset in report["datasets"]:
        own = json.loads(Path(store, "runs", f"{dataset['name']}.json").read_text())["stages"]
        assert dataset["lineage"] == {name: place["fingerprint"] for name, place in own.items()}


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

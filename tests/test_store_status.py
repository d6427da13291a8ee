"""What is done, and which runs there are, is read from the disk alone."""

import json
from dataclasses import replace

import pytest
from small_stage import commit, make_spec

from negfacediff_core.errors import StoreError
from negfacediff_core.store import records, runs, shards, status
from negfacediff_core.store.layout import Unit


def test_status_comes_from_disk_alone(tmp_path):
    spec = make_spec(tmp_path, inputs={})
    aligned = make_spec(tmp_path, name="aligned", inputs={"samples": spec.fingerprint})
    for each in (spec, aligned):
        shards.prepare(each)
    place = {"identities": 6, "replicates": 4}
    stages = {each.name: {"fingerprint": each.fingerprint, **place} for each in (aligned, spec)}
    runs.write_run(str(tmp_path), "first", {"stages": stages})
    commit(spec, Unit(0, 0))
    made, waiting = status.status(str(tmp_path))
    assert (made.stage, made.done, made.pending, made.rows, made.failed) == ("samples", 1, 1, 16, 1)
    assert made.runs == ("first",) and made.rate > 0
    assert made.seconds_left == pytest.approx(16 / made.rate)
    assert (waiting.stage, waiting.done, waiting.pending, waiting.rate) == ("aligned", 0, 2, None)
    assert status.status(str(tmp_path / "nothing here")) == []


def test_status_passes_over_what_is_no_part_of_a_store(tmp_path):
    (tmp_path / "readme.txt").write_text("notes")
    (tmp_path / "photos" / "2024").mkdir(parents=True)
    assert status.status(str(tmp_path)) == []
    assert status.status(str(tmp_path / "readme.txt")) == []
    spec = make_spec(tmp_path, inputs={})
    shards.prepare(spec)
    commit(spec, Unit(0, 0))
    done = tmp_path / spec.path / "done"
    for stray in (
        "foo.json",
        "a-b.json",
        "0-0.json",
        "00000-000.json.bak",
        "00001-000",
        "00000-000 (1).json",
    ):
        (done / stray).write_text("{}")
    assert records.committed(spec) == [Unit(0, 0)]
    assert [stage.done for stage in status.status(str(tmp_path))] == [1]


def test_status_of_a_store_whose_stage_was_deleted(tmp_path):
    spec = make_spec(tmp_path, inputs={})
    shards.prepare(spec)
    place = {"identities": 6, "replicates": 4}
    stages = {
        "samples": {"fingerprint": spec.fingerprint, **place},
        "aligned": {"fingerprint": "f" * 16, **place},
    }
    runs.write_run(str(tmp_path), "first", {"stages": stages})
    (only,) = status.status(str(tmp_path))
    assert (only.stage, only.pending, only.runs) == ("samples", 2, ("first",))


PLACE = {"fingerprint": "f" * 16, "identities": 6, "replicates": 4}


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"stages": ["samples"]},
        {"stages": {"samples": "f" * 16}},
        {"stages": {"samples": {**PLACE, "fingerprint": None}}},
        {"stages": {"samples": {**PLACE, "replicates": "4"}}},
        {"stages": {"samples": {"fingerprint": "f" * 16}}},
    ],
)
def test_a_damaged_run_is_named(content, tmp_path):
    runs.write_run(str(tmp_path), "x", {"stages": {"samples": PLACE}})
    assert runs.read_run(str(tmp_path), "x")["stages"] == {"samples": PLACE}
    (tmp_path / "runs" / "my notes.json").write_text("[]")
    assert list(runs.read_runs(str(tmp_path))) == ["x"]
    (tmp_path / "runs" / "x.json").write_text(json.dumps({"schema": 1, **content}))
    for read in (lambda: runs.read_run(str(tmp_path), "x"), lambda: status.status(str(tmp_path))):
        with pytest.raises(StoreError, match=r"runs/x\.json is damaged"):
            read()


def test_the_rate_counts_parallel_work_once_and_pauses_not_at_all(tmp_path):
    spec = make_spec(tmp_path)
    shards.prepare(spec)
    record = commit(spec, Unit(0, 0))
    spans = [(0, 10), (0, 10), (5, 12), (1000, 1004)]
    done = [replace(record, started=float(a), finished=float(b)) for a, b in spans]
    assert status.rate(done) == pytest.approx(4 * 16 / 16)
    assert status.rate([]) is None


def test_runs_are_named_safely(tmp_path):
    assert runs.read_run(str(tmp_path), "demo") is None
    runs.write_run(str(tmp_path), "demo", {"stages": {}})
    assert runs.read_runs(str(tmp_path))["demo"]["name"] == "demo"
    with pytest.raises(StoreError, match="cannot name a run"):
        runs.write_run(str(tmp_path), "../demo", {"stages": {}})

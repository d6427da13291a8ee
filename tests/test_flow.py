"""Real flow runs on tiny random weights: what is built, what a failure stops, how a stopped one goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from prefect.settings import PREFECT_API_URL

from flows import build
from flows import demo as demo_module
from flows.build import build_dataset
from flows.cli import BUILD_FAILED, main
from flows.demo import demo
from flows.results import PAGE
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import BuildError, StoreError
from negfacediff_core.evaluation.schema import check_report
from negfacediff_core.stages.build import plan_build, run_unit
from negfacediff_core.store.records import records
from negfacediff_core.store.status import status
from tasks import chunks

pytestmark = pytest.mark.usefixtures("prefect_server")

THREADS = ExecutionConfig(workers=2, device="cpu")
# 3 x 2 units of samples, aligned crops and embeddings; contexts, negatives and evaluation are one each.
UNITS = 3 * 6 + 3


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """How often each unit of each stage was run."""
    counts: Counter[tuple[str, str]] = Counter()

    def counted(spec, unit, execution):
        counts[spec.name, unit.name] += 1
        return run_unit(spec, unit, execution)

    monkeypatch.setattr(chunks, "run_unit", counted)
    return counts


def content(store: Path) -> dict[str, bytes]:
    """Everything in a store that must not depend on how or when it was built."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file()
        and not {"done", "runs", "logs"} & set(path.relative_to(store).parts)
        and path.name not in ("report.html", PAGE)
    }


def test_a_build_runs_every_unit_once_and_a_second_time_none(tiny_build, tmp_path, calls):
    result = build_dataset(tiny_build, THREADS, str(tmp_path))
    assert len(calls) == UNITS
    assert set(calls.values()) == {1}
    assert [stage.pending for stage in status(str(tmp_path))] == [0] * 7

    page = Path(result["stages"]["evaluation"], "report.html").read_text()
    assert "<html" in page and "data:image/png;base64," in page
    run = json.loads((tmp_path / "runs/tiny.json").read_text())
    assert run["seconds"] > 0
    assert run["config"]["samples"]["steps"] == 2

    before = content(tmp_path)
    again = build_dataset(tiny_build, THREADS, str(tmp_path))
    assert sum(calls.values()) == UNITS
    assert again["figures"] == result["figures"]
    assert content(tmp_path) == before


@pytest.mark.slow  # test_executors compares the stores of all executors, without Prefect
def test_threads_and_dask_make_identical_stores(tiny_build, tmp_path):
    build_dataset(tiny_build, THREADS, str(tmp_path / "threads"))
    processes = ExecutionConfig(executor="dask", workers=2, device="cpu")
    build_dataset(tiny_build, processes, str(tmp_path / "dask"))
    by_threads, by_dask = content(tmp_path / "threads"), content(tmp_path / "dask")
    assert by_threads.keys() == by_dask.keys()
    assert [path for path in by_threads if by_threads[path] != by_dask[path]] == []


def test_a_unit_that_fails_once_comes_back_in_the_next_round(tiny_build, tmp_path, calls, monkeypatch):
    counted = chunks.run_unit

    def flaky(spec, unit, execution):
        if (spec.name, unit.name) == ("aligned", "00001-000") and not calls["aligned", "00001-000"]:
            calls[spec.name, unit.name] += 1
            raise OSError("a passing trouble")
        return counted(spec, unit, execution)

    monkeypatch.setattr(chunks, "run_unit", flaky)
    build_dataset(tiny_build, THREADS, str(tmp_path))
    assert calls.pop(("aligned", "00001-000")) == 2
    assert set(calls.values()) == {1}


def test_a_unit_that_always_fails_is_named_with_its_log_stops_no_other_and_fails_the_command(
    tiny_build, tmp_path, calls, monkeypatch, capsys
):
    counted = chunks.run_unit

    def poisoned(spec, unit, execution):
        if (spec.name, unit.name) == ("samples", "00001-000"):
            calls[spec.name, unit.name] += 1
            raise OSError("a lasting trouble")
        return counted(spec, unit, execution)

    monkeypatch.setattr(chunks, "run_unit", poisoned)
    preset = tmp_path / "tiny.yaml"
    preset.write_text(yaml.safe_dump(tiny_build.model_dump()))
    options = ["--workers", "2", "--device", "cpu", "--retries", "1"]
    with pytest.raises(SystemExit) as stop:
        main(["build", str(preset), "--store", str(tmp_path), *options])
    assert stop.value.code == BUILD_FAILED
    said = capsys.readouterr().err
    assert "Error: 1 unit is not done after 2 rounds: samples 00001-000: OSError: a lasting trouble" in said
    assert calls["samples", "00001-000"] == 2
    log = said.split("(log ")[1].split(")")[0]
    assert "a lasting trouble" in Path(log).read_text()
    embeddings = {spec.name: spec for spec in plan_build(tiny_build, str(tmp_path))}["embeddings"]
    assert len(records(embeddings)) == 5


@pytest.fixture
def outage(monkeypatch):
    """Make so many listings fail, after the build has begun, as those of an object store that is down."""
    left, paused = [], []

    def listed(specs):
        if left:
            raise StoreError(left.pop())
        return build.pending_lines.listing(specs)

    listed.listing = build.pending_lines
    monkeypatch.setattr(build, "pending_lines", listed)
    monkeypatch.setattr(build, "sleep", paused.append)
    yield lambda times: (left.extend(["cannot list s3://bucket: it is down."] * times), paused)[1]


def test_a_store_that_does_not_answer_for_a_while_is_waited_for(tiny_build, tmp_path, calls, outage, caplog):
    paused = outage(3)
    build_dataset(tiny_build, THREADS, str(tmp_path))
    assert paused == list(build.PAUSES[:3]) and set(calls.values()) == {1}
    assert "it is down. Asking again in 5 s." in caplog.text


def test_a_store_that_does_not_answer_any_more_fails_the_build_and_says_how_to_go_on(
    tiny_build, tmp_path, outage, monkeypatch
):
    published = []
    monkeypatch.setattr(build, "publish_failures", lambda *said: published.append(said))
    paused = outage(len(build.PAUSES) + 1)
    with pytest.raises(BuildError, match=r"not answered for 10:00.*is down.*negfacediff resume .* tiny"):
        build_dataset(tiny_build, THREADS, str(tmp_path))
    assert paused == list(build.PAUSES)
    ((run, _, why, failures),) = published
    assert run == "tiny" and "not answered" in why and not failures


def test_the_demo_compares_two_builds_that_share_contexts(tiny_build, tmp_path, monkeypatch):
    values = tiny_build.model_dump()
    plain = {**values, "name": "demo-none", "negatives": {"rule": "none"}}
    plain["samples"] = {**values["samples"], "w": 0.0}
    builds = [type(tiny_build)(**plain), tiny_build.model_copy(update={"name": "demo-far"})]
    monkeypatch.setattr(demo_module, "demo_builds", lambda: builds)

    demo(out=str(tmp_path), execution=THREADS)

    report = json.loads((tmp_path / "report.json").read_text())
    check_report(report)
    assert [(one["rule"], one["w"]) for one in report["datasets"]] == [("none", 0.0), ("far", 0.5)]
    assert report["device"] and report["versions"]["torch"]
    assert len(list((tmp_path / "store/contexts").iterdir())) == 1
    assert len(list((tmp_path / "store/samples").iterdir())) == 2
    assert (tmp_path / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")
    assert "far, w = 0.5" in (tmp_path / "report.html").read_text()


# The command line. Units leave a line when they start and another when they are committed; after `argv[2]` of
# them the next ones hang. A parent that ignores Ctrl-C (a shell's background job) must not hide it from here.
SCRIPTED_COMMAND = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from negfacediff_core.stages.build import run_unit
from tasks import chunks

log, hang_after = Path(sys.argv[1]), int(sys.argv[2])

def scripted(spec, unit, execution):
    def note(mark):
        with log.open("a") as file:
            print(mark, spec.name, unit.name, file=file, flush=True)

    note("start")
    if log.read_text().count("end ") >= hang_after:
        time.sleep(600)
    record = run_unit(spec, unit, execution)
    note("end")
    return record

chunks.run_unit = scripted
from flows.cli import main
main(sys.argv[3:])
"""


def command(log: Path, arguments: list[str], hang_after: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPTED_COMMAND, str(log), str(hang_after), *arguments],
        env={**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def marked(log: Path, mark: str) -> Counter[str]:
    lines = log.read_text().splitlines() if log.exists() else []
    return Counter(line.removeprefix(mark).strip() for line in lines if line.startswith(mark))


@pytest.mark.slow
def test_ctrl_c_stops_promptly_and_the_same_command_goes_on(tiny_build, tmp_path):
    preset = tmp_path / "tiny.yaml"
    preset.write_text(yaml.safe_dump(tiny_build.model_dump()))
    store = tmp_path / "store"
    arguments = ["build", str(preset), "--store", str(store), "--workers", "2", "--device", "cpu"]

    first = command(tmp_path / "first.log", arguments, hang_after=5)
    deadline = time.monotonic() + 240
    while sum(marked(tmp_path / "first.log", "end").values()) < 5:
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGINT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "the same command goes on" in said and "Traceback" not in said

    committed = {f"{path.parent.parent.parent.name} {path.stem}" for path in store.glob("*/*/done/*.json")}
    assert len(committed) >= 5
    second = command(tmp_path / "second.log", arguments, hang_after=UNITS)
    shown, said = second.communicate(timeout=240)
    assert second.returncode == 0, said
    assert "report.html" in shown
    started = marked(tmp_path / "second.log", "start")
    assert set(started.values()) == {1}
    assert not committed & set(started)
    assert len(committed | set(started)) == UNITS

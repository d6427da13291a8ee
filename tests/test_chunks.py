"""A chunk takes its units through their stages; one that fails is logged and named, and stops no other."""

import shutil
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from negfacediff_core.config import ExecutionConfig
from negfacediff_core.store.layout import Grid, StageSpec, Unit
from negfacediff_core.store.records import Record
from negfacediff_core.store.shards import prepare
from tasks import chunks
from tasks.chunks import Crew, Line, drive
from tasks.executors import open_pool

# Units of 3 x 2 images.
GRID = Grid(120, 2, 3, 2)
UNITS = GRID.units()


def record_of(unit: Unit) -> Record:
    return Record(unit, 6, 6, 0, {}, {}, time.time(), time.time(), "host", "cpu")


@pytest.fixture
def specs(tmp_path: Path) -> tuple[StageSpec, ...]:
    made = tuple(
        StageSpec(str(tmp_path), name, 1, {}, {}, GRID) for name in ("samples", "aligned", "embeddings")
    )
    for spec in made:
        prepare(spec)
    return made


@pytest.fixture
def crew():
    """Two threads that run scripted units; `crew.seen` lists what was reported."""
    execution = ExecutionConfig(workers=2, device="cpu")
    seen: list[tuple[str, str, int]] = []
    with open_pool(execution) as pool:
        yield (
            Crew(
                pool,
                execution,
                lambda stage: seen.append(("started", stage, 0)),
                lambda stage, rows: seen.append(("committed", stage, rows)),
                threading.Event(),
            ),
            seen,
        )


def script(
    monkeypatch: pytest.MonkeyPatch, poison: set[tuple[str, str]] = frozenset()
) -> list[tuple[str, Unit]]:
    """Replace the stages: note every call, fail the `poison`ed ones."""
    calls: list[tuple[str, Unit]] = []

    def run_unit(spec, unit, execution):
        calls.append((spec.name, unit))
        if (spec.name, unit.name) in poison:
            raise RuntimeError(f"no luck with {unit.name}")
        return record_of(unit)

    monkeypatch.setattr(chunks, "run_unit", run_unit)
    return calls


def test_every_unit_passes_every_stage_once_and_in_order(specs, crew, monkeypatch):
    calls = script(monkeypatch)
    crew, seen = crew
    assert drive([Line(unit, specs) for unit in UNITS], 0, crew) == []
    for unit in UNITS:
        assert [stage for stage, done in calls if done == unit] == ["samples", "aligned", "embeddings"]
    assert seen.count(("committed", "aligned", 6)) == len(UNITS)


def test_a_later_stage_does_not_wait_for_all_units_of_the_one_before(specs, crew, monkeypatch):
    calls = script(monkeypatch)
    drive([Line(unit, specs) for unit in UNITS], 0, crew[0])
    stages = [stage for stage, _ in calls]
    assert stages.index("embeddings") < len(UNITS) - 1 - stages[::-1].index("samples")


def test_a_store_that_is_gone_is_not_made_anew_by_a_log(specs, crew, monkeypatch):
    script(monkeypatch, {("samples", unit.name) for unit in UNITS})
    shutil.rmtree(specs[0].directory)
    failures = drive([Line(unit, specs) for unit in UNITS], 0, crew[0])
    assert len(failures) == len(UNITS) and "is gone" in failures[0].log
    assert not Path(specs[0].directory).exists()


def test_a_poisoned_unit_is_logged_and_named_and_stops_no_other(specs, crew, monkeypatch):
    calls = script(monkeypatch, {("aligned", "00003-000")})
    (failure,) = drive([Line(unit, specs) for unit in UNITS], 0, crew[0])
    assert (failure.stage, failure.unit) == ("aligned", "00003-000")
    assert failure.error == "aligned 00003-000: RuntimeError: no luck with 00003-000"
    log = Path(failure.log)
    assert log == Path(specs[1].directory) / "logs/00003-000.txt"
    assert "Traceback" in log.read_text() and "no luck" in log.read_text()
    embedded = {unit for stage, unit in calls if stage == "embeddings"}
    assert embedded == set(UNITS) - {Unit(3, 0)}


def test_a_line_starts_at_the_stage_that_it_lacks(specs, crew, monkeypatch):
    calls = script(monkeypatch)
    drive([Line(UNITS[0], specs[1:]), Line(UNITS[1], specs[2:])], 0, crew[0])
    assert sorted(calls) == [("aligned", UNITS[0]), ("embeddings", UNITS[0]), ("embeddings", UNITS[1])]


def test_a_request_to_stop_ends_the_chunk_and_hands_out_nothing_more(specs, crew, monkeypatch):
    crew, _ = crew
    calls = []

    def run_unit(spec, unit, execution):
        calls.append(unit)
        crew.stop.set()
        return record_of(unit)

    monkeypatch.setattr(chunks, "run_unit", run_unit)
    with pytest.raises(CancelledError):
        drive([Line(unit, specs) for unit in UNITS], 0, crew)
    assert len(calls) <= 2 + chunks.WINDOW_PER_WORKER * 2

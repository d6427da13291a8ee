"""A thousand units are planned, handed out and looked at in no time; `benchmarks/store.py` takes more."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from small_stage import make_spec

from flows.build import pending_lines
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.store.records import Record, pending, records, write_record
from negfacediff_core.store.runs import write_run
from negfacediff_core.store.shards import prepare
from negfacediff_core.store.status import status
from tasks import chunks
from tasks.pools import Pool

UNITS = 1000
# Generous: a free machine takes a twentieth of it.
SECONDS = 10.0


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    store = tmp_path_factory.mktemp("load")
    spec = make_spec(store, identities=4 * UNITS, inputs={}, arrays=())
    prepare(spec)
    place = {"fingerprint": spec.fingerprint, "identities": 4 * UNITS, "replicates": 4}
    write_run(str(store), "load", {"stages": {"samples": place}})
    return spec


def record_of(unit):
    return Record(unit, 16, 15, 1, {"rows": "0" * 64}, {"sample": 0.1}, 1.0, 2.0, "host", "cpu")


def test_a_round_holds_no_more_units_than_its_window_at_a_time(stage):
    lane, flying, most = ThreadPoolExecutor(2), set(), 0

    def run(unit):
        time.sleep(0.0005)
        flying.discard(unit)
        return record_of(unit)

    def submit(function, run_unit, spec, unit, execution, *, key, gpu=False):
        nonlocal most
        flying.add(unit)
        most = max(most, len(flying))
        return lane.submit(run, unit)

    rows = []
    crew = chunks.Crew(
        Pool(submit, lambda: 2),
        ExecutionConfig(),
        lambda stage: None,
        lambda stage, count: rows.append(count),
        threading.Event(),
    )
    begun = time.perf_counter()
    assert chunks.drive(pending_lines([stage]), 0, crew) == []
    assert time.perf_counter() - begun < SECONDS
    assert len(rows) == UNITS
    assert 2 <= most <= chunks.WINDOW_PER_WORKER * 2
    lane.shutdown()


def test_a_store_of_a_thousand_units_is_planned_opened_and_checked_at_once(stage):
    begun = time.perf_counter()
    assert len(pending(stage)) == UNITS
    for unit in stage.grid.units():
        write_record(stage, record_of(unit))
    assert pending(stage) == []
    assert len(records(stage)) == UNITS
    (found,) = status(stage.store)
    assert (found.done, found.pending, found.rows, found.failed) == (UNITS, 0, 16 * UNITS, UNITS)
    assert time.perf_counter() - begun < SECONDS

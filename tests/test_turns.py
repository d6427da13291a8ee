"""One run at a time writes into a store, the others wait and say so: with the limits of a server made up."""

from contextlib import contextmanager
from types import SimpleNamespace
from uuid import uuid4

import httpx
import pytest
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import build, evaluate, gate, grow, recovery, turns
from flows.resume import Resumption


def refusal(status):
    answer = httpx.Response(status, request=httpx.Request("POST", "http://server"))
    error = ConcurrencySlotAcquisitionError("no")
    error.__cause__ = httpx.HTTPStatusError("no", request=answer.request, response=answer)
    return error


@pytest.fixture
def events(monkeypatch):
    """What happens, in order; the limit is `taken` as often as is listed, and `refusals` are the server's."""
    happened, refusals, taken = [], [], []

    @contextmanager
    def concurrency(name, **options):
        assert options["max_retries"] == 0 and options["lease_duration"] == turns.LEASE
        if refusals:
            raise refusals.pop(0)
        happened.append("taken")
        yield
        happened.append("given back")

    run = SimpleNamespace(flow_run=SimpleNamespace(id=uuid4()))
    monkeypatch.setattr(turns, "concurrency", concurrency)
    monkeypatch.setattr(turns.FlowRunContext, "get", classmethod(lambda cls: run))
    monkeypatch.setattr(turns, "_is_free", lambda name: not (taken and taken.pop()))
    monkeypatch.setattr(turns, "_show", lambda run, name, message: happened.append(name))
    monkeypatch.setattr(turns.time, "sleep", lambda seconds: happened.append(seconds))
    with temporary_settings({PREFECT_API_URL: "http://server/api"}):
        yield SimpleNamespace(happened=happened, refusals=refusals, taken=taken)


def test_a_free_store_is_taken_at_once_and_given_back(events, tmp_path):
    with turns.turn(str(tmp_path)):
        events.happened.append("work")
    assert events.happened == ["taken", "work", "given back"]


def test_it_is_given_back_when_the_work_fails(events, tmp_path):
    with pytest.raises(ZeroDivisionError), turns.turn(str(tmp_path)):
        raise ZeroDivisionError
    assert events.happened[0] == "taken"


def test_who_waits_says_so_once_and_goes_on_when_the_store_is_free(events, tmp_path):
    events.taken.append(True)
    events.refusals.append(refusal(423))
    with turns.turn(str(tmp_path)):
        events.happened.append("work")
    waiting = ["Waiting for its turn", turns.LOOK, turns.LOOK, "taken", "Running", "work", "given back"]
    assert events.happened == waiting


def test_a_server_that_fails_is_no_reason_to_wait(events, tmp_path):
    events.refusals.append(refusal(500))
    with pytest.raises(ConcurrencySlotAcquisitionError), turns.turn(str(tmp_path)):
        pass


def test_without_a_flow_run_or_a_lasting_server_nobody_waits(events, tmp_path, monkeypatch):
    with temporary_settings(restore_defaults={PREFECT_API_URL}), turns.turn(str(tmp_path)):
        pass
    monkeypatch.setattr(turns.FlowRunContext, "get", classmethod(lambda cls: None))
    with turns.turn(str(tmp_path)):
        pass
    assert events.happened == []


def test_a_limit_is_named_after_its_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = turns.turn_name("faces")
    assert name == turns.turn_name(str(tmp_path / "faces")) == turns.turn_name(f"file://{tmp_path}/faces")
    assert name != turns.turn_name("faces2")
    assert "faces" in name and name.startswith("store-") and len(name) < 60
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


class Taken(Exception):
    pass


@contextmanager
def taken(store):
    assert store.endswith("somewhere")
    raise Taken
    yield


def test_a_build_leaves_its_store_alone_until_it_has_its_turn(tiny_build, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "turn", taken)
    with pytest.raises(Taken):
        build.build_dataset.fn(tiny_build, store=str(tmp_path / "somewhere"))
    assert not list(tmp_path.glob("somewhere/*"))


def test_what_goes_on_with_a_run_reads_it_again_when_it_has_its_turn(tiny_build, monkeypatch):
    identities, told = [5], []

    def sized(more):
        return tiny_build.model_copy(update={"identities": identities[0] + more})

    @contextmanager
    def waited(store):
        identities[0] = 8
        yield

    monkeypatch.setattr(build, "turn", waited)
    monkeypatch.setattr(build, "stages_of", lambda *asked: {})
    monkeypatch.setattr(build, "_make", lambda made, *rest: made.identities)
    monkeypatch.setattr(grow, "get_run_logger", lambda: SimpleNamespace(info=told.append))
    monkeypatch.setattr(
        grow, "grown", lambda store, run, more, *rest: (sized(more), f"{identities[0]} there")
    )
    assert grow.grow_dataset.fn("tiny", 2, store="somewhere") == 10
    assert told == ["5 there", "8 there"]
    monkeypatch.setattr(evaluate, "evaluated", lambda *asked: sized(0))
    assert evaluate.evaluate.fn("tiny", store="somewhere") == 8
    identities[0] = 5
    monkeypatch.setattr(recovery, "find_open", lambda store, run: Resumption("tiny", {}, 1))
    monkeypatch.setattr(recovery, "recorded", lambda *asked: sized(0))
    assert recovery.resume_failed.fn("tiny", failed_images=False, store="somewhere") == 8


def test_a_gate_takes_the_turn_of_its_store(monkeypatch):
    monkeypatch.setattr(gate, "plan_gate", lambda *asked: None)
    monkeypatch.setattr(gate, "turn", taken)
    with pytest.raises(Taken):
        gate.leakage_gate.fn("somewhere", "run", None)

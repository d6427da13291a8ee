"""`negfacediff serve` end to end: forms refuse, builds run, a store has one at a time, Ctrl-C ends all."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from served import Api, alive, free_port, served, tree, wait_for

from flows import serve
from flows.cli import BAD_INPUT, main
from flows.deployments import DEPLOYMENTS
from flows.turns import turn_name
from negfacediff_core.errors import BuildError
from negfacediff_core.store.status import status

# Ctrl-C ends everything within this, in seconds, builds in the midst of sampling as well.
ENDS_WITHIN = 60.0


def test_a_port_that_is_taken_is_named_and_what_holds_it(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = str(other.getsockname()[1])
        with pytest.raises(SystemExit) as stop, temporary_settings(restore_defaults={PREFECT_API_URL}):
            main(["serve", "--no-open", "--port", taken])
    assert stop.value.code == BAD_INPUT
    assert f"Another program listens on port {taken} already: give another --port." in capsys.readouterr().err


def test_a_server_that_ends_at_once_shows_the_end_of_its_log(tmp_path):
    log = tmp_path / "server.log"
    log.write_text("line\nno database")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with pytest.raises(BuildError, match=r"did not start; its log, .*server\.log, ends: line no database"):
        serve._await_health(ended, "http://127.0.0.1:9/api", log)


@pytest.mark.parametrize(("display", "there"), [("", False), (":0", True)])
def test_pages_are_opened_where_there_is_a_desktop(display, there, monkeypatch):
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert serve.has_desktop() is there


def end(started: subprocess.Popen, api: Api) -> float:
    """Interrupt the command as Ctrl-C does; return the seconds until it and all below it have ended."""
    below, begun = tree(started), time.monotonic()
    os.kill(started.pid, signal.SIGINT)
    started.wait(120)
    wait_for(lambda: not alive(below), "something that serve has started still runs", 10)
    with pytest.raises(httpx.HTTPError):
        api.call("GET", "/health")
    return time.monotonic() - begun


def form(tiny_build, store: Path, steps: int = 2, **changes) -> dict:
    build = json.loads(tiny_build.model_dump_json()) | changes
    build["samples"] |= {"steps": steps, "sampler": "ddpm" if steps > 2 else "ddim"}
    return {"build": build, "store": str(store), "execution": {"device": "cpu", "workers": 2}}


@pytest.mark.slow
def test_builds_are_submitted_refused_queued_and_ended(tiny_build, tmp_path):
    store, port = tmp_path / "store", free_port()
    with served(tmp_path, port) as (started, api):
        for row in DEPLOYMENTS:
            made = api.call("GET", f"/deployments/name/{row.full_name}")
            assert made["enforce_parameter_schema"] and made["parameters"]["store"] == str(store)
            assert not any(schedule["active"] for schedule in made["schedules"])
        # refused when it is submitted, or where a schema cannot tell, at once when it starts
        with pytest.raises(AssertionError, match=r"field 'build\.identities'.*less than the minimum of 2"):
            api.submit("build-dataset/demo", form(tiny_build, store, identities=1))
        wrong = form(tiny_build, store, negatives={"rule": "none"})
        state = api.wait(api.submit("build-dataset/demo", wrong), {"Failed"})
        assert "negatives.rule is none but samples.w is not 0" in state["message"]
        assert not store.exists()

        run = api.submit("build-dataset/demo", form(tiny_build, store))
        assert "15 images of 5 identities" in api.wait(run, {"Completed"})["message"]
        grown = api.submit("grow-dataset/grow-dataset", {"run": "tiny", "identities": 1, "store": str(store)})
        api.wait(grown, {"Completed"})
        checked = api.submit("verify-store/verify-store", {"store": str(store)})
        assert "No damage was found" in api.wait(checked, {"Completed"})["message"]
        assert [stage.pending for stage in status(str(store))][:3] == [0, 0, 0]

        big = {"identities": 8, "images": 64, "block_images": 64, "name": "big"}
        first = api.submit("build-dataset/demo", form(tiny_build, store, 50, **big))
        limit = f"/v2/concurrency_limits/{turn_name(str(store))}"
        wait_for(lambda: api.call("GET", limit)["active_slots"], "the first build does not take its turn")
        second = api.submit("build-dataset/demo", form(tiny_build, store, name="second", images=4))
        other = api.submit("build-dataset/demo", form(tiny_build, tmp_path / "other"))
        assert str(store) in api.wait(second, {"Waiting for its turn"})["message"]
        api.wait(other, {"Completed"})
        assert api.state(first)["name"] == "Running"
        took = end(started, api)

    with served(tmp_path, port) as (started, api):
        # the history is there, nothing counts as running, and the turn was given back
        assert api.state(run)["type"] == "COMPLETED"
        assert {api.state(one)["type"] for one in (first, second)} <= {"CANCELLED", "CRASHED", "CANCELLING"}
        wait_for(lambda: not api.call("GET", limit)["active_slots"], "the turn is kept", 120)
        again = api.submit("build-dataset/demo", form(tiny_build, store, name="second", images=4))
        api.wait(again, {"Completed"})
        end(started, api)
    assert took < ENDS_WITHIN

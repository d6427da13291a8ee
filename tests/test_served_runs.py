"""Runs that a runner serves: cancelled, killed, retried and approved; and what becomes of their store."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed import Client
from executor_places import scheduler_and_workers
from prefect.settings import PREFECT_API_URL, temporary_settings
from served import Api, alive, kill_tree, runner, server, tree, wait_for

from flows.automations import set_up
from negfacediff_core.store.status import status

pytestmark = pytest.mark.slow

# What a cancelled run may take to be gone.
STOPS_WITHIN = 15.0


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    with server(tmp_path_factory.mktemp("server")) as made, temporary_settings({PREFECT_API_URL: made.url}):
        yield made


def parameters(tiny_build, store: Path, executor: str = "threads", images: int = 128, **execution) -> dict:
    """A build of two units, each a while in sampling."""
    values = tiny_build.model_dump(mode="json", exclude_none=True)
    values |= {"identities": 2, "images": images, "block_identities": 1, "block_images": images}
    values["samples"] |= {"sampler": "ddpm", "steps": 50}
    how = {"executor": executor, "workers": 2, "device": "cpu", **execution}
    return {"build": values, "store": str(store), "execution": how}


def until_sampling(api: Api, run: str) -> None:
    """Wait until units are in the midst of sampling."""

    def sampling():
        bar = api.artifacts(run).get("tiny-samples")
        assert api.state(run)["type"] not in ("FAILED", "CRASHED"), api.state(run)
        return bar and "running" in bar["description"]

    wait_for(sampling, "no image is sampled")
    time.sleep(2)


def committed(store: Path) -> dict[str, float]:
    """When each unit was committed."""
    return {str(path.relative_to(store)): path.stat().st_mtime for path in store.glob("*/*/done/*.json")}


def assert_complete(store: Path, before: dict[str, float]) -> None:
    """Everything is made, and nothing was made again that was before."""
    assert [stage.pending for stage in status(str(store))] == [0] * 7
    assert before.items() <= committed(store).items()


@pytest.fixture(params=["threads", "dask", "tcp"])
def executor(request, tmp_path):
    """An executor by its name or address; the workers of `tcp` stay when the run has gone."""
    if request.param != "tcp":
        yield request.param
        return
    kind = ["--nthreads", "2", "--no-nanny"]
    with scheduler_and_workers(tmp_path / "cluster", kind) as address:
        yield address


def at_work(executor: str) -> list[str]:
    """The units that threads of a standing cluster's workers are at, whoever waits for them."""

    def units_of(dask_worker):
        return list(map(str, dask_worker.active_threads.values()))

    if "://" not in executor:
        return []
    with Client(executor, set_as_default=False) as client:
        return [unit for units in client.run(units_of).values() for unit in units]


def test_a_cancelled_run_is_gone_in_15_s_and_retry_goes_on(api, tiny_build, tmp_path, executor):
    store = tmp_path / "store"
    with runner(api, tmp_path) as serving:
        run = api.submit("build-dataset/demo", parameters(tiny_build, store, executor))
        until_sampling(api, run)
        processes = tree(serving)
        before = committed(store)
        assert not any(path.startswith("samples") for path in before)
        assert bool(at_work(executor)) == ("://" in executor)

        begun = time.monotonic()
        api.set_state(run, "CANCELLING")
        wait_for(lambda: not alive(processes), "processes survive", STOPS_WITHIN)
        wait_for(lambda: not at_work(executor), "workers go on", begun + STOPS_WITHIN - time.monotonic())
        api.wait(run, {"Cancelled"}, STOPS_WITHIN)
        print(f"{executor}: cancelled in {time.monotonic() - begun:.1f} s")
        assert committed(store) == before

        if executor == "threads":  # as on the command line, and as in the UI
            command = [sys.executable, "-m", "prefect", "flow-run", "retry", run]
            subprocess.run(command, check=True, env={**os.environ, "PREFECT_API_URL": api.url})
        else:
            api.set_state(run, "SCHEDULED")
        api.wait(run, {"Completed"}, 600)
    assert_complete(store, before)


def test_a_run_that_was_killed_is_marked_crashed_and_goes_on_by_itself(api, tiny_build, tmp_path):
    store = tmp_path / "store"
    with runner(api, tmp_path) as serving:
        set_up("mark-crashed")
        set_up("resume-crashed")
        run = api.submit("build-dataset/demo", parameters(tiny_build, store, "dask"))
        until_sampling(api, run)
        before = committed(store)
        kill_tree(serving)  # driver, workers, and the runner, which would have noticed
        state = api.wait(run, {"Crashed"}, 240)
        assert "Nothing has been heard of this run" in state["message"]
    (resumed,) = wait_for(lambda: api.runs_of("resume-failed/resume-failed"), "nothing resumes it", 60)
    assert resumed["parameters"]["run"] == "tiny" and resumed["parameters"]["store"] == str(store)
    assert resumed["parameters"]["execution"]["executor"] == "dask"
    with runner(api, tmp_path):
        api.wait(resumed["id"], {"Completed"}, 600)
        assert_complete(store, before)
        made = committed(store)
        again = api.submit("build-dataset/demo", parameters(tiny_build, store))
        api.wait(again, {"Completed"}, 300)
    assert committed(store) == made


def test_a_long_build_waits_with_its_plan_shown_until_it_is_approved(api, tiny_build, tmp_path):
    store = tmp_path / "store"
    with runner(api, tmp_path):
        asked = parameters(tiny_build, store, images=3, approve_above_hours=1e-9)
        run = api.submit("build-dataset/demo", asked)
        state = api.wait(run, {"Paused"})
        plan = api.artifacts(run)["plan-tiny"]["data"]
        path = f"/flow_runs/{run}/input/{state['state_details']['run_input_keyset']['description']}"
        # Prefect saves the question just after it has paused the run
        wait_for(lambda: not api.http.get(path).is_error, "nothing is asked")
        question = api.call("GET", path)
        assert "tiny would take about" in plan and plan in str(question)
        assert committed(store) == {}
        api.call("POST", f"/flow_runs/{run}/resume", {"run_input": {"approved": True}})
        api.wait(run, {"Completed"})
    assert_complete(store, {})

"""A Prefect server and a runner of the flows, as processes; and the calls of its API that the UI makes."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

ROOT = Path(__file__).parents[1]
SERVE = """
from flows.build import build_dataset
from flows.recovery import resume_failed
from prefect import serve
serve(build_dataset.to_deployment("demo"), resume_failed.to_deployment("resume-failed"))
"""


class Api:
    """What a person at the UI does, by the calls that the UI makes."""

    def __init__(self, url: str) -> None:
        self.url, self.http = url, httpx.Client(base_url=url, timeout=60)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        answer = self.http.request(method, path, json=body)
        for _ in range(10):
            # SQLite is locked for a moment: Prefect's own clients try again
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(1)
            answer = self.http.request(method, path, json=body)
        assert not answer.is_error, answer.text
        return answer.json() if answer.content else None

    def submit(self, deployment: str, parameters: dict[str, Any]) -> str:
        made = self.call("GET", f"/deployments/name/{deployment}")["id"]
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return self.call("POST", f"/deployments/{made}/create_flow_run", body)["id"]

    def state(self, run: str) -> dict[str, Any]:
        return self.call("GET", f"/flow_runs/{run}")["state"]

    def set_state(self, run: str, kind: str) -> None:
        self.call("POST", f"/flow_runs/{run}/set_state", {"state": {"type": kind}, "force": True})

    def artifacts(self, run: str) -> dict[str, dict[str, Any]]:
        wanted = {"artifacts": {"flow_run_id": {"any_": [run]}}}
        return {one["key"]: one for one in self.call("POST", "/artifacts/filter", wanted)}

    def runs_of(self, deployment: str) -> list[dict[str, Any]]:
        made = self.call("GET", f"/deployments/name/{deployment}")["id"]
        return self.call("POST", "/flow_runs/filter", {"flow_runs": {"deployment_id": {"any_": [made]}}})

    def wait(self, run: str, names: Collection[str], seconds: float = 600) -> dict[str, Any]:
        """Wait until the run's state has one of the names, and return the state."""
        return wait_for(
            lambda: (state := self.state(run))["name"] in names and state,
            f"{run} became none of {names}",
            seconds,
        )


def wait_for(condition: Any, otherwise: str, seconds: float = 600) -> Any:
    """Return what `condition` returns as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.3)
    return found


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def served(folder: Path, port: int) -> Iterator[tuple[subprocess.Popen, Api]]:
    """Run `negfacediff serve` with database and store in `folder`; yield its process and its API."""
    command = f"from flows.cli import main; main(['serve', '--port', '{port}', '--store', '{folder}/store'])"
    log = folder / "serve.log"
    environment = {"PREFECT_HOME": str(folder / "prefect"), "DISPLAY": "", "WAYLAND_DISPLAY": ""}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_API_URL", raising=False)
        with process(["-c", command], environment, log) as started:
            wait_for(lambda: "Ctrl-C ends all" in log.read_text() or started.poll() is not None, "it hangs")
            assert started.poll() is None, log.read_text()
            yield started, Api(f"http://127.0.0.1:{port}/api")


@contextmanager
def server(folder: Path) -> Iterator[Api]:
    """Run a Prefect server whose database lies in `folder`."""
    port = free_port()
    command = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with process(command, {"PREFECT_HOME": str(folder)}, folder / "server.log"):
        api = Api(f"http://127.0.0.1:{port}/api")
        wait_for(lambda: _healthy(api), "the server does not answer")
        yield api


def _healthy(api: Api) -> bool:
    try:
        return api.call("GET", "/health")
    except httpx.TransportError:
        return False


@contextmanager
def runner(api: Api, folder: Path) -> Iterator[subprocess.Popen]:
    """Serve the deployments `build-dataset/demo` and `resume-failed/resume-failed`."""
    environment = {
        "PREFECT_HOME": str(folder),
        "PREFECT_API_URL": api.url,
        "PREFECT_RUNNER_POLL_FREQUENCY": "2",
    }
    log = folder / "runner.log"
    with process(["-c", SERVE], environment, log) as started:
        wait_for(lambda: "being served" in log.read_text(), "the runner does not serve")
        yield started


@contextmanager
def process(arguments: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen]:
    """Run Python as the first process of a group, which is killed as a whole in the end."""
    with log.open("w") as output:
        started = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield started
    finally:
        kill_tree(started)


def tree(started: subprocess.Popen) -> list[psutil.Process]:
    """All processes below one."""
    return psutil.Process(started.pid).children(recursive=True)


def alive(processes: Collection[psutil.Process]) -> list[psutil.Process]:
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def kill_tree(started: subprocess.Popen) -> None:
    """Kill a process and all below it, with no chance to say anything."""
    if started.poll() is None:
        below = tree(started)
        for one in [*below, psutil.Process(started.pid)]:
            if one.is_running():
                one.send_signal(signal.SIGKILL)
        started.wait()

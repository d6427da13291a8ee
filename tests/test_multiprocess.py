"""A build over processes that know each other by address alone, as on a cluster.

Postgres behind Prefect's server, a work pool with a worker, a Dask scheduler with two workers, and a store on
S3: all on loopback.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import pytest
import s3_server
from stage_builds import changed, make
from stored_files import results

from negfacediff_core.store.status import status

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
STORE = "s3://bucket/cluster/store"
PATIENCE = 900  # seconds for any one thing to happen: on a machine that is busy, imports alone take minutes


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def until(what, happened, process=None):
    """Wait until `happened()` returns something true, and return that."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := happened():
            return found
        assert process is None or process.poll() is None, f"{what}: exit code {process.poll()}"
        time.sleep(0.3)
    raise AssertionError(f"{what}: not within {PATIENCE} s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def processes(folder):
    """A function that starts a process, whose output goes to a file; all of them end with the tests."""
    started = []

    def start(name, *command, environment=(), **options):
        with (folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [str(word) for word in command],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, **dict(environment)},
                start_new_session=True,
                **options,
            )
        started.append(process)
        return process

    yield start
    for process in reversed(started):
        process.terminate()
    for process in reversed(started):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def database(processes):
    """The address of a Postgres of its own, as Prefect wants it."""
    places = [shutil.which("initdb"), *map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    binary = next((Path(place).resolve().parent for place in places if place), None)
    if binary is None:
        pytest.skip("Postgres is not installed: apt-get install postgresql")
    # it refuses to run as root, and another user must reach its files
    user = "postgres" if os.geteuid() == 0 else None
    home = Path(tempfile.mkdtemp(prefix="negfacediff-postgres-"))
    if user:
        shutil.chown(home, user)
    options = ["-D", home / "data"]
    subprocess.run(
        [binary / "initdb", *options, "--username=prefect", "--auth=trust", "--no-sync"],
        user=user,
        cwd=home,
        check=True,
        capture_output=True,
    )
    port = free_port()
    command = [binary / "postgres", *options, "-F", "-h", "127.0.0.1", "-p", str(port), "-k", home]
    process = processes("postgres", *command, user=user)
    ready = [binary / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-q"]
    until("Postgres", lambda: subprocess.run(ready).returncode == 0, process)
    yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
    process.send_signal(signal.SIGINT)  # its way to be told to end at once, in order
    process.wait(20)
    shutil.rmtree(home)


@pytest.fixture(scope="module")
def server(processes, database, folder):
    """A client of the API of a Prefect server on that database."""
    port = free_port()
    process = processes(
        "server",
        *(sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port),
        environment={
            "PREFECT_HOME": str(folder / "server"),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        },
    )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/", timeout=60) as client:

        def healthy():
            with contextlib.suppress(httpx.TransportError):
                return client.get("health").is_success

        until("Prefect's server", healthy, process)
        yield client


@pytest.fixture(scope="module")
def s3():
    with s3_server.connected() as server:
        yield server


@pytest.fixture(scope="module")
def deployment(processes, server, s3, folder):
    """The number of the deployment `build-dataset/demo` of prefect.yaml, in a pool that has a worker."""
    environment = {
        "PREFECT_HOME": str(folder / "worker"),
        "PREFECT_API_URL": str(server.base_url).rstrip("/"),
        "NEGFACEDIFF_STORE": STORE,
    }

    def prefect(*words):
        command = [sys.executable, "-m", "prefect", *words]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    prefect("work-pool", "create", "negfacediff", "--type", "process")
    prefect("--no-prompt", "deploy", "--all", "--prefect-file", "deployments/prefect.yaml")
    processes(
        "worker",
        *(sys.executable, "-m", "prefect", "worker", "start", "--pool", "negfacediff", "--type", "process"),
        environment=environment,
    )
    return server.get("deployments/name/build-dataset/demo").raise_for_status().json()["id"]


@pytest.fixture(scope="module")
def cluster(processes, s3, folder):
    """A Dask scheduler's address, and its two workers with their nannies, each a group of processes."""
    file = folder / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    common = ["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0", "--scheduler-file", file]
    scheduler = processes("scheduler", *dask, "scheduler", *common, "--port", "0")
    until("Dask's scheduler", file.exists, scheduler)
    options = [*common, "--nthreads", "1", "--memory-limit", "0", "--local-directory", folder]
    workers = [
        processes(f"dask-{name}", *dask, "worker", *options, "--name", name) for name in ("one", "two")
    ]
    address = next(
        line.split()[-1] for line in (folder / "scheduler.log").read_text().splitlines() if "tcp://" in line
    )
    return address, workers


def committed(store, stage):
    return sum(found.done for found in status(store) if found.stage == stage)


def test_a_build_over_a_cluster_survives_a_killed_worker(server, deployment, cluster, tiny_build, tmp_path):
    """Submitted through the API; one worker killed in the middle, with its nanny; as made by one process."""
    address, workers = cluster
    build = changed(tiny_build, identities=12, images=6, samples__steps=10)
    parameters = {
        "build": build.model_dump(mode="json", exclude_none=True),
        "execution": {"executor": address, "device": "cpu"},
        "store": STORE,
    }
    submitted = server.post(f"deployments/{deployment}/create_flow_run", json={"parameters": parameters})
    assert submitted.is_success, submitted.text
    run = submitted.json()["id"]

    def state():
        return server.get(f"flow_runs/{run}").raise_for_status().json()["state"]

    def begun():
        assert state()["type"] not in ("FAILED", "CRASHED"), state()
        return committed(STORE, "samples") >= 3

    until("the first units", begun)
    os.killpg(workers[0].pid, signal.SIGKILL)
    assert committed(STORE, "samples") < 18, "the worker was killed too late to matter"
    ended = until(
        "the end of the build", lambda: state()["type"] in ("COMPLETED", "FAILED", "CRASHED") and state()
    )
    assert ended["type"] == "COMPLETED", ended
    assert workers[1].poll() is None

    make(build, tmp_path / "local", pictures=True)
    expected, found = results(tmp_path / "local"), results(STORE)
    assert len(expected) > 50
    assert {path: found.get(path) for path in expected} == expected

"""The server that a command starts for itself: it outlives the flow, and not the command."""

import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow

ASKED_TO_END = """
import sys
import time
from pathlib import Path
import httpx
from prefect import flow
from prefect.server.api.server import SubprocessASGIServer
from flows.launch import launch
from tasks.signals import kept_signals

@flow
def long_flow():
    print(SubprocessASGIServer().server_process.pid, flush=True)
    with kept_signals() as asked_to_end:
        while not asked_to_end():
            time.sleep(0.05)
        time.sleep(1)  # what the work takes to save itself
        httpx.get(f"{SubprocessASGIServer().api_url}/health").raise_for_status()
        Path(sys.argv[1]).touch()

launch(long_flow)
"""


# SLURM and systemd send SIGTERM to all processes, and who ends a command by hand to one.
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_command_that_is_asked_to_end_ends_soon_and_takes_its_server_along(tmp_path, send):
    alone = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    process = subprocess.Popen(
        [sys.executable, "-c", ASKED_TO_END, str(tmp_path / "saved")],
        env={**alone, "PREFECT_HOME": str(tmp_path / "prefect")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    server = int(process.stdout.readline())
    send(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert (tmp_path / "saved").exists()
    assert "Traceback" not in said
    assert not is_running(server)


def is_running(pid: int) -> bool:
    """Whether a process is there after a while; one of another parent may take a moment to go."""
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True

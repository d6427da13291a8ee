"""Places for the tests of executors: a scheduler and workers in processes of their own, and a small SLURM."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from distributed import Client
from noted_units import NOTES, build_real

TESTS = str(Path(__file__).parent)
# What the jobs of the small SLURM are like.
JOB = {
    "jobqueue.slurm.cores": 1,
    "jobqueue.slurm.memory": "1GB",
    "jobqueue.slurm.walltime": "00:10:00",
}
SBATCH = """#!/bin/sh
# Runs a job at once, in a session of its own, and with the environment of whoever submits it.
if [ "$1" = --test-only ]; then cat > "{folder}/tested.sh"; exit 0; fi
cp "$1" "{folder}/$$.sh"
setsid sh "{folder}/$$.sh" > "{folder}/$$.out" 2>&1 &
echo $! > "{folder}/$$.job"
echo "Submitted batch job $$"
"""
SCANCEL = """#!/bin/sh
for id in "$@"; do kill -9 -"$(cat "{folder}/$id.job")" 2> /dev/null; done
"""
SQUEUE = """#!/bin/sh
for job in "{folder}"/*.job; do
  if kill -0 "$(cat "$job")" 2> /dev/null; then basename "$job" .job; fi
done
"""


@contextmanager
def scheduler_and_workers(folder: Path, *kinds: list[str]):
    """Start a Dask scheduler and, for each kind, a worker with these arguments; yield the address.

    They are processes that this one has not made, and leave their notes in `folder`.
    """
    folder.mkdir(exist_ok=True)
    file = folder / "scheduler.json"
    environment = {**os.environ, NOTES: str(folder), "PYTHONPATH": TESTS}
    scheduler = ["dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    commands = [scheduler, *(["dask_worker", "--no-dashboard", *kind] for kind in kinds)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{command}", "--scheduler-file", str(file), *arguments],
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for command, *arguments in commands
    ]
    try:
        until = time.monotonic() + 60
        while not (file.exists() and file.read_text()):
            assert time.monotonic() < until, "the scheduler does not start"
            time.sleep(0.1)
        address = json.loads(file.read_text())["address"]
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(len(kinds), timeout=120)
        yield address
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def small_slurm(folder: Path):
    """Make the commands of SLURM in `folder`, to be put on the PATH; at the end every job is gone."""
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL), ("squeue", SQUEUE)):
        (folder / name).write_text(text.format(folder=folder))
        (folder / name).chmod(0o755)
    try:
        yield folder
    finally:
        for job in running_jobs(folder):
            with suppress(ProcessLookupError):
                os.killpg(job, signal.SIGKILL)


def running_jobs(folder: Path) -> list[int]:
    """The processes of the jobs that a small SLURM runs."""
    jobs = [int(file.read_text()) for file in folder.glob("*.job")]
    return [job for job in jobs if Path(f"/proc/{job}/stat").exists() and not _ended(job)]


def _ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def build_on_slurm(store, execution, what, folder, make=build_real):
    """Make a build, or with `make` a small stage, with the small SLURM of `folder`; in its own process."""
    from dask import config

    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    os.environ["PYTHONPATH"] = TESTS
    scheduler = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    with config.set({**JOB, "jobqueue.slurm.scheduler-options": scheduler}):
        make(store, execution, what)

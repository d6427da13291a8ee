"""A process is really killed at every step of every commit; the rerun must equal an uninterrupted run."""

import hashlib
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from small_stage import commit, make_spec

from negfacediff_core.store import faults, records, shards

# Modules are imported once, in the fork server, which has no thread that a fork could cut in two.
PROCESSES = multiprocessing.get_context("forkserver")


def build(store: str, kill_at: int, steps: multiprocessing.Queue) -> None:
    """Make every pending unit of a small stage; die at step `kill_at`, or report the steps at the end."""
    taken: list[str] = []

    def observe(step: str) -> None:
        if len(taken) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        taken.append(step)

    faults.hook = observe
    os.fsync = lambda handle: None  # a killed process, unlike a dead machine, loses nothing written
    spec = make_spec(store)
    shards.prepare(spec)
    for unit in records.pending(spec):
        commit(spec, unit)
    steps.put(taken)


def run(store: Path, kill_at: int = -1) -> tuple[int | None, list[str]]:
    """Run `build` in a process of its own; return its exit code and, if it came to the end, its steps."""
    steps = PROCESSES.Queue()
    process = PROCESSES.Process(target=build, args=(str(store), kill_at, steps))
    process.start()
    process.join()
    return process.exitcode, steps.get(timeout=10) if process.exitcode == 0 else []


def content(store: Path) -> dict[str, str]:
    """Hash of every file that holds results: not records, which hold times, nor what killed writers leave."""
    files = [path for path in store.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if not path.name.startswith(".") and path.suffix != ".partial" and path.parent.name != "done"
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    PROCESSES.set_forkserver_preload(
        ["negfacediff_core.store.status", "negfacediff_core.store.shards", "hypothesis", "pytest"]
    )
    store = tmp_path_factory.mktemp("uninterrupted")
    code, steps = run(store)
    assert code == 0
    return content(store), steps


def test_the_steps_come_in_the_order_of_the_contract(uninterrupted):
    _, steps = uninterrupted
    first_unit = [step for step in steps if "stage.json" not in step][: len(steps) // 2]
    places = [step.split()[1].split("/")[0] for step in first_unit]
    kinds = list(dict.fromkeys(places))
    assert kinds == ["arrays.zarr", "rows", "done"]
    assert len(steps) == 2 + 2 * (2 + 2 + 2)


@pytest.mark.parametrize("kill_at", range(14))
def test_killed_at_any_step_a_rerun_equals_an_uninterrupted_run(kill_at, uninterrupted, tmp_path):
    expected, steps = uninterrupted
    code, _ = run(tmp_path, kill_at)
    assert code == -signal.SIGKILL, f"the step {steps[kill_at]} was never taken"
    done = {unit.name for unit in records.committed(make_spec(tmp_path))}
    for unit in make_spec(tmp_path).grid.units():
        if unit.name in done:
            shards.read_arrays(make_spec(tmp_path), unit)
            shards.read_rows(make_spec(tmp_path), unit)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("done/*.json")}
    code, again = run(tmp_path)
    assert code == 0
    assert content(tmp_path) == expected
    assert not any(f"rename done/{name}.json" in again for name in done), "a committed unit was made again"
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())

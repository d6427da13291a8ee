"""Builds are killed again and again, drivers and workers; what they come to equals one left alone.

The kills of a short run: 10 of a process with its threads at random times, one of the driver of Dask, at
least 3 of its workers in the midst of units, and 5 of its workers at named steps; `test_store_kill` adds one
at every step of a commit. A long run adds 40 at random times with threads and 25 with Dask (15 of all its
processes, 10 of the driver alone), at least 8 of workers, one every 2 s, and one at every kind of step of
every stage with threads, and at most of them with workers of Dask.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from noted_units import (
    PROCESSES,
    Direct,
    build_real,
    build_small,
    count,
    kill_group,
    kind_of,
    notes,
    plan_deaths,
    promises,
    results,
    stamps,
    start,
)
from small_stage import commit, make_spec

from flows import build as flow
from flows.results import PAGE
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import BuildError
from negfacediff_core.stages.build import plan_build
from negfacediff_core.store.layout import StageSpec, Unit
from negfacediff_core.store.records import pending
from negfacediff_core.store.shards import prepare
from tasks import chunks
from tasks.executors import open_pool

THREADS = ExecutionConfig(workers=2, device="cpu")
DASK = ExecutionConfig(executor="dask", workers=2, device="cpu", retries=20)
SMALL_UNITS = 12


class Lives:
    """The lives of one store under one way to make it, and what holds after each of them."""

    def __init__(self, make: Callable, arguments: tuple, specs: list[StageSpec], folder: Path) -> None:
        self.make, self.arguments, self.specs, self.folder = make, arguments, specs, folder
        self.store = Path(specs[0].store)
        self.number = 0
        self.kept: dict[str, tuple[int, int, int]] = {}

    def begin(self, kill_at: Path | None = None):
        self.number += 1
        return start(self.make, self.store, self.notes, *self.arguments, kill_at=kill_at)

    @property
    def notes(self) -> Path:
        return self.folder / f"life-{self.number}"

    def check(self, done_before: set[tuple[str, str]]) -> None:
        """What was committed before the life was neither made nor written again in it."""
        assert not done_before & set(count(self.notes, "start")), "a committed unit was made again"
        assert stamps(self.specs).items() >= self.kept.items(), "a committed unit was written again"
        self.kept = stamps(self.specs)

    def done(self) -> set[tuple[str, str]]:
        return set(promises(self.specs))

    def live(self, kill_at: Path | None = None) -> int:
        """Live to the end; return the exit code."""
        process = self.begin(kill_at)
        process.join(400)
        kill_group(process)
        return process.exitcode

    def finish(self) -> None:
        """Live to the end; what is left is made, each unit once."""
        before = self.done()
        assert self.live() == 0
        self.check(before)
        wanted = {(spec.name, unit.name) for spec in self.specs for unit in spec.grid.units()}
        assert set(count(self.notes, "start")) == wanted - before
        assert set(count(self.notes, "start").values()) <= {1}


@pytest.fixture(scope="module")
def whole_build(tiny_build, tmp_path_factory) -> tuple[Path, float]:
    """A tiny build that nothing interrupted, and the seconds that a life of it takes."""
    folder = tmp_path_factory.mktemp("whole")
    first = PROCESSES.Process(target=int)  # the first has to wait until the fork server has imported all
    first.start()
    first.join()
    begun = time.monotonic()
    process = start(build_real, folder / "store", folder, THREADS, tiny_build)
    process.join(240)
    assert process.exitcode == 0
    return folder / "store", time.monotonic() - begun


@pytest.fixture(scope="module")
def whole_stage(tmp_path_factory) -> Path:
    """A small stage that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(build_small, folder / "store", folder, THREADS, SMALL_UNITS)
    process.join(240)
    assert process.exitcode == 0
    return folder / "store"


def steps_of(whole: Path) -> list[str]:
    """Every step that was taken in the making of a store that nothing interrupted."""
    return (whole.parent / "steps.txt").read_text().splitlines()


def assert_equal(specs: list[StageSpec], whole: Path) -> None:
    """The stores of both hold the same bytes, and their records say the same."""
    mine, other = results(Path(specs[0].store)), results(whole)
    assert mine.keys() == other.keys()
    assert [path for path in mine if mine[path] != other[path]] == []
    assert promises(specs) == promises(
        [StageSpec(**{**_fields(spec), "store": str(whole)}) for spec in specs]
    )


def _fields(spec: StageSpec) -> dict:
    return {name: getattr(spec, name) for name in StageSpec.__dataclass_fields__}


def kill_all(process, lives: Lives) -> None:
    """Kill a build with all its processes."""
    kill_group(process)


def kill_driver(process, lives: Lives) -> None:
    """Kill a build's first process alone: its workers have to notice, which takes them a moment."""
    process.kill()
    process.join()
    workers = {pid for _, _, pid in notes(lives.notes, "start")} - {process.pid}
    _wait_until(lambda: not any(map(_alive, workers)), "the workers outlive their driver")


def kill_at_random(
    build,
    execution: ExecutionConfig,
    whole: tuple[Path, float],
    kills: int,
    folder: Path,
    kill: Callable[..., None] = kill_all,
) -> None:
    """Kill a build at random times; a store that is complete makes room for a new one."""
    seed = int(time.time())
    print(f"seed {seed}")
    moments = random.Random(seed)
    span, lives = whole[1], None
    while kills:
        if lives is None:
            folder = folder / "next"
            lives = Lives(build_real, (execution, build), plan_build(build, str(folder / "store")), folder)
        before = lives.done()
        process = lives.begin()
        process.join(moments.uniform(0, span))
        complete = process.exitcode == 0
        span *= 0.8 if complete else 1.0  # a quiet machine is quicker than the one that was timed
        kills -= not complete
        kill(process, lives)
        assert process.exitcode in (0, -signal.SIGKILL)
        lives.check(before)
        if complete:
            assert_equal(lives.specs, whole[0])
            lives = None
    if lives is not None:
        lives.finish()
        assert_equal(lives.specs, whole[0])


@pytest.mark.slow
def test_killed_at_random_times_a_build_comes_to_the_same_dataset(tiny_build, whole_build, tmp_path):
    kill_at_random(tiny_build, THREADS, whole_build, kills=10, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "execution, kill, kills",
    [(THREADS, kill_all, 40), (DASK, kill_all, 15), (DASK, kill_driver, 10)],
    ids=["threads", "dask", "driver"],
)
def test_killed_over_fifty_times_a_build_comes_to_the_same_dataset(
    execution, kill, kills, tiny_build, whole_build, tmp_path
):
    # the processes of dask take seconds to start, in which nothing is made
    whole = (whole_build[0], whole_build[1] + 10 * (execution is DASK))
    kill_at_random(tiny_build, execution, whole, kills, tmp_path, kill)


@pytest.mark.slow
def test_killed_at_every_step_of_every_stage_a_build_comes_to_the_same_dataset(
    tiny_build, whole_build, tmp_path
):
    """Each life of one store dies at the first step of a stage of whose kind none has died before."""
    specs = plan_build(tiny_build, str(tmp_path / "store"))
    lives = Lives(build_real, (THREADS, tiny_build), specs, tmp_path)
    steps = tmp_path / "steps.txt"
    steps.touch()
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        before = lives.done()
        process = lives.begin(kill_at=steps)
        process.join(240)
        code = process.exitcode
        lives.check(before)
    assert code == 0
    died = set(steps.read_text().splitlines())
    assert len(died) >= lives.number - 1
    assert died >= {kind for step in steps_of(whole_build[0]) if (kind := kind_of(step))}
    assert_equal(specs, whole_build[0])


def die_as_planned(lives: Lives, planned: list[str]) -> None:
    """Live until no death is left of those that are planned, and then to the end.

    A life may end with units that are not made, for which too many of its workers have died.
    """
    plan = plan_deaths(lives.folder / "plan", planned)
    while list(plan.iterdir()):
        left = len(list(plan.iterdir()))
        before = lives.done()
        assert lives.live(kill_at=plan) in (0, 1)
        assert len(list(plan.iterdir())) < left, "none of the steps is taken"
        lives.check(before)
        begun = count(lives.notes, "start")
        assert not {unit for unit, times in begun.items() if times > 1 + len(planned)}
    lives.finish()


@pytest.mark.slow
def test_workers_of_dask_die_at_named_steps_and_the_build_comes_to_the_same_dataset(whole_stage, tmp_path):
    """Before a shard, in its midst, between two files, with a record that has no name yet, and with one."""
    spec = make_spec(tmp_path / "store", identities=4 * SMALL_UNITS)
    lives = Lives(build_small, (DASK, SMALL_UNITS), [spec], tmp_path)
    steps = {
        "00000-000": ["write arrays.zarr/image/c.0.0.0.0.0", "half arrays.zarr/embedding/c.0.0.0"],
        "00001-000": ["renamed arrays.zarr/embedding/c.1.0.0"],
        "00002-000": ["rename done/00002-000.json"],
        "00003-000": ["renamed done/00003-000.json"],
    }
    plan = plan_deaths(tmp_path / "plan", [f"samples: {step}" for taken in steps.values() for step in taken])
    assert lives.live(kill_at=plan) == 0
    assert list(plan.iterdir()) == [], "a step was not taken by a worker"
    begun = count(lives.notes, "start")
    # what has a record when its worker dies is not made again
    again = {unit: len(taken) + 1 - (unit == "00003-000") for unit, taken in steps.items()}
    assert {unit: times for (_, unit), times in begun.items()} == {
        unit.name: again.get(unit.name, 1) for unit in spec.grid.units()
    }
    assert_equal([spec], whole_stage)


@pytest.mark.slow
def test_workers_of_dask_die_at_every_step_of_units_and_the_stage_comes_to_the_same(whole_stage, tmp_path):
    spec = make_spec(tmp_path / "store", identities=4 * SMALL_UNITS)
    units = ("c.0.0", "c.1.0", "00000-000", "00001-000")
    planned = [step for step in steps_of(whole_stage) if step.startswith("samples: ")]
    planned = [step for step in planned if any(unit in step for unit in units)]
    assert len(planned) == 2 * 16
    lives = Lives(build_small, (DASK, SMALL_UNITS), [spec], tmp_path)
    die_as_planned(lives, planned)
    assert_equal([spec], whole_stage)


@pytest.mark.slow
def test_workers_of_dask_die_in_every_stage_and_the_build_comes_to_the_same(
    tiny_build, whole_build, tmp_path
):
    """In the midst of every kind of file of every stage, and when it has just got its name."""
    by_kind = {kind_of(step): step for step in reversed(steps_of(whole_build[0]))}
    planned = [step for step in by_kind.values() if ": half " in step or ": renamed " in step]
    assert len({step.partition(":")[0] for step in planned}) == len(plan_build(tiny_build, str(tmp_path)))
    specs = plan_build(tiny_build, str(tmp_path / "store"))
    lives = Lives(build_real, (DASK, tiny_build), specs, tmp_path)
    die_as_planned(lives, planned)
    assert_equal(specs, whole_build[0])


def test_a_killed_driver_of_dask_takes_its_workers_along_and_loses_no_committed_unit(whole_stage, tmp_path):
    spec = make_spec(tmp_path / "store", identities=4 * SMALL_UNITS)
    lives = Lives(build_small, (DASK, SMALL_UNITS), [spec], tmp_path)
    process = lives.begin()
    while len(notes(lives.notes, "end")) < 3:
        assert process.is_alive()
        time.sleep(0.02)
    assert {pid for _, _, pid in notes(lives.notes, "start")} - {process.pid}
    kill_driver(process, lives)
    lives.kept = stamps([spec])
    before = lives.done()
    assert len(before) >= 3
    lives.finish()
    assert_equal([spec], whole_stage)


def test_workers_that_are_killed_while_a_build_runs_do_not_stop_it(whole_stage, tmp_path):
    spec = make_spec(tmp_path / "store", identities=4 * SMALL_UNITS)
    lives = Lives(build_small, (DASK, SMALL_UNITS), [spec], tmp_path)
    process = lives.begin()
    killed: set[int] = set()
    last = 0.0
    while process.is_alive():
        started = notes(lives.notes, "start")
        if started and started[-1][2] not in killed and len(killed) < 4 and time.monotonic() - last > 0.3:
            # the worker that began a unit last, which has most likely not ended it yet
            victim = started[-1][2]
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)
            last = time.monotonic()
        time.sleep(0.005)
    process.join()
    assert process.exitcode == 0
    assert len(killed) >= 3
    ended, begun = count(lives.notes, "end"), count(lives.notes, "start")
    assert len(lives.done()) == SMALL_UNITS
    # a unit is made again only where a worker died under it
    assert sum(begun.values()) <= SMALL_UNITS + len(killed)
    assert set(ended.values()) == {1}
    assert_equal([spec], whole_stage)


@pytest.mark.slow
def test_a_worker_is_killed_every_two_seconds_and_a_build_comes_to_the_same_dataset(tiny_build, tmp_path):
    """Of those that have made a unit since they started: networks take longer than that to load."""
    build = tiny_build.model_copy(update={"identities": 16, "images": 8})
    whole, killed, last = tmp_path / "whole", [], 0.0
    undisturbed = start(build_real, whole, tmp_path / "whole-notes", THREADS, build)
    undisturbed.join(400)
    assert undisturbed.exitcode == 0
    specs = plan_build(build, str(tmp_path / "store"))
    lives = Lives(build_real, (DASK, build), specs, tmp_path)
    process = lives.begin()
    while process.is_alive():
        time.sleep(0.02)
        useful = {pid for _, _, pid in notes(lives.notes, "end")}
        busy = [pid for _, _, pid in notes(lives.notes, "start") if pid in useful and pid not in killed]
        if busy and time.monotonic() - last > 2:
            os.kill(busy[-1], signal.SIGKILL)
            killed.append(busy[-1])
            last = time.monotonic()
    assert process.exitcode == 0
    assert len(killed) >= 8
    assert set(count(lives.notes, "end").values()) == {1}
    assert sum(count(lives.notes, "start").values()) <= len(lives.done()) + len(killed)
    assert_equal(specs, whole)


class KilledWorker(Exception):
    """What Dask raises for a unit under which a worker died; its name is what counts."""


def test_what_dies_beside_a_deadly_unit_has_its_last_chance_alone(tmp_path, monkeypatch):
    """Two units share a worker that the first kills whenever it runs: the second is made all the same."""
    spec = make_spec(tmp_path, identities=16)
    prepare(spec)
    deadly, beside = Unit(0, 0), Unit(1, 0)
    flying: set[Unit] = set()
    met = threading.Event()

    def run_unit(spec, unit, execution):
        if unit == deadly:
            flying.add(unit)
            met.wait(0.5)
            flying.remove(unit)
            met.clear()
            raise KilledWorker
        if unit == beside and deadly in flying:
            met.set()
            raise KilledWorker
        return commit(spec, unit)

    monkeypatch.setattr(chunks, "run_unit", run_unit)
    monkeypatch.setattr(flow, "run_chunk", Direct)
    with open_pool(THREADS) as pool:
        crew = chunks.Crew(pool, THREADS, lambda stage: None, lambda stage, rows: None, threading.Event())
        with pytest.raises(BuildError, match=r"samples 00000-000: KilledWorker"):
            flow.finish([spec], crew)
    assert pending(spec) == [deadly]


def _wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["threads", "dask"])
def test_the_command_itself_is_killed_and_goes_on(executor, tiny_build, whole_build, tmp_path):
    preset = tmp_path / "tiny.yaml"
    preset.write_text(yaml.safe_dump(tiny_build.model_dump()))
    store = tmp_path / "store"
    command = [sys.executable, "-c", "from flows.cli import main; main()", "build", str(preset)]
    command += ["--store", str(store), "--workers", "2", "--device", "cpu", "--executor", executor]
    specs = plan_build(tiny_build, str(store))
    kept: dict[str, tuple[int, int, int]] = {}
    for wanted in (2, 7, 12):
        process = subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 240
        while len(list(store.glob("*/*/done/*.json"))) < wanted:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert stamps(specs).items() >= kept.items()
        kept = stamps(specs)
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    assert stamps(specs).items() >= kept.items()
    for page in ("report.html", PAGE):
        (Path(specs[-1].directory) / page).unlink()
    assert_equal(specs, whole_build[0])

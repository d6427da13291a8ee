"""Every executor gives the same results, and what goes wrong in one piece of work stays with that piece."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import wait
from pathlib import Path

import dask
import pytest
from distributed import LocalCluster
from noted_units import NOTES, build_small, count, promises, results, start
from small_stage import make_spec

from flows.command import check
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import ConfigError
from tasks import executors, machine, pools
from tasks.executors import check_available, open_pool
from tasks.pools import Pool


def leave(folder: Path, number: int) -> bytes:
    """Write a number's square to a file, as stages write to the store; what is returned is not fetched."""
    (folder / str(number)).write_text(str(number**2))
    return b"x" * 2**20


def poisoned(number: int) -> int:
    if number == 3:
        raise ValueError(f"poison in {number}")
    return number


def die(number: int) -> int:
    if number == 3:
        os._exit(1)
    return number


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(
        n_workers=2, threads_per_worker=1, protocol="tcp://", processes=False, dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module", params=["threads", "dask", "address"])
def pool(request):
    """A pool of every executor that runs without a GPU."""
    name = request.param
    if name == "address":
        name = request.getfixturevalue("cluster").scheduler_address
    with open_pool(ExecutionConfig(executor=name, workers=2, device="cpu")) as pool:
        yield pool


def test_work_is_done_whatever_the_executor_and_nothing_is_sent_back(pool: Pool, tmp_path):
    futures = [pool.submit(leave, tmp_path, number, key=f"{tmp_path}-{number}") for number in range(20)]
    assert [future.result(timeout=30) for future in futures] == [None] * 20
    assert {int(file.name): int(file.read_text()) for file in tmp_path.iterdir()} == {
        number: number**2 for number in range(20)
    }
    assert pool.workers == 2


def test_a_poisoned_piece_fails_alone_and_keeps_its_error(pool: Pool):
    futures = [pool.submit(poisoned, number, key=f"poisoned-{number}") for number in range(6)]
    wait(futures, timeout=30)
    assert [future.exception() is None for future in futures] == [True, True, True, False, True, True]
    with pytest.raises(ValueError, match="poison in 3"):
        futures[3].result()


def test_a_piece_that_is_tried_again_runs_again(pool: Pool):
    for attempt in range(2):
        with pytest.raises(ValueError, match="poison"):
            pool.submit(poisoned, 3, key=f"again-3-{attempt}").result(timeout=30)


def test_a_worker_that_dies_fails_its_own_piece_alone():
    with open_pool(ExecutionConfig(executor="dask", workers=2, device="cpu")) as pool:
        futures = [pool.submit(die, number, key=f"die-{number}") for number in range(5)]
        wait(futures, timeout=60)
        assert [future.exception() is None for future in futures] == [True, True, True, False, True]
        assert "KilledWorker" in type(futures[3].exception()).__name__


def test_a_worker_that_takes_long_to_start_again_is_waited_for():
    """Dask gives one up that is not back in 15 s, here in no time; then nobody would be left."""
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "10ms"}),
        open_pool(ExecutionConfig(executor="dask", workers=1, device="cpu")) as pool,
    ):
        with pytest.raises(Exception, match="died while running it"):
            pool.submit(die, 3, key="die-3").result(timeout=60)
        pool.submit(die, 4, key="die-4").result(timeout=60)


def built(store: Path, folder: Path, **execution) -> int:
    """Make eight units of the small stage in a process of its own; return its exit code."""
    process = start(build_small, store, folder, ExecutionConfig(device="cpu", **execution), 8)
    process.join(120)
    return process.exitcode


@pytest.fixture(scope="module")
def by_one_thread(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one-thread")
    assert built(folder / "store", folder, workers=1) == 0
    return folder / "store"


def test_all_executors_make_the_same_bytes(by_one_thread, cluster, tmp_path, monkeypatch):
    monkeypatch.setenv(NOTES, str(tmp_path))  # the workers of that cluster are in this process
    with LocalCluster(
        n_workers=1, threads_per_worker=3, protocol="tcp://", processes=False, dashboard_address="127.0.0.1:0"
    ) as threaded:
        ways = {
            "threads": {"workers": 3},
            "dask": {"executor": "dask", "workers": 2},
            "cluster": {"executor": cluster.scheduler_address},
            "threaded": {"executor": threaded.scheduler_address},
        }
        for name, way in ways.items():
            assert built(tmp_path / name, tmp_path / f"{name}-notes", **way) == 0
    whole = make_spec(by_one_thread, identities=32)
    for name in ways:
        assert results(tmp_path / name) == results(by_one_thread), name
        assert promises([make_spec(tmp_path / name, identities=32)]) == promises([whole]), name


def test_poisoned_units_fail_alone_are_named_with_their_logs_and_can_follow(by_one_thread, tmp_path):
    """One raises, another kills its worker whenever it is tried: the rest is made around them."""
    store, notes = tmp_path / "store", tmp_path / "notes"
    spec = make_spec(store, identities=32)
    notes.mkdir()
    poison = {"00002-000": "raise", "00005-000": "die"}
    for unit, how in poison.items():
        (notes / f"samples-{unit}").write_text(how)

    assert built(store, notes, executor="dask", workers=2) == 1
    assert {unit for _, unit in promises([spec])} == {unit.name for unit in spec.grid.units()} - set(poison)
    error = (notes / "error.txt").read_text()
    assert error.startswith("2 units are not done after 3 rounds: ")
    assert "samples 00002-000: OSError: poisoned (log " in error
    assert "samples 00005-000: KilledWorker: its worker died: out of memory" in error
    for unit, words in (("00002-000", "OSError: poisoned"), ("00005-000", "KilledWorker")):
        log = Path(spec.directory, "logs", f"{unit}.txt")
        assert str(log) in error
        assert words in log.read_text()
    # once a round, but for a round in which a dying neighbour took it along before it began
    assert all(1 <= count(notes, "start")["samples", unit] <= 3 for unit in poison)

    kept = promises([spec])
    assert built(store, tmp_path / "later", executor="threads", workers=2) == 0
    assert count(tmp_path / "later", "start") == {("samples", unit): 1 for unit in poison}
    assert promises([spec]).items() >= kept.items()
    assert results(store) == results(by_one_thread)


@pytest.fixture
def far_away(tmp_path):
    """The address of a scheduler with two workers, processes that this one has not made, and their notes."""
    file, folder = tmp_path / "scheduler.json", tmp_path / "far-away"
    folder.mkdir()
    places = {NOTES: str(folder), "PYTHONPATH": str(Path(__file__).parent)}
    scheduler = ["dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file)]
    workers = ["dask_worker", "--scheduler-file", str(file), "--nworkers", "2", "--nthreads", "1"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{command}", *arguments, "--no-dashboard"],
            env={**os.environ, **places},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for command, *arguments in (scheduler, workers)
    ]
    try:
        until = time.monotonic() + 60
        while not (file.exists() and file.read_text()):
            assert time.monotonic() < until, "the scheduler does not start"
            time.sleep(0.1)
        yield json.loads(file.read_text())["address"], folder
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_a_unit_that_kills_workers_of_a_scheduler_elsewhere_dies_once_a_round(
    by_one_thread, far_away, tmp_path
):
    """As it does with local workers: the scheduler itself would try it on three more of them."""
    address, notes = far_away
    (notes / "samples-00005-000").write_text("die")
    assert built(tmp_path / "store", notes, executor=address, retries=1) == 1
    error = (notes / "error.txt").read_text()
    assert error.startswith("1 unit is not done after 2 rounds: samples 00005-000: KilledWorker: its worker ")
    begun = count(notes, "start")
    assert begun.pop(("samples", "00005-000")) == 2
    assert set(begun.values()) == {1} and len(begun) == 7

    (notes / "samples-00005-000").unlink()
    assert built(tmp_path / "store", notes, executor=address) == 0
    assert results(tmp_path / "store") == results(by_one_thread)


def test_two_units_have_the_gpu_in_hand_while_others_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(executors, "uses_gpu", lambda device: True)
    both_at_once = threading.Barrier(2, timeout=10)
    # one samples while the other writes, and never a third
    two_in_hand, running = threading.Barrier(2, timeout=10), []

    def on_gpu():
        running.append(1)
        assert len(running) <= pools.UNITS_PER_GPU == 2
        two_in_hand.wait()
        running.pop()

    with open_pool(ExecutionConfig(workers=2)) as pool:
        on_the_gpu = [pool.submit(on_gpu, key=f"gpu-{number}", gpu=True) for number in range(4)]
        beside_it = [pool.submit(both_at_once.wait, key=f"cpu-{number}") for number in range(2)]
        for future in on_the_gpu + beside_it:
            future.result(timeout=30)


def test_an_executor_that_cannot_run_here_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(executors, "find_spec", lambda name: None)
    for executor in ("cuda", "slurm", "kubernetes"):
        with pytest.raises(ConfigError, match=rf"negfacediff\[{executor}\]"):
            check_available(ExecutionConfig(executor=executor, workers=1))


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(executors, "find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
        check_available(ExecutionConfig(executor="cuda"))


def test_workers_with_other_versions_are_refused(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch):
    other = {**machine.installed_versions(), "numpy": "1.0.0"}
    monkeypatch.setattr("distributed.Client.run", lambda self, function: {"tcp://worker:1": other})
    with (
        pytest.raises(ConfigError, match=r"numpy 1\.0\.0 \(here"),
        open_pool(ExecutionConfig(executor=cluster.scheduler_address)),
    ):
        pass


def test_an_address_where_nothing_listens_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tasks.clusters.CONNECT_SECONDS", 1)
    with (
        pytest.raises(ConfigError, match="No Dask scheduler answers at tcp://127"),
        open_pool(ExecutionConfig(executor="tcp://127.0.0.1:9")),
    ):
        pass


def test_a_gpu_that_is_not_there_is_missed_before_work_starts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match="The device cuda:1 needs an NVIDIA GPU"):
        check_available(ExecutionConfig(device="cuda:1"))
    check_available(ExecutionConfig(device="cpu"))


def test_a_scheduler_that_does_not_answer_is_missed_before_work_starts(
    monkeypatch: pytest.MonkeyPatch, tiny_build, tmp_path
):
    monkeypatch.setattr("tasks.clusters.CONNECT_SECONDS", 0.5)
    execution = ExecutionConfig(executor="tcp://127.0.0.1:1", device="cuda")
    with pytest.raises(ConfigError, match=r"No Dask scheduler answers at tcp://127\.0\.0\.1:1"):
        check([tiny_build], str(tmp_path / "store"), execution)
    assert not (tmp_path / "store").exists()

"""Every executor gives the same results, and what goes wrong in one piece of work stays with that piece."""

import os
import threading
import time
from concurrent.futures import wait

import pytest
from distributed import LocalCluster

from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import ConfigError
from tasks import executors
from tasks.executors import Pool, check_available, open_pool


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


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


def test_results_come_back_whatever_the_executor(pool: Pool):
    futures = {number: pool.submit(square, number, key=f"square-{number}") for number in range(20)}
    assert {number: future.result(timeout=30)[0] for number, future in futures.items()} == {
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


def test_one_thread_feeds_the_gpu_while_others_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(executors, "uses_gpu", lambda device: True)
    both_at_once = threading.Barrier(2, timeout=10)
    running = []

    def on_gpu():
        running.append(1)
        assert len(running) == 1
        time.sleep(0.05)
        running.pop()

    with open_pool(ExecutionConfig(workers=2)) as pool:
        on_the_gpu = [pool.submit(on_gpu, key=f"gpu-{number}", gpu=True) for number in range(4)]
        beside_it = [pool.submit(both_at_once.wait, key=f"cpu-{number}") for number in range(2)]
        for future in on_the_gpu + beside_it:
            future.result(timeout=30)


def test_an_executor_that_cannot_run_here_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(executors, "find_spec", lambda name: None)
    with (
        pytest.raises(ConfigError, match=r"negfacediff\[cuda\]"),
        open_pool(ExecutionConfig(executor="cuda")),
    ):
        pass


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(executors, "find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU"), open_pool(ExecutionConfig(executor="cuda")):
        pass


def test_workers_with_other_versions_are_refused(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch):
    other = {**executors.installed_versions(), "numpy": "1.0.0"}
    monkeypatch.setattr("distributed.Client.run", lambda self, function: {"tcp://worker:1": other})
    with (
        pytest.raises(ConfigError, match=r"numpy 1\.0\.0 \(here"),
        open_pool(ExecutionConfig(executor=cluster.scheduler_address)),
    ):
        pass


def test_an_address_where_nothing_listens_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(executors, "CONNECT_SECONDS", 1)
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
    check_available(ExecutionConfig(executor="tcp://elsewhere:8786", device="cuda"))

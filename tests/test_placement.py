"""On a cluster of unlike workers that come and go: who runs what, and what is said when nobody can."""

import shutil
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from distributed import Scheduler, SpecCluster
from distributed import Worker as DaskWorker
from small_stage import commit, make_spec

from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import ConfigError, StoppedError, WorkerError
from negfacediff_core.faces import providers
from negfacediff_core.stopping import heed
from negfacediff_core.store.shards import prepare
from tasks import dask_pool, machine, units, workers
from tasks.clusters import Cluster, connected
from tasks.executors import check_available, open_pool
from tasks.pools import Pool
from tasks.units import make_unit
from tasks.workers import Roster, Worker, check_workers

WITH_GPU, PLAIN = {"nthreads": 3, "resources": {"GPU": 2}}, {"nthreads": 2}
LOCAL = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}


@contextmanager
def cluster_of(**kinds):
    """A cluster whose workers, of this process, have these names and options."""
    made = {
        name: {"cls": DaskWorker, "options": {"name": name, **LOCAL, **options}}
        for name, options in kinds.items()
    }
    scheduler = {"cls": Scheduler, "options": {**LOCAL, "protocol": "tcp://", "port": 0}}
    with SpecCluster(workers=made, scheduler=scheduler, silence_logs=False) as cluster:
        yield cluster


@contextmanager
def pool_on(spec_cluster, **known):
    with (
        connected(spec_cluster.scheduler_address) as client,
        dask_pool.dask_pool(Cluster(client, "The cluster", "Start workers", **known)) as pool,
    ):
        yield pool


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(dask_pool, "LOOK", 0.1)


def note_worker(folder: Path, number: int, gate: threading.Event | None = None) -> None:
    from distributed import get_worker

    (folder / str(number)).write_text(str(get_worker().name))
    if gate is not None:
        gate.wait(60)


def ran_on(folder: Path) -> set[str]:
    names = {file.read_text() for file in folder.iterdir()}
    shutil.rmtree(folder)
    folder.mkdir()
    return names


def work(pool: Pool, folder: Path, gpu: bool, count: int = 6) -> set[str]:
    futures = [
        pool.submit(note_worker, folder, n, key=f"{folder}-{gpu}-{n}-{time.time()}", gpu=gpu)
        for n in range(count)
    ]
    for future in futures:
        future.result(timeout=60)
    return ran_on(folder)


def test_what_wants_a_gpu_runs_where_one_is_and_all_else_beside_it(tmp_path):
    with cluster_of(gpu=WITH_GPU, plain=PLAIN) as cluster, pool_on(cluster) as pool:
        assert work(pool, tmp_path, gpu=True) == {"gpu"}
        assert work(pool, tmp_path, gpu=False) == {"plain"}
        assert pool.workers == 2


def test_without_other_workers_the_spare_threads_of_those_with_gpus_are_taken(tmp_path):
    with cluster_of(gpu=WITH_GPU) as cluster, pool_on(cluster) as pool:
        assert work(pool, tmp_path, gpu=False) == {"gpu"}
    roster = Roster((Worker("a", "a", 5, 2), Worker("b", "b", 4, 2)))
    assert (roster.slots(gpu=True), roster.slots(gpu=False)) == (4, 5)


def test_nobody_looks_for_workers_after_the_end_of_a_pool():
    with cluster_of(one=PLAIN) as cluster:
        with pool_on(cluster):
            assert "workers" in {thread.name for thread in threading.enumerate()}
        assert "workers" not in {thread.name for thread in threading.enumerate()}


def test_where_no_worker_has_a_gpu_all_run_on_all(tmp_path):
    with cluster_of(one=PLAIN, two=PLAIN) as cluster, pool_on(cluster) as pool:
        assert work(pool, tmp_path, gpu=True, count=12) == {"one", "two"}
        assert pool.workers == 4


def until(true, seconds=60.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_workers_that_come_later_get_work(tmp_path):
    gate = threading.Event()
    gates.append(gate)
    with cluster_of(one={"nthreads": 1}) as cluster, pool_on(cluster, planned=3) as pool:
        assert pool.workers == 3, "as many as were asked for"
        futures = [pool.submit(hold, tmp_path, n, key=f"{tmp_path}-{n}") for n in range(3)]
        until(lambda: len(list(tmp_path.iterdir())) == 1)
        time.sleep(0.3)
        assert len(list(tmp_path.iterdir())) == 1, "a worker has one unit at a time"
        cluster.worker_spec["two"] = {"cls": DaskWorker, "options": {"nthreads": 2, "name": "two", **LOCAL}}
        cluster.sync(cluster._correct_state)
        until(lambda: len(list(tmp_path.iterdir())) == 3)
        gate.set()
        for future in futures:
            future.result(timeout=60)
        assert ran_on(tmp_path) == {"one", "two"}


# Workers are of this process, but what they are told is pickled.
gates: list[threading.Event] = []


def hold(folder: Path, number: int) -> None:
    note_worker(folder, number, gates[-1])


def test_units_that_are_bound_to_workers_which_leave_go_to_those_that_are_left(tmp_path):
    with cluster_of(gpu=WITH_GPU, plain=PLAIN) as cluster, pool_on(cluster) as pool:
        gate = threading.Event()
        gates.append(gate)
        futures = [pool.submit(hold, tmp_path, n, key=f"{tmp_path}-{n}") for n in range(2)]
        until(lambda: len(list(tmp_path.iterdir())) == 2)
        ran_on(tmp_path)
        # now and then Dask sees the line break before it hears that the worker leaves
        cluster.scheduler.allowed_failures = 1
        del cluster.worker_spec["plain"]
        gate.set()
        cluster.sync(cluster._correct_state)
        for future in futures:
            future.result(timeout=60)
        assert work(pool, tmp_path, gpu=False) == {"gpu"}


def work_for_long(folder: Path) -> None:
    """Take steps until it is told to end, and leave a file then."""
    (folder / "begun").touch()
    for _ in range(6000):
        time.sleep(0.01)
        try:
            heed()
        except StoppedError:
            (folder / "ended").touch()
            raise


def test_a_unit_ends_at_its_next_step_when_its_pool_is_closed_and_its_worker_works_on(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    with cluster_of(one=PLAIN) as cluster, pool_on(cluster) as other:
        theirs = other.submit(work_for_long, second, key=f"{second}")
        with pool_on(cluster) as pool:
            ours = pool.submit(work_for_long, first, key=f"{first}")
            until(lambda: (first / "begun").exists() and (second / "begun").exists())
        until(lambda: (first / "ended").exists(), 15)
        assert not ours.done() and not theirs.done() and not (second / "ended").exists()
        assert work(other, second, gpu=False, count=1) == {"one", ""}


def test_a_cluster_that_has_lost_its_gpus_says_so_and_does_not_sample_without(tmp_path):
    with cluster_of(gpu=WITH_GPU, plain=PLAIN) as cluster, pool_on(cluster, patience=0.5) as pool:
        del cluster.worker_spec["gpu"]
        cluster.sync(cluster._correct_state)
        future = pool.submit(note_worker, tmp_path, 1, key=f"{tmp_path}", gpu=True)
        with pytest.raises(WorkerError, match=r"no worker with the resource GPU left.*Start workers"):
            future.result(timeout=60)
        assert work(pool, tmp_path, gpu=False) == {"plain"}


def test_workers_that_are_on_their_way_are_waited_for(tmp_path):
    with cluster_of(one=PLAIN) as cluster, pool_on(cluster, patience=0.2, coming=lambda: True) as pool:
        del cluster.worker_spec["one"]
        cluster.sync(cluster._correct_state)
        future = pool.submit(note_worker, tmp_path, 1, key=f"{tmp_path}")
        with pytest.raises(TimeoutError):
            future.result(timeout=1)
        cluster.worker_spec["two"] = {"cls": DaskWorker, "options": {"nthreads": 2, "name": "two", **LOCAL}}
        cluster.sync(cluster._correct_state)
        future.result(timeout=60)


async def hang_up(scheduler):
    for sender in scheduler.client_comms.values():
        sender.comm.abort()


def test_a_lost_scheduler_is_named(tmp_path):
    gate = threading.Event()
    gates.append(gate)
    with cluster_of(one=PLAIN) as cluster, pool_on(cluster) as pool:
        future = pool.submit(hold, tmp_path, 1, key=f"{tmp_path}")
        until(lambda: list(tmp_path.iterdir()))
        cluster.sync(hang_up, cluster.scheduler)
        with pytest.raises(WorkerError, match="connection to The cluster was lost"):
            future.result(timeout=60)
        gate.set()


def test_a_worker_that_joins_with_other_versions_runs_nothing(tmp_path, monkeypatch):
    with cluster_of(one=PLAIN) as cluster, pool_on(cluster) as pool:
        other = {**machine.installed_versions(), "numpy": "1.0.0"}
        monkeypatch.setattr(workers, "installed_versions", lambda: other)
        future = pool.submit(note_worker, tmp_path, 1, key=f"{tmp_path}")
        with pytest.raises(WorkerError, match=r"worker one has other versions.*numpy 1\.0\.0 \(here"):
            future.result(timeout=60)
        assert not list(tmp_path.iterdir())


def test_a_worker_that_joins_and_does_not_see_the_store_runs_nothing(tmp_path):
    spec = make_spec(tmp_path / "store")
    with cluster_of(one=PLAIN) as cluster, pool_on(cluster) as pool:
        unit = spec.grid.units()[0]
        future = pool.submit(make_unit, small_unit, spec, unit, ExecutionConfig(), key=f"{tmp_path}")
        with pytest.raises(WorkerError, match="The Dask worker one does not see the store"):
            future.result(timeout=60)


def small_unit(spec, unit, execution):
    return commit(spec, unit)


@pytest.fixture
def spec(tmp_path):
    spec = make_spec(tmp_path / "store")
    prepare(spec)
    return spec


def elsewhere(**changes) -> Pool:
    """A pool of one worker on a machine where things are otherwise than here."""

    def ask(function, specs, *rest):
        there = [replace(spec, **changes) for spec in specs]
        return [(Worker("tcp://there:1", "there", 1, 0), function(there, *rest))]

    return Pool(lambda: None, lambda: 1, ask)


def test_workers_that_see_what_the_driver_sees_are_fit(spec):
    check_workers(elsewhere(), [spec], ExecutionConfig(device="cpu"))
    assert not [file for file in Path(spec.directory).iterdir() if file.name.startswith("writable")]


def test_a_store_that_workers_do_not_see_is_missed_before_work_starts(spec, tmp_path):
    with pytest.raises(WorkerError, match=r"there does not see the store .*/nowhere"):
        check_workers(elsewhere(store=str(tmp_path / "nowhere")), [spec], ExecutionConfig(device="cpu"))


def test_another_store_at_the_same_path_is_noticed(spec, tmp_path):
    other = shutil.copytree(spec.store, tmp_path / "other")
    with pytest.raises(WorkerError, match="The Dask worker there sees another store"):
        check_workers(elsewhere(store=str(other)), [spec], ExecutionConfig(device="cpu"))


def test_weights_that_a_worker_lacks_are_named(spec, tmp_path):
    weights = {"generator": replace(spec.weights["generator"], path=str(tmp_path / "missing"))}
    with pytest.raises(WorkerError, match=r"there lacks the weights of samples \(generator\).*/missing"):
        check_workers(elsewhere(weights=weights), [spec], ExecutionConfig(device="cpu"))


def test_a_device_that_a_sampling_worker_lacks_is_named(spec, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(WorkerError, match="The Dask worker there has no device cuda"):
        check_workers(elsewhere(), [spec], ExecutionConfig(device="cuda"))
    check_workers(elsewhere(), [spec], ExecutionConfig(device="auto"))


@pytest.fixture
def faces(tmp_path):
    spec = make_spec(tmp_path / "store", name="aligned", weights={})
    prepare(spec)
    return spec


ON_GPU = ExecutionConfig(faces_device="cuda")


def test_a_worker_that_cannot_find_faces_on_its_gpu_is_named(spec, faces, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(providers, "missing_provider", lambda: "No onnxruntime for it")
    with pytest.raises(WorkerError, match=r"there is to find and embed faces on cuda: No onnx"):
        check_workers(elsewhere(), [spec, faces], ON_GPU)
    check_workers(elsewhere(), [spec], ON_GPU)
    check_workers(elsewhere(), [spec, faces], ExecutionConfig(faces_device="cpu"))


def test_workers_without_gpu_take_the_faces_and_are_asked_for_it_alone(faces, monkeypatch):
    monkeypatch.setattr(providers, "missing_provider", lambda: None)

    def ask(function, *rest):
        answers = []
        for name, gpus in (("gpu", 2), ("plain", 0)):
            monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
            answers.append((Worker(name, name, 3, gpus), function(*rest)))
        return answers[:workers_there]

    pool = Pool(lambda: None, lambda: 1, ask)
    workers_there = 1
    check_workers(pool, [faces], ON_GPU)
    workers_there = 2
    with pytest.raises(WorkerError, match=r"worker plain is .* faces on cuda and has no such GPU\."):
        check_workers(pool, [faces], ON_GPU)


def test_a_worker_is_not_asked_for_what_it_will_not_run(spec, tmp_path):
    """Weights of sampling that lie on the machines with GPUs alone."""
    lacking = replace(spec, weights={"generator": replace(spec.weights["generator"], path="/missing")})

    def ask(function, specs, *rest):
        return [
            (Worker("a", "gpu", 3, 2), function(specs, *rest)),
            (Worker("b", "plain", 1, 0), function([lacking], *rest)),
        ]

    check_workers(Pool(lambda: None, lambda: 1, ask), [spec], ExecutionConfig(device="cpu"))


def test_local_workers_come_and_go_with_the_work(tmp_path):
    execution = ExecutionConfig(executor="dask", workers=2, device="cpu", adaptive=True)
    check_available(execution)
    with open_pool(execution) as pool:
        assert pool.workers == 2


@pytest.mark.parametrize("executor", ["threads", "cuda", "tcp://host:1"])
def test_an_executor_of_fixed_size_cannot_be_adaptive(executor, monkeypatch):
    monkeypatch.setattr("tasks.executors.find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="fixed number of workers: set adaptive to false"):
        check_available(ExecutionConfig(executor=executor, adaptive=True))


def test_what_was_found_on_a_worker_is_not_looked_for_again(spec, tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(units, "lacking_here", lambda spec: looked.append(spec.name))
    with cluster_of(one=PLAIN) as cluster, pool_on(cluster) as pool:
        for unit in spec.grid.units():
            pool.submit(
                make_unit, small_unit, spec, unit, ExecutionConfig(), key=f"{tmp_path}-{unit}"
            ).result(20)
    assert looked == ["samples"]

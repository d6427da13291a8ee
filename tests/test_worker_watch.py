"""What units log reaches the run, and what they do can be asked by Prometheus, whatever runs them."""

import logging
import sys
import time
import types
import urllib.request
import warnings

import pytest
from distributed import LocalCluster
from small_stage import commit, make_spec

from negfacediff_core.config import ExecutionConfig
from negfacediff_core.store.layout import Unit
from negfacediff_core.store.shards import prepare
from tasks import metrics
from tasks.executors import open_pool
from tasks.units import make_unit
from tasks.worker_logs import run_logger

POISONED = Unit(1, 0)


@pytest.fixture(scope="module", params=["threads", "address"])
def executor(request):
    run_logger()  # Prefect sets up all logging when it is first asked for a logger
    if request.param == "threads":
        yield "threads"
        return
    with LocalCluster(
        n_workers=1, threads_per_worker=2, protocol="tcp://", processes=False, dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster.scheduler_address


def speak() -> None:
    logging.getLogger("negfacediff_core.stages").info("the project speaks")
    logging.getLogger("zarr").info("a library whispers")
    logging.getLogger("distributed.worker.memory").warning("memory is %s", "short")
    try:
        raise OSError("no luck")
    except OSError:
        logging.getLogger("anything").exception("it failed")


def test_what_matters_of_what_a_unit_logs_reaches_the_run(executor, caplog):
    with (
        caplog.at_level(logging.INFO, "negfacediff"),
        open_pool(ExecutionConfig(executor=executor, workers=2, device="cpu")) as pool,
    ):
        pool.submit(speak, key="speak").result(60)
    said = [
        (record.levelname, record.getMessage()) for record in caplog.records if record.name == "negfacediff"
    ]
    who = "" if executor == "threads" else "worker 0: "
    assert said[:2] == [("INFO", f"{who}the project speaks"), ("WARNING", f"{who}memory is short")]
    assert said[2][1].startswith(f"{who}it failed\nTraceback") and "OSError: no luck" in said[2][1]
    assert len(said) == 3


def test_runs_that_share_workers_get_their_own_messages(executor, caplog):
    execution = ExecutionConfig(executor=executor, workers=2, device="cpu")
    with (
        caplog.at_level(logging.INFO, "negfacediff"),
        open_pool(execution) as pool,
        open_pool(execution) as other,
    ):
        other.submit(len, [], key="other").result(60)
        pool.submit(speak, key="speak-alone").result(60)
    said = [record.getMessage() for record in caplog.records if record.name == "negfacediff"]
    assert sum("the project speaks" in message for message in said) == 1
    left = [one for name in ("", "distributed") for one in logging.getLogger(name).handlers]
    assert not [one for one in left if type(one).__name__ == "_Forwarder"]


def run_small(spec, unit, execution):
    if unit == POISONED:
        raise OSError("poisoned")
    return commit(spec, unit)


def port_of_metrics(dask_worker) -> int:
    return dask_worker.http_server.port


def test_units_are_counted_where_they_ran(tmp_path):
    spec = make_spec(tmp_path / "store", identities=12, name="aligned")
    prepare(spec)
    with LocalCluster(
        n_workers=1, threads_per_worker=1, protocol="tcp://", processes=False, dashboard_address="127.0.0.1:0"
    ) as cluster:
        execution = ExecutionConfig(executor=cluster.scheduler_address, device="cpu")
        with open_pool(execution) as pool:
            ((_, port),) = pool.ask(port_of_metrics)
            before = scrape(port)
            for unit in spec.grid.units() + spec.grid.units()[:1]:  # the last finds its unit committed
                done = pool.submit(
                    make_unit, run_small, spec, unit, execution, key=f"{tmp_path}-{unit}-{before}"
                )
                assert (done.exception(60) is None) == (unit != POISONED)
            after = scrape(port)
    grown = {name: value - before.get(name, 0) for name, value in after.items() if "negfacediff" in name}
    assert grown['negfacediff_units_total{outcome="committed",stage="aligned"}'] == 2
    assert grown['negfacediff_units_total{outcome="failed",stage="aligned"}'] == 1
    assert grown['negfacediff_images_total{stage="aligned",status="ok"}'] == 30
    assert grown['negfacediff_images_total{stage="aligned",status="failed"}'] == 2
    assert grown['negfacediff_unit_seconds_count{stage="aligned"}'] == 2
    assert "dask_worker_threads" in after


def scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}


def test_a_gpu_that_works_is_told_of(monkeypatch):
    torch = types.SimpleNamespace(
        cuda=types.SimpleNamespace(
            is_initialized=lambda: True, get_device_properties=lambda: types.SimpleNamespace(uuid="ab-cd")
        )
    )
    nvml = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetIndex=lambda handle: {"GPU-ab-cd": 3}[handle],
        nvmlDeviceGetMemoryInfo=lambda handle: types.SimpleNamespace(used=2**30),
        nvmlDeviceGetUtilizationRates=lambda handle: types.SimpleNamespace(gpu=75),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    told = {family.name: family.samples for family in metrics._Gpu().collect()}
    (memory,), (ratio,) = told[metrics.GPU_MEMORY], told[metrics.GPU_UTILIZATION]
    assert (memory.labels, memory.value) == ({"device": "3"}, 2**30)
    assert (ratio.labels, ratio.value) == ({"device": "3"}, 0.75)
    torch.cuda.is_initialized = lambda: False
    assert [family.samples for family in metrics._Gpu().collect()] == [[], []]


@pytest.mark.slow
def test_the_log_of_a_prefect_run_holds_what_its_workers_log():
    from prefect import flow, get_client
    from prefect.client.schemas.filters import LogFilter
    from prefect.testing.utilities import prefect_test_harness

    @flow
    def listen():
        from prefect.runtime import flow_run

        for name in ("threads", "dask"):
            with open_pool(ExecutionConfig(executor=name, workers=1, device="cpu")) as pool:
                pool.submit(speak, key=f"speak-{name}").result(120)
        return flow_run.id

    with prefect_test_harness(server_startup_timeout=300), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = listen()
        until, messages = time.monotonic() + 60, []
        with get_client(sync_client=True) as client:
            # Prefect sends them every few seconds
            while "worker 0: memory is short" not in messages and time.monotonic() < until:
                time.sleep(0.5)
                messages = [log.message for log in client.read_logs(LogFilter(flow_run_id={"any_": [run]}))]
    assert "the project speaks" in messages
    assert "worker 0: the project speaks" in messages
    assert "worker 0: memory is short" in messages

"""A real build on every executor that can run here: interrupted, resumed, and equal to one by threads."""

import os
import time
from pathlib import Path

import pytest
from executor_places import JOB, build_on_slurm, running_jobs, scheduler_and_workers, small_slurm
from noted_units import build_real, count, kill_group, notes, promises, results, start
from stage_builds import planned

from negfacediff_core.config import ExecutionConfig

pytestmark = pytest.mark.slow

# Units after which a build is killed: some of the stages of images are done, others not.
BEFORE = 5
# Seconds that a build may take, on a machine that has other work as well.
PATIENCE = 600


@pytest.fixture(scope="module")
def by_threads(tiny_build, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("by-threads")
    process = start(
        build_real, folder / "store", folder / "notes", ExecutionConfig(workers=2, device="cpu"), tiny_build
    )
    process.join(PATIENCE)
    assert process.exitcode == 0
    return folder / "store"


@pytest.fixture(params=["threads", "dask", "adaptive", "address", "slurm"])
def place(request, tmp_path):
    """How to build somewhere: the function, its arguments before and after the build, the folder of notes."""
    folder = tmp_path / "notes"
    cpu = {"workers": 2, "device": "cpu"}
    if request.param == "address":
        with scheduler_and_workers(folder, ["--nthreads", "1"], ["--nthreads", "1"]) as address:
            yield build_real, ExecutionConfig(executor=address, device="cpu"), (), folder
    elif request.param == "slurm":
        with small_slurm(tmp_path / "slurm") as slurm:
            yield build_on_slurm, ExecutionConfig(executor="slurm", **cpu), (slurm,), folder
            until = time.monotonic() + 120
            while running_jobs(slurm):
                assert time.monotonic() < until, "jobs outlive their driver"
                time.sleep(0.2)
    else:
        ways = {"adaptive": {"executor": "dask", "adaptive": True}}
        way = ways.get(request.param, {"executor": request.param})
        yield build_real, ExecutionConfig(**way, **cpu), (), folder


def test_a_build_that_was_killed_goes_on_and_equals_one_by_threads(place, tiny_build, by_threads, tmp_path):
    make, execution, further, folder = place
    store = tmp_path / "store"
    specs = planned(tiny_build, str(store)).values()
    process = start(make, store, folder, execution, tiny_build, *further)
    try:
        until = time.monotonic() + PATIENCE
        while len(notes(folder, "end")) < BEFORE and process.is_alive():
            assert time.monotonic() < until, "no unit is made"
            time.sleep(0.05)
    finally:
        kill_group(process)
    kept = promises(specs)
    assert kept

    process = start(make, store, folder, execution, tiny_build, *further)
    process.join(PATIENCE)
    assert process.exitcode == 0
    whole = planned(tiny_build, str(by_threads)).values()
    assert promises(specs) == promises(whole)
    assert promises(specs).items() >= kept.items()
    assert results(store) == results(by_threads)
    begun = count(folder, "start")
    assert all(begun[unit] == 1 for unit in kept), "what was committed was made again"


def test_the_small_slurm_is_asked_for_jobs_as_they_are_described(tiny_build, tmp_path):
    with small_slurm(tmp_path / "slurm") as slurm:
        execution = ExecutionConfig(executor="slurm", workers=1, device="cpu")
        process = start(build_on_slurm, tmp_path / "store", tmp_path / "notes", execution, tiny_build, slurm)
        process.join(PATIENCE)
        assert process.exitcode == 0
        (script,) = (file.read_text() for file in slurm.glob("[0-9]*.sh"))
        assert f"#SBATCH -t {JOB['jobqueue.slurm.walltime']}" in script
        assert "--nthreads 1" in script
        assert running_jobs(slurm) == []
        assert {pid for _, _, pid in notes(tmp_path / "notes", "start")}.isdisjoint({os.getpid()})


def test_samples_are_made_on_the_worker_with_a_gpu_alone(tiny_build, by_threads, tmp_path):
    folder = tmp_path / "notes"
    kinds = (
        ["--nthreads", "3", "--resources", "GPU=2", "--name", "gpu"],
        ["--nthreads", "1", "--name", "cpu"],
    )
    with scheduler_and_workers(folder, *kinds) as address:
        execution = ExecutionConfig(executor=address, device="cpu")
        process = start(build_real, tmp_path / "store", folder, execution, tiny_build)
        process.join(PATIENCE)
        assert process.exitcode == 0
    ran = {
        stage: {pid for one, _, pid in notes(folder, "start") if one == stage}
        for stage, _, _ in notes(folder, "start")
    }
    (sampler,) = ran.pop("samples")
    (other,) = set().union(*ran.values())
    assert sampler != other
    assert results(tmp_path / "store") == results(by_threads)

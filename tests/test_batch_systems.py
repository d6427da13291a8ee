"""SLURM and Kubernetes, which are not here: what they would be asked for, and what is said without them."""

import re

import dask
import dask_jobqueue  # noqa: F401  (its defaults go with the first setting that they are read in)
import pytest
from executor_places import JOB, small_slurm

from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import ConfigError
from tasks.executors import check_available
from tasks.kubernetes import kubernetes_options
from tasks.slurm import slurm_options


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    with small_slurm(tmp_path / "slurm") as folder:
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        yield folder


def test_a_job_is_what_jobqueue_yaml_says_with_a_gpu_declared(slurm):
    with dask.config.set({**JOB, "jobqueue.slurm.cores": 6, "jobqueue.slurm.queue": "gpu"}):
        check_available(ExecutionConfig(executor="slurm", workers=4, device="cuda"))
    script = (slurm / "tested.sh").read_text()
    assert "#SBATCH -p gpu" in script and "#SBATCH --cpus-per-task=6" in script
    assert "--nthreads 6" in script and "--resources GPU=2" in script


def test_resources_that_are_configured_stay(slurm):
    execution = ExecutionConfig(executor="slurm", workers=1, device="cuda")
    with dask.config.set({"jobqueue.slurm.worker-extra-args": ["--resources", "GPU=4"]}):
        assert slurm_options(execution)["worker_extra_args"] == ["--resources", "GPU=4"]
    with dask.config.set({"jobqueue.slurm.worker-extra-args": []}):
        assert slurm_options(execution.model_copy(update={"device": "auto"}))["worker_extra_args"] == []


def test_slurm_without_its_commands_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"sbatch, which is not on this machine"):
        check_available(ExecutionConfig(executor="slurm", workers=1))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"cores": None}, r"set `cores` in .+jobqueue\.yaml, as in `cores: 8` and `memory: .+ begin with .+"),
        ({"cores": None, "memory": None}, r"set `cores` and `memory` in .+"),
        ({"memory": "much"}, r"A value in .+jobqueue\.yaml, is not a job's: Could not interpret 'much'.+"),
    ],
    ids=["no cores", "nothing", "a word"],
)
def test_jobs_that_nobody_has_described_are_refused(changed, said, slurm):
    job = {**JOB, **{f"jobqueue.slurm.{name}": value for name, value in changed.items()}}
    with dask.config.set(job), pytest.raises(ConfigError) as error:
        check_available(ExecutionConfig(executor="slurm", workers=1))
    assert re.search(rf"{said}\.$", str(error.value))


def test_jobs_that_slurm_does_not_take_are_refused_with_its_words(slurm):
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'invalid partition specified: gqu' >&2\nexit 1\n")
    with (
        dask.config.set(JOB),
        pytest.raises(ConfigError, match="invalid partition specified: gqu"),
    ):
        check_available(ExecutionConfig(executor="slurm", workers=1))


@pytest.mark.parametrize("executor", ["slurm", "kubernetes"])
def test_how_many_jobs_or_pods_has_to_be_said(executor):
    with pytest.raises(ConfigError, match=f"The executor {executor} starts as many workers as it is told"):
        check_available(ExecutionConfig(executor=executor))


def test_pods_are_what_kubernetes_yaml_says_with_a_gpu_declared():
    from dask_kubernetes.operator import make_cluster_spec

    limits = {"limits": {"nvidia.com/gpu": "1"}}
    with dask.config.set({"kubernetes.worker-command": "dask worker --nthreads 6"}):
        options = kubernetes_options(ExecutionConfig(executor="kubernetes", workers=3, device="cuda"))
    spec = make_cluster_spec(name="faces", image="negfacediff:cuda", resources=limits, **options)["spec"]
    (container,) = spec["worker"]["spec"]["containers"]
    assert container["args"][:6] == ["dask", "worker", "--nthreads", "6", "--resources", "GPU=2"]
    assert spec["worker"]["replicas"] == 3
    assert spec["idleTimeout"] > 0, "a driver that is killed must not leave pods behind"
    adaptive = ExecutionConfig(executor="kubernetes", workers=3, adaptive=True, device="cpu")
    assert kubernetes_options(adaptive)["n_workers"] == 1


def test_kubernetes_that_does_not_answer_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="No Kubernetes cluster with the Dask operator answers"):
        check_available(ExecutionConfig(executor="kubernetes", workers=1))

"""Where faces are found and embedded: on the CPU beside sampling, or on a GPU in turns with it."""

import logging
import threading
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from negfacediff_core.config import ExecutionConfig
from negfacediff_core.diffusion.checkpoint import load_generator
from negfacediff_core.diffusion.engine import SamplerSettings, SamplingEngine
from negfacediff_core.errors import ConfigError, WeightsError
from negfacediff_core.faces import packs, providers
from negfacediff_core.faces.align import TEMPLATE_112, similarity_transform, warp
from negfacediff_core.faces.detect import load_detector
from negfacediff_core.faces.embed import load_embedder
from negfacediff_core.gpu_turns import turn_of
from negfacediff_core.stages import models
from negfacediff_core.stages.models import faces_device_of
from tasks import machine
from tasks.executors import check_available


@pytest.fixture(autouse=True)
def nothing_remembered():
    """What is known of this process's onnxruntime is forgotten around each test."""
    caches = (providers.lacking_cuda, models._has_cuda_for_faces)
    for one in caches:
        one.cache_clear()
    yield
    for one in caches:
        one.cache_clear()


def fake_onnxruntime(monkeypatch, available, started):
    """Stands for an onnxruntime with these providers, of which sessions have those that could be started."""
    made = []

    def session(weights, options=None, **given):
        made.append(given)
        return SimpleNamespace(get_providers=lambda: started)

    fake = SimpleNamespace(
        get_available_providers=lambda: available, InferenceSession=session, __version__="1.31.1"
    )
    monkeypatch.setattr(providers, "onnxruntime", fake)
    return made


@pytest.mark.parametrize(
    ("faces_device", "device", "gpu", "lacking", "expected"),
    [
        ("auto", "auto", True, None, "cuda"),
        ("auto", "cuda:1", True, None, "cuda:1"),
        ("auto", "auto", True, "no provider", "cpu"),
        ("auto", "auto", False, None, "cpu"),
        ("auto", "cpu", True, None, "cpu"),
        ("cpu", "cuda", True, None, "cpu"),
        ("cuda:1", "auto", True, "no provider", "cuda:1"),
    ],
)
def test_auto_is_the_gpu_that_samples_where_onnxruntime_can_use_it(
    faces_device, device, gpu, lacking, expected, monkeypatch, caplog
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr(models, "lacking_cuda", lambda device: lacking)
    execution = ExecutionConfig(device=device, faces_device=faces_device)
    with caplog.at_level(logging.INFO):
        assert [faces_device_of(execution) for _ in range(3)] == [expected] * 3
    lost = faces_device == "auto" and lacking is not None
    told = ["faces are found and embedded on the CPU: no provider"] if lost else []
    assert [record.message for record in caplog.records] == told


def test_a_session_on_a_gpu_rounds_as_float32_and_never_falls_back(monkeypatch):
    made = fake_onnxruntime(monkeypatch, [providers.CUDA, providers.CPU], [providers.CUDA, providers.CPU])
    providers.open_session(b"", "cuda:1")
    (given,) = made
    (name, options), second = given["providers"]
    assert (name, second, given["enable_fallback"]) == (providers.CUDA, providers.CPU, 0)
    assert (options["device_id"], options["use_tf32"]) == ("1", "0")
    assert providers.lacking_cuda("cuda") is None


@pytest.mark.parametrize(
    ("available", "said"),
    [
        (
            [providers.CPU],
            "no CUDAExecutionProvider here, only CPUExecutionProvider.*pip uninstall onnxruntime",
        ),
        ([providers.CUDA, providers.CPU], "1.31.1 could not start its CUDAExecutionProvider"),
    ],
)
def test_an_onnxruntime_that_would_take_the_cpu_instead_is_refused(available, said, monkeypatch):
    fake_onnxruntime(monkeypatch, available, [providers.CPU])
    with pytest.raises(ConfigError, match=said):
        providers.open_session(b"", "cuda")
    assert "use the CPU" in providers.lacking_cuda("cuda")


def network_of(run, device):
    """A network that is evaluated by `run`."""
    session = SimpleNamespace(run=lambda names, feed: run(feed["images"]))
    return packs.Network(None, "", session, "images", ["sums"], [1], None, None, False, device)


@pytest.mark.parametrize(("device", "turns"), [("cpu", [1] * 5), ("cuda", [3, 2])])
def test_a_gpu_is_taken_once_for_many_batches(device, turns, monkeypatch):
    """9 images in batches of 2, of which 3 and no more are prepared for one turn of a GPU."""
    images = np.arange(9 * 12, dtype=np.uint8).reshape(9, 2, 2, 3)
    events = []

    def prepare(some):
        events.append("prepare")
        return some.astype(np.float32)

    def run(batch):
        events.append("run")
        return [batch.sum(axis=(1, 2, 3))]

    monkeypatch.setattr(packs, "TURN_BYTES", 2 * 2 * 12 * 4)
    outputs = list(network_of(run, device).evaluate(images, 2, prepare))
    np.testing.assert_array_equal(np.concatenate([sums for (sums,) in outputs]), images.sum(axis=(1, 2, 3)))
    assert events == [event for count in turns for event in ["prepare"] * count + ["run"] * count]


def test_faces_wait_while_the_gpu_samples():
    done = threading.Event()
    network = network_of(lambda batch: [done.set()], "cuda")
    images = np.zeros((1, 2, 2, 3), np.uint8)
    thread = threading.Thread(target=lambda: list(network.evaluate(images, 1, np.float32)))
    with turn_of(torch.device("cuda", 0)):
        thread.start()
        assert not done.wait(0.1)
    assert done.wait(10)
    thread.join()


@pytest.mark.parametrize(("device", "failures", "tries"), [("cuda", 1, 2), ("cuda", 2, 2), ("cpu", 1, 1)])
def test_where_memory_is_short_on_a_gpu_that_of_pytorch_is_given_back(device, failures, tries, monkeypatch):
    calls = []

    def run(batch):
        calls.append("run")
        if calls.count("run") <= failures:
            raise RuntimeError("Failed to allocate memory for requested buffer")
        return [batch]

    monkeypatch.setattr("torch.cuda.empty_cache", lambda: calls.append("empty"))
    evaluated = network_of(run, device).evaluate(np.zeros((1, 2, 2, 3), np.uint8), 1, np.float32)
    if failures < tries:
        assert len(list(evaluated)) == 1
    else:
        with pytest.raises(RuntimeError, match="allocate"):
            list(evaluated)
    assert calls == ["run", "empty", "run"][: 2 * tries - 1]


def test_a_faces_device_that_is_not_here_is_refused_before_work_starts(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    execution = ExecutionConfig(device="cpu", faces_device="cuda")
    with pytest.raises(ConfigError, match=r"faces_device cuda needs an NVIDIA GPU.*use the faces_device cpu"):
        check_available(execution)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    fake_onnxruntime(monkeypatch, [providers.CPU], [providers.CPU])
    with pytest.raises(ConfigError, match="faces_device is cuda, but onnxruntime has no CUDA"):
        check_available(execution)
    fake_onnxruntime(monkeypatch, [providers.CUDA, providers.CPU], [providers.CPU])
    with pytest.raises(ConfigError, match=r"faces_device is cuda\. .* could not start"):
        check_available(execution)
    check_available(execution.model_copy(update={"faces_device": "auto"}))


def test_a_network_for_a_gpu_that_is_none_says_so_and_not_that_its_file_is_bad(tiny_pack, monkeypatch):
    fake_onnxruntime(monkeypatch, [providers.CPU], [providers.CPU])
    for load, pack in ((load_detector, "faces"), (load_embedder, "judge")):
        with pytest.raises(ConfigError, match="cannot run on cuda"):
            load(tiny_pack / pack, device="cuda")
    with pytest.raises(WeightsError):
        load_embedder(tiny_pack / "generator", device="cuda")


def test_the_onnxruntime_for_gpus_is_the_same_release(monkeypatch):
    def version(package, real=machine.version):
        if package == "onnxruntime":
            raise PackageNotFoundError(package)
        return "1.31.1" if package == "onnxruntime-gpu" else real(package)

    monkeypatch.setattr(machine, "version", version)
    assert machine.installed_versions()["onnxruntime"] == "1.31.1"


@pytest.mark.skipif(
    not torch.cuda.is_available() or providers.missing_provider() is not None,
    reason="needs a GPU and onnxruntime-gpu",
)
def test_faces_on_a_gpu_are_those_of_the_cpu_but_for_rounding():
    """The demo's detector and judge: the bounds that `ExecutionConfig` states."""
    demo = models.PROJECT / "packs" / "demo"
    contexts = np.random.default_rng(0).standard_normal((32, 512), np.float32)
    contexts /= np.linalg.norm(contexts, axis=1, keepdims=True)
    engine = SamplingEngine(load_generator(demo / "generator", "cuda"), SamplerSettings(steps=20, w=0.0))
    images = engine.sample(contexts, None, None, np.arange(32), np.zeros(32, np.int64), 0).images
    found = [load_detector(demo / "faces", device=device).detect(images) for device in ("cpu", "cuda")]
    crops = np.zeros((32, 112, 112, 3), np.uint8)
    for image, here, there, crop in zip(images, *found, crops, strict=True):
        assert len(here.scores) == len(there.scores)
        np.testing.assert_allclose(there.scores, here.scores, atol=1e-4)
        np.testing.assert_allclose(there.landmarks, here.landmarks, atol=1e-2)
        if len(here.scores):
            crop[:] = warp(image, similarity_transform(here.landmarks[0], TEMPLATE_112), 112)
    here, there = (load_embedder(demo / "judge", device=device).embed(crops) for device in ("cpu", "cuda"))
    moved = np.linalg.norm(there - here, axis=1) / np.linalg.norm(here, axis=1)
    assert moved.max() < 1e-3

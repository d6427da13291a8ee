"""Batch sizes: even ones, the largest that fits, and what is remembered of it."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from negfacediff_core.diffusion import batch_size
from negfacediff_core.diffusion.batch_size import even_size, largest_batch
from negfacediff_core.stages import batch_sizes

CUDA = torch.device("cuda")


@given(st.integers(1, 5000), st.integers(1, 600))
def test_even_batches_are_as_few_as_can_be_and_hardly_filled_up(count, most):
    size = even_size(count, most)
    batches = -(-count // size)
    assert size <= most and batches == -(-count // most)
    assert size * batches - count < batches


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 16 GiB; `used` is what the last trial took."""
    state = SimpleNamespace(used=0, name="GeForce", total_memory=16 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: state)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: state.name)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state.used)
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    return state


@pytest.mark.parametrize(
    ("mib_an_image", "expected"), [(1, batch_size.MOST), (50, 256), (52, 128), (9000, 1)]
)
def test_the_largest_batch_leaves_some_memory_free(gpu, mib_an_image, expected):
    tried = []

    def try_it(size):
        tried.append(size)
        gpu.used = size * mib_an_image << 20
        if gpu.used > gpu.total_memory:
            raise torch.OutOfMemoryError("full")

    assert largest_batch(try_it, CUDA) == expected
    assert tried == sorted(set(tried))


def test_not_even_one_image_is_an_error(gpu):
    def full(size):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        largest_batch(full, CUDA)


@pytest.fixture
def engine(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return SimpleNamespace(
        batch_size=0, device=CUDA, needs=lambda negatives: f"bf16, {1 + negatives} contexts an image"
    )


def test_a_batch_size_is_remembered_for_the_same_gpu_and_needs(engine, gpu, tmp_path):
    batch_sizes.recall(engine, None)
    assert engine.batch_size == 0
    engine.batch_size = 256
    batch_sizes.remember(engine, None)
    path = tmp_path / "negfacediff" / "batch_sizes.json"
    assert json.loads(path.read_text()) == {"GeForce, 16 GiB, bf16, 1 contexts an image": 256}
    assert [file.name for file in path.parent.iterdir()] == [path.name]

    def recalled(negatives=None):
        engine.batch_size = 0
        batch_sizes.recall(engine, negatives)
        return engine.batch_size

    assert recalled() == 256
    engine.batch_size = 16  # another program took the memory for a while
    batch_sizes.remember(engine, None)
    assert recalled() == 256
    assert recalled(torch.zeros(4, 2, 16).numpy()) == 0
    gpu.total_memory = 8 << 30
    assert recalled() == 0
    engine.batch_size = 64
    batch_sizes.remember(engine, None)
    gpu.total_memory = 16 << 30
    assert recalled() == 256


def test_a_size_that_was_given_is_not_replaced(engine):
    engine.batch_size = 256
    batch_sizes.remember(engine, None)
    engine.batch_size = 3
    batch_sizes.recall(engine, None)
    assert engine.batch_size == 3


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 0}', '{"a": "many"}', "\udcff"])
def test_a_file_that_cannot_be_read_is_passed_over_with_a_message(engine, content, caplog):
    path = batch_sizes.batch_sizes_file()
    path.parent.mkdir()
    path.write_bytes(content.encode(errors="surrogateescape"))
    batch_sizes.recall(engine, None)
    assert engine.batch_size == 0 and f"{path} are looked for anew" in caplog.text
    engine.batch_size = 5
    batch_sizes.remember(engine, None)
    assert list(json.loads(path.read_text()).values()) == [5]


def test_a_folder_that_cannot_be_written_is_passed_over_with_a_message(engine, tmp_path, caplog):
    (tmp_path / "negfacediff").write_text("a file where the folder should be")
    engine.batch_size = 5
    batch_sizes.remember(engine, None)
    assert "is not kept for the next time" in caplog.text


def test_the_cache_folder_is_that_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert batch_sizes.batch_sizes_file() == tmp_path / ".cache/negfacediff/batch_sizes.json"

import threading

import numpy as np
import pytest
import torch
from test_engine import make_generator

from negfacediff_core.config import Precision
from negfacediff_core.diffusion.engine import SamplerSettings, SamplingEngine
from negfacediff_core.diffusion.precision import PRECISIONS, check_precision, products_in
from negfacediff_core.diffusion.precision_error import precision_error
from negfacediff_core.errors import ConfigError

CUDA = torch.device("cuda")


def test_the_configuration_offers_what_there_is():
    assert [precision.value for precision in Precision] == list(PRECISIONS)


@pytest.mark.parametrize(
    ("capability", "fitting"),
    [
        (None, ["fp32", "bf16"]),
        ((9, 0), ["fp32", "tf32", "bf16", "fp16"]),
        ((8, 0), ["fp32", "tf32", "bf16", "fp16"]),
        ((7, 5), ["fp32", "fp16"]),
        ((6, 1), ["fp32"]),
    ],
)
def test_a_format_that_the_device_lacks_is_refused(capability, fitting, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GeForce")
    device = "cpu" if capability is None else "cuda"
    where = "a CPU" if capability is None else f"GeForce, of compute capability {capability[0]}"
    for precision in PRECISIONS:
        if precision in fitting:
            check_precision(precision, device)
        else:
            with pytest.raises(ConfigError, match=rf"{precision}, which {where}.*{' or '.join(fitting)}\."):
                check_precision(precision, device)


def settings_of_cuda():
    return [
        backend.fp32_precision
        for backend in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    ]


@pytest.mark.parametrize(("precision", "products"), [("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")])
def test_cuda_multiplies_as_the_format_says_and_as_before_afterwards(precision, products):
    before = settings_of_cuda()
    assert before[1] == "tf32"  # what makes fp32 need a word: PyTorch convolves in TF32 unless told otherwise
    with pytest.raises(KeyError), products_in(precision, CUDA):
        assert settings_of_cuda() == [products] * 3
        raise KeyError
    assert settings_of_cuda() == before
    with products_in(precision, torch.device("cpu")):
        assert settings_of_cuda() == before


def test_threads_wait_for_each_others_format():
    begun, seen = threading.Event(), []

    def other():
        begun.set()
        with products_in("fp32", torch.device("cuda", 1)):
            seen.append(settings_of_cuda())

    thread = threading.Thread(target=other)
    with products_in("tf32", CUDA):
        thread.start()
        begun.wait()
        thread.join(0.1)
        assert (seen, settings_of_cuda()) == ([], ["tf32"] * 3)
        with products_in("fp32", CUDA):
            assert settings_of_cuda() == ["ieee"] * 3
        assert settings_of_cuda() == ["tf32"] * 3
    thread.join(10)
    assert seen == [["ieee"] * 3]


def test_the_error_of_a_format_is_measured_against_fp32():
    generator = make_generator()
    contexts = np.random.default_rng(1).standard_normal((3, 16)).astype(np.float32)
    given = generator, SamplerSettings(sampler="dpm_solver", steps=3), contexts, contexts[::-1].copy()
    assert precision_error(given[0], given[1], "fp32", *given[2:]) == (0.0, 0, 0.0)
    error = precision_error(given[0], given[1], "bf16", *given[2:], seed=5)
    assert 1e-4 < error.eps < PRECISIONS["bf16"].tolerance
    rows = contexts, contexts[::-1, None].copy(), np.ones((3, 1), np.float32), np.arange(3), np.zeros(3, int)
    images = [
        SamplingEngine(generator, given[1], precision=name).sample(*rows, seed=5).images.astype(int)
        for name in ("fp32", "bf16")
    ]
    difference = np.abs(images[0] - images[1])
    assert (error.most, error.mean) == (difference.max(), pytest.approx(difference.mean()))

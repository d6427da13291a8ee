import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from negfacediff_core.noise import CONTEXTS, SAMPLES, gaussian, philox4x32, uniform

# known answers of Random123 for philox4x32 with 10 rounds: counter, key, words
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# computed from the definition with Python's integers and math, outside torch
FIRST_NUMBERS = [
    [1.3108898, -0.1243307, -0.87164, -0.0975999, -1.9060408],
    [0.4588431, -0.8199234, -0.284298, 0.5213989, -0.6417165],
]

words = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, expected):
    found = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in found) == expected


@given(st.tuples(words, words, words, words), st.tuples(words, words))
@settings(max_examples=50, deadline=None)
def test_philox_equals_the_cipher_on_unbounded_integers(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    found = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert [int(word) for word in found] == c


@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), min_size=1, max_size=40),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**24 - 1),
    st.randoms(use_true_random=False),
)
@settings(max_examples=40, deadline=None)
def test_a_sample_has_the_same_bits_in_every_batch_and_order(samples, seed, step, random):
    shape = (3, 5, 7)
    identities, replicates = zip(*samples, strict=True)
    together = gaussian(seed, identities, replicates, step, shape)
    order = random.sample(range(len(samples)), len(samples))
    shuffled = gaussian(seed, [identities[i] for i in order], [replicates[i] for i in order], step, shape)
    assert torch.equal(shuffled, together[order])
    i = order[0]
    assert torch.equal(gaussian(seed, [identities[i]], [replicates[i]], step, shape)[0], together[i])


def test_a_longer_draw_begins_with_the_shorter_one():
    assert torch.equal(gaussian(1, [2], [3], 4, (1000,))[:, :77], gaussian(1, [2], [3], 4, (77,)))


def test_every_argument_gives_other_numbers():
    base = {"seed": 1, "identities": [2], "replicates": [3], "step": 4, "stream": SAMPLES}
    changes = [
        {"seed": 1 + 2**32},
        {"seed": 2},
        {"identities": [3]},
        {"replicates": [2]},
        {"step": 5},
        {"stream": CONTEXTS},
    ]
    draws = [gaussian(**(base | change), shape=(64,)) for change in [{}, *changes]]
    for i, first in enumerate(draws):
        for second in draws[:i]:
            assert abs(torch.corrcoef(torch.stack([first[0], second[0]]))[0, 1]) < 0.5
            assert not torch.equal(first, second)


def test_gaussian_is_standard_normal_and_its_samples_are_uncorrelated():
    numbers = gaussian(7, torch.arange(400), torch.arange(400) % 50, 999, (3, 8, 8)).double()
    assert numbers.dtype == torch.float64 and numbers.shape == (400, 3, 8, 8)
    flat = numbers.flatten()
    assert stats.kstest(flat.numpy(), "norm").pvalue > 1e-3
    assert abs(flat.mean()) < 5 / math.sqrt(flat.numel())
    assert abs(flat.pow(4).mean() - 3) < 0.1
    correlations = torch.corrcoef(numbers.flatten(1)) - torch.eye(400, dtype=torch.float64)
    assert correlations.abs().max() < 6 / math.sqrt(192)
    assert abs(correlations.sum()) / 400 < 0.5


def test_gaussian_keeps_the_bits_that_stored_datasets_depend_on():
    found = gaussian(2026, [0, 41], [0, 7], 1000, (5,))
    assert found.dtype == torch.float32
    expected = torch.tensor(FIRST_NUMBERS, dtype=torch.float64)
    assert torch.allclose(found.double(), expected, rtol=0, atol=5e-7)


def test_uniform_fills_the_unit_interval():
    numbers = uniform(7, np.arange(300), np.zeros(300, np.int64), 0, (101,))
    assert numbers.dtype == torch.float64 and numbers.shape == (300, 101)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert stats.kstest(numbers.flatten().numpy(), "uniform").pvalue > 1e-3
    assert torch.equal(uniform(7, [5], [0], 0, (101,))[0], numbers[5])


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": -1},
        {"seed": 2**64},
        {"step": 2**24},
        {"stream": 256},
        {"identities": [-1]},
        {"replicates": [2**32]},
    ],
)
def test_numbers_outside_their_range_are_refused(wrong):
    arguments = {"seed": 0, "identities": [0], "replicates": [0], "step": 0, "shape": (2,)} | wrong
    with pytest.raises(ValueError, match="noise"):
        gaussian(**arguments)


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    gaussian(1, [2], [3], 4, (5,))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices_agree():
    identities, replicates = torch.arange(64), torch.arange(64) % 7
    here, there = (
        gaussian(11, identities, replicates, 999, (3, 16, 16), device).cpu() for device in ("cpu", "cuda")
    )
    difference = (here.view(torch.int32) - there.view(torch.int32)).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    counter = tuple(torch.arange(4096, device="cuda") * k for k in (1, 3, 5, 7))
    for word, same in zip(
        philox4x32(counter, (1, 2)), philox4x32(tuple(c.cpu() for c in counter), (1, 2)), strict=True
    ):
        assert torch.equal(word.cpu(), same)

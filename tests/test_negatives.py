"""Negative rules: the reference outputs, and what must hold for every rule in the table."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from negfacediff_core.contexts import normalise, uniform
from negfacediff_core.errors import ContextsError
from negfacediff_core.negatives import NO_NEGATIVE, RULES, check_negatives, mine

DATA = Path(__file__).parent / "data"
NAMED = [rule for rule in RULES if rule not in ("none", "null")]
OPTIONS = [(rule, {}) for rule in NAMED] + [("rand", {"rand": "ring"}), ("mid", {"mid": "paper"})]


def cosines(contexts, pool=None):
    """Plain float64 table, the diagonal left in."""
    pool = contexts if pool is None else pool
    return contexts.astype(np.float64) @ pool.astype(np.float64).T


@pytest.mark.parametrize("size", [64, 257])
@pytest.mark.parametrize(
    "rule, options, array",
    [
        ("close", {}, "corrected_closest"),
        ("far", {}, "corrected_farthest"),
        ("far", {}, "ref_farthest"),
        ("mid", {}, "corrected_median_high"),
        ("mid", {"mid": "paper"}, "ref_median"),
        ("rand", {"rand": "ring"}, "ref_rand"),
    ],
)
def test_reference_outputs(size, rule, options, array):
    with np.load(DATA / f"mining_{size}.npz") as file:
        contexts, expected = file["contexts"], file[array]
    mined = mine(contexts, None, rule, seed=0, **options)
    np.testing.assert_array_equal(mined.index, expected)
    table = cosines(contexts)[np.arange(size), expected]
    np.testing.assert_allclose(mined.cosine, table, atol=1e-6)


@pytest.mark.parametrize("rule", ["none", "null"])
@pytest.mark.parametrize("identities", [1, 7])
def test_rules_without_an_identity(rule, identities):
    mined = mine(uniform(0, np.arange(identities), 16), None, rule, seed=0)
    assert mined.index.shape == (identities,)
    assert (mined.index == NO_NEGATIVE).all() and np.isnan(mined.cosine).all()


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(2, 40),
    block=st.integers(1, 50),
    seed=st.integers(0, 2**62),
    case=st.sampled_from(OPTIONS),
)
def test_never_itself_deterministic_and_independent_of_block(size, block, seed, case):
    rule, options = case
    contexts = uniform(seed, np.arange(size), 8)
    whole = mine(contexts, None, rule, seed, **options)
    blocked = mine(contexts, None, rule, seed, block=block, **options)
    np.testing.assert_array_equal(whole.index, blocked.index)
    np.testing.assert_array_equal(whole.cosine, blocked.cosine)
    assert whole.index.dtype == np.int64 and whole.cosine.dtype == np.float32
    check_negatives(whole.index, np.arange(size), size)
    np.testing.assert_allclose(whole.cosine, cosines(contexts)[np.arange(size), whole.index], atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), case=st.sampled_from(OPTIONS), pool=st.integers(2, 20))
def test_rows_can_be_mined_in_any_order_and_beyond_the_pool(seed, case, pool):
    rule, options = case
    contexts = uniform(seed, np.arange(30), 8)
    first = contexts[:pool]
    whole = mine(contexts, first, rule, seed, **options)
    check_negatives(whole.index, np.arange(30), pool)
    order = np.random.default_rng(seed).permutation(30)[:11]
    some = mine(contexts[order], first, rule, seed, identities=order, **options)
    np.testing.assert_array_equal(some.index, whole.index[order])
    grown = mine(contexts[:pool], first, rule, seed, **options)
    np.testing.assert_array_equal(grown.index, whole.index[:pool])


@pytest.mark.parametrize("rule", ["close", "mid", "far"])
def test_mined_ranks_against_a_plain_sort(rule):
    contexts = uniform(5, np.arange(50), 6)
    pool = contexts[:31]
    mined = mine(contexts, pool, rule, seed=0)
    for identity, row in enumerate(cosines(contexts, pool)):
        others = np.delete(np.arange(31), identity) if identity < 31 else np.arange(31)
        ascending = others[np.argsort(row[others], kind="stable")]
        place = {"far": 0, "mid": len(others) // 2, "close": -1}[rule]
        assert mined.index[identity] == ascending[place]


@pytest.mark.parametrize("rule", ["close", "mid", "far"])
@pytest.mark.parametrize("block", [1, 3, 64])
def test_equal_cosines_take_the_lowest_row(rule, block):
    corners = np.eye(4, dtype=np.float32)[np.arange(24) % 4]
    table = cosines(corners)
    mined = mine(corners, None, rule, seed=0, block=block)
    for identity in range(24):
        others = np.delete(np.arange(24), identity)
        ascending = others[np.lexsort((others, table[identity, others]))]
        wanted = {"far": ascending[0], "mid": ascending[len(others) // 2]}.get(rule)
        if rule == "close":
            wanted = others[np.argmax(table[identity, others])]
        assert mined.index[identity] == wanted


def test_differences_below_float32_are_decided_exactly():
    """Pool rows whose cosines differ by about 1e-8: float32 products cannot order them."""
    base = normalise(np.random.default_rng(0).standard_normal((2, 512)))
    others = (base[0] + base[1]) / np.linalg.norm(base[0] + base[1])
    noise = 1e-8 * np.random.default_rng(1).standard_normal((40, 512))
    pool = np.concatenate([base[:1], np.float32(others + noise)])
    table = cosines(pool)[0, 1:]
    assert len(np.unique(np.float32(table))) < 30 < len(np.unique(table))
    assert mine(pool, None, "far", 0).index[0] == 1 + np.argmin(table)
    assert mine(pool, None, "close", 0).index[0] == 1 + np.argmax(table)
    assert mine(pool, None, "mid", 0).index[0] == 1 + np.argsort(table, kind="stable")[20]


def test_rand_is_uniform_over_the_others_and_follows_the_seed():
    contexts = uniform(0, np.arange(5), 8)
    counts = np.zeros((5, 5), dtype=int)
    for seed in range(400):
        counts[np.arange(5), mine(contexts, None, "rand", seed).index] += 1
    assert (np.diagonal(counts) == 0).all()
    # expected 100 each with a deviation of 9
    assert counts[~np.eye(5, dtype=bool)].min() > 60 and counts.max() < 140


def test_rules_order_the_angles():
    contexts = uniform(1, np.arange(300), 64)
    means = {rule: mine(contexts, None, rule, 0).cosine.mean() for rule in NAMED}
    assert means["far"] < means["mid"] < means["close"]
    assert abs(means["mid"]) < 0.02 and abs(means["rand"]) < 0.05


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a | {"rule": "furthest"}, "no negative rule 'furthest'.*close"),
        (lambda a: a | {"mid": "reference"}, "corrected or paper"),
        (lambda a: a | {"rand": "chain"}, "seeded or ring"),
        (lambda a: a | {"contexts": a["contexts"] * 2}, "row 0 of the contexts has length 2"),
        (lambda a: a | {"contexts": a["contexts"] * np.nan}, "row 0 of the contexts"),
        (lambda a: a | {"pool": a["contexts"][:, :4]}, "equal width"),
        (lambda a: a | {"pool": a["contexts"][:1]}, "at least two"),
        (lambda a: a | {"identities": np.arange(3)}, "3 identity numbers"),
    ],
)
def test_bad_input(change, message):
    arguments = {"contexts": uniform(0, np.arange(6), 8), "pool": None, "rule": "far", "seed": 0}
    with pytest.raises(ContextsError, match=message):
        mine(**change(arguments))


@pytest.mark.parametrize(
    "index, message", [([1, 3], "outside the pool of 3"), ([1, 1], "identity 1 is its own")]
)
def test_bad_maps(index, message):
    with pytest.raises(ContextsError, match=message):
        check_negatives(np.array(index), np.arange(2), 3)


def test_blocked_products_are_much_faster_than_a_loop_over_pairs():
    """At 10,000 identities the measured ratio is above 200; the bar here allows for a busy machine."""
    contexts = normalise(np.random.default_rng(0).standard_normal((2500, 128)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.perf_counter()
        mine(contexts, None, "far", 0)
        blocked = time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    start = time.perf_counter()
    for other in range(len(contexts)):
        contexts[0] @ contexts[other]
    loop = (time.perf_counter() - start) * len(contexts)
    assert loop > 20 * blocked

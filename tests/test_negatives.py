"""Negative rules: the reference outputs, and what must hold for every rule in the table."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_builds import changed, make, planned

from negfacediff_core.contexts import normalise, uniform
from negfacediff_core.errors import ConfigError, ContextsError
from negfacediff_core.negatives import (
    NO_NEGATIVE,
    RULES,
    WEIGHTS,
    check_negatives,
    mine,
    plan_blocks,
    ranks,
    search,
)
from negfacediff_core.stages.negatives import StoredPool, stored_negatives
from negfacediff_core.store.layout import Unit
from negfacediff_core.store.shards import read_rows

DATA = Path(__file__).parent / "data"
NAMED = [rule for rule in RULES if rule not in ("none", "null")]
# Bytes with which the searches below are cut into several blocks of rows, of the pool, and of candidates.
LITTLE = 300_000
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
    np.testing.assert_array_equal(mined.index[:, 0], expected)
    table = cosines(contexts)[np.arange(size), expected]
    np.testing.assert_allclose(mined.cosine[:, 0], table, atol=1e-6)


@pytest.mark.parametrize("rule", ["none", "null"])
@pytest.mark.parametrize("identities", [1, 7])
def test_rules_without_an_identity(rule, identities):
    mined = mine(uniform(0, np.arange(identities), 16), None, rule, seed=0, count=3)
    assert mined.index.shape == mined.cosine.shape == (identities, 1)
    assert (mined.index == NO_NEGATIVE).all() and np.isnan(mined.cosine).all()
    assert (mined.weight == 1).all()


def reference(contexts, pool, identity, rule, count, mid="corrected"):
    """One identity's negatives by a plain float64 sort; equal cosines in the order of the pool."""
    others = np.delete(np.arange(len(pool)), identity) if identity < len(pool) else np.arange(len(pool))
    row = (contexts[identity].astype(np.float64) * pool).sum(axis=1)[others]
    if rule == "close":
        return others[np.argsort(-row, kind="stable")][:count]
    ascending = others[np.argsort(row, kind="stable")]
    if rule == "far":
        return ascending[:count]
    median = len(others) // 2 if mid == "corrected" else min(len(pool) // 2, len(others) - 1)
    ranks = sorted(range(len(others)), key=lambda rank: (abs(rank - median), rank))
    return ascending[ranks[:count]]


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(4, 60),
    limit=st.integers(100_000, 2_000_000),
    seed=st.integers(0, 2**62),
    count=st.integers(1, 3),
    case=st.sampled_from(OPTIONS),
)
def test_never_itself_deterministic_and_independent_of_memory(size, limit, seed, count, case):
    rule, options = case
    contexts = uniform(seed, np.arange(size), 8)
    whole = mine(contexts, None, rule, seed, count=count, **options)
    blocked = mine(contexts, None, rule, seed, count=count, limit=limit, **options)
    np.testing.assert_array_equal(whole.index, blocked.index)
    np.testing.assert_array_equal(whole.cosine, blocked.cosine)
    assert whole.index.shape == whole.cosine.shape == whole.weight.shape == (size, count)
    assert (whole.index.dtype, whole.cosine.dtype, whole.weight.dtype) == (np.int64, np.float32, np.float32)
    check_negatives(whole.index, np.arange(size), size)
    assert all(len(set(row)) == count for row in whole.index), "negatives of an identity differ"
    table = np.take_along_axis(cosines(contexts), whole.index, axis=1)
    np.testing.assert_allclose(whole.cosine, table, atol=1e-6)
    one = mine(contexts, None, rule, seed, **options)
    np.testing.assert_array_equal(one.index, whole.index[:, :1])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    case=st.sampled_from(OPTIONS),
    pool=st.integers(3, 50),
    count=st.integers(1, 2),
)
def test_rows_can_be_mined_in_any_order_and_in_any_prefix(seed, case, pool, count):
    """Pools smaller and larger than what is mined; identities outside of it may take any of it."""
    rule, options = case
    contexts = uniform(seed, np.arange(50), 8)
    first = contexts[:pool]
    whole = mine(contexts[:30], first, rule, seed, count=count, **options)
    check_negatives(whole.index, np.arange(30), pool)
    order = np.random.default_rng(seed).permutation(30)[:11]
    some = mine(contexts[order], first, rule, seed, identities=order, count=count, **options)
    np.testing.assert_array_equal(some.index, whole.index[order])
    if rule in ("close", "mid", "far"):
        for identity in (0, 29):
            wanted = reference(contexts, first, identity, rule, count, **options)
            assert whole.index[identity].tolist() == wanted.tolist()


@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize("limit", [LITTLE, 2**29])
@pytest.mark.parametrize("count", [1, 4, 63])
@pytest.mark.parametrize(
    "rule, options", [("close", {}), ("mid", {}), ("mid", {"mid": "paper"}), ("far", {})]
)
def test_mined_ranks_against_a_plain_sort(rule, options, count, limit, bfloat16, monkeypatch):
    monkeypatch.setattr(search, "FAST_BFLOAT16", bfloat16)
    contexts = uniform(5, np.arange(80), 6)
    pool = contexts[:64]
    mined = mine(contexts, pool, rule, seed=0, count=count, limit=limit, **options)
    for identity in range(len(contexts)):
        wanted = reference(contexts, pool, identity, rule, count, **options)
        assert mined.index[identity].tolist() == wanted.tolist()


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("rule", ["close", "mid", "far"])
@pytest.mark.parametrize("limit", [LITTLE, 2**29])
def test_equal_cosines_take_the_lowest_rows(rule, count, limit):
    """Eight copies of four corners, and their opposites: every cosine is met many times."""
    corners = np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32)[np.arange(64) % 8]
    mined = mine(corners, None, rule, seed=0, count=count, limit=limit)
    for identity in range(64):
        assert mined.index[identity].tolist() == reference(corners, corners, identity, rule, count).tolist()


@pytest.mark.parametrize("rule", ["close", "mid", "far"])
def test_a_pool_in_the_worst_order_is_mined_right(rule):
    """Each block of the pool beats all before it, with cosines that lie closer than bfloat16 tells."""
    angles = np.linspace(0.5 * np.pi, 1e-3, 500)
    pool = np.column_stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    contexts = np.array([[1, 0], [-1, 0]], np.float32)
    mined = mine(contexts, pool, rule, 0, identities=np.array([600, 601]), count=5, limit=LITTLE)
    for row in range(2):
        others = np.concatenate([pool, contexts[[row]]])
        wanted = reference(others, pool, 500, rule, 5)
        assert mined.index[row].tolist() == wanted.tolist()


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(
    "order, misled",
    [
        ("random", 0),
        ("neighbours are alike", 0),
        ("three in four are equal", 40),
        ("sorted, and its head sampled", 1),
    ],
)
def test_the_median_of_a_pool_that_is_sampled(order, misled, count, monkeypatch):
    """Where a sample misleads, the search is made again; where it does not, a little is collected."""
    contexts = uniform(2, np.arange(4000), 8)
    if order.startswith("three"):
        contexts[np.arange(4000) % 4 > 0] = contexts[0]
    if order.startswith("neighbours"):
        contexts = normalise(contexts + 3 * contexts[np.arange(4000) // 50])
    if order.startswith("sorted"):
        contexts = contexts[np.argsort(contexts @ contexts[0], kind="stable")]
        monkeypatch.setattr(ranks, "_SLICES", 1)
    rooms = []
    collect = ranks._Collected
    monkeypatch.setattr(
        ranks,
        "_Collected",
        lambda low, high, room: (rooms.append((len(low), room)), collect(low, high, room))[1],
    )
    identities = np.arange(3960, 4000)
    mined = mine(contexts[identities], contexts, "mid", 0, identities=identities, count=count)
    for row, identity in enumerate(identities):
        wanted = reference(contexts, contexts, identity, "mid", count)
        assert mined.index[row].tolist() == wanted.tolist()
    assert rooms[0][0] == 40 and rooms[0][1] < 3000
    assert sum(rows for rows, room in rooms if room == 4000) >= misled
    assert misled or len(rooms) == 1


def test_differences_below_float32_are_decided_exactly():
    """Pool rows whose cosines differ by about 1e-8: float32 products cannot order them."""
    base = normalise(np.random.default_rng(0).standard_normal((2, 512)))
    others = (base[0] + base[1]) / np.linalg.norm(base[0] + base[1])
    noise = 1e-8 * np.random.default_rng(1).standard_normal((40, 512))
    pool = np.concatenate([base[:1], np.float32(others + noise)])
    table = cosines(pool)[0, 1:]
    assert len(np.unique(np.float32(table))) < 30 < len(np.unique(table))
    ascending = 1 + np.argsort(table, kind="stable")
    assert mine(pool, None, "far", 0, count=3).index[0].tolist() == ascending[:3].tolist()
    assert mine(pool, None, "close", 0, count=3).index[0].tolist() == ascending[:-4:-1].tolist()
    assert mine(pool, None, "mid", 0, count=3).index[0].tolist() == ascending[[20, 19, 21]].tolist()


@pytest.mark.parametrize("column", [0, 1])
def test_rand_is_uniform_over_the_others_and_follows_the_seed(column):
    contexts = uniform(0, np.arange(5), 8)
    counts = np.zeros((5, 5), dtype=int)
    for seed in range(400):
        counts[np.arange(5), mine(contexts, None, "rand", seed, count=2).index[:, column]] += 1
    assert (np.diagonal(counts) == 0).all()
    # expected 100 each with a deviation of 9
    assert counts[~np.eye(5, dtype=bool)].min() > 60 and counts.max() < 140


def test_rand_may_take_all_others():
    contexts = uniform(0, np.arange(9), 8)
    taken = mine(contexts, contexts[:5], "rand", 3, count=4).index
    for identity in range(5):
        assert sorted({*taken[identity], identity}) == list(range(5))


def test_the_ring_counts_back_also_from_outside_the_pool():
    contexts = uniform(0, np.arange(9), 8)
    ring = mine(contexts, contexts[:5], "rand", 0, rand="ring", count=3).index
    assert ring[0].tolist() == [4, 3, 2]
    assert ring[3].tolist() == [2, 1, 0]
    assert ring[7].tolist() == [1, 0, 4]


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("count", [1, 2, 64])
def test_weights_share_one_and_never_grow(kind, count):
    mined = mine(uniform(0, np.arange(66), 8), None, "far", 0, count=count, weights=kind)
    np.testing.assert_allclose(mined.weight.sum(axis=1), 1, atol=1e-6)
    assert (mined.weight > 0).all() and (np.diff(mined.weight, axis=1) <= 0).all()


def test_the_weights_of_three():
    contexts = uniform(0, np.arange(4), 8)
    np.testing.assert_allclose(mine(contexts, None, "far", 0, count=3).weight, 1 / 3, rtol=1e-6)
    by_rank = mine(contexts, None, "far", 0, count=3, weights="rank").weight
    np.testing.assert_allclose(by_rank, [[6 / 11, 3 / 11, 2 / 11]] * 4, rtol=1e-6)


def test_rules_order_the_angles():
    contexts = uniform(1, np.arange(300), 64)
    means = {rule: mine(contexts, None, rule, 0).cosine.mean() for rule in NAMED}
    assert means["far"] < means["mid"] < means["close"]
    assert abs(means["mid"]) < 0.02 and abs(means["rand"]) < 0.05


# --- memory


class Blocks:
    """A pool that can only be read a block at a time, and remembers the longest."""

    def __init__(self, contexts):
        self.contexts, self.longest, self.shape = contexts, 0, contexts.shape

    def __getitem__(self, rows):
        block = self.contexts[rows].copy()
        self.longest = max(self.longest, len(block))
        return block


@pytest.mark.parametrize("rule", ["rand", "close", "mid", "far"])
@pytest.mark.parametrize("limit", [500_000, 2_000_000, 8_000_000])
@pytest.mark.parametrize("draw", ["apart", "alike", "equal"])
def test_what_is_allocated_was_planned(rule, limit, draw):
    """Also where nearly all of the pool is a candidate, because the cosines are equal."""
    apart = uniform(0, np.arange(1500), 16)
    contexts = np.repeat(
        apart[: {"apart": 1500, "alike": 30, "equal": 1}[draw]],
        {"apart": 1, "alike": 50, "equal": 1500}[draw],
        axis=0,
    )
    planned = plan_blocks(60, 1500, 16, 3, limit)
    assert planned.bytes <= limit
    limit = planned.bytes
    pool = Blocks(contexts)
    unlimited = mine(contexts[:60], contexts, rule, 0, count=3)
    tracemalloc.start()
    try:
        limited = mine(contexts[:60], pool, rule, 0, count=3, limit=limit)
        allocated = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert allocated <= planned.bytes
    assert pool.longest <= planned.pool
    np.testing.assert_array_equal(limited.index, unlimited.index)
    np.testing.assert_array_equal(limited.cosine, unlimited.cosine)


@pytest.mark.parametrize("count", [1, 64])
def test_a_unit_in_a_pool_of_a_million_is_planned_within_two_gigabytes(count):
    planned = plan_blocks(1024, 1_000_000, 512, count)
    assert planned.bytes < 2 * 10**9 / 2, "half: the process holds more than this"
    assert planned.rows == 1024, "the pool is read no more often than the rule needs"


def test_a_memory_map_is_a_pool(tmp_path):
    contexts = uniform(0, np.arange(100), 8)
    np.save(tmp_path / "pool.npy", contexts)
    pool = np.load(tmp_path / "pool.npy", mmap_mode="r")
    for rule in ("far", "mid"):
        expected = mine(contexts, None, rule, 0)
        mined = mine(contexts, pool, rule, 0, limit=LITTLE)
        np.testing.assert_array_equal(mined.index, expected.index)


def test_a_limit_that_nothing_fits_in_is_refused():
    with pytest.raises(
        ContextsError, match=r"a pool of 50 x 8 takes at least \d+ bytes, more than the limit of 9"
    ):
        mine(uniform(0, np.arange(50), 8), None, "far", 0, limit=9)


# --- bad input


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a | {"rule": "furthest"}, "rule of negatives is 'furthest': choose none, .*close"),
        (lambda a: a | {"mid": "reference"}, "mid of negatives is 'reference': choose corrected, paper"),
        (lambda a: a | {"rand": "chain"}, "choose seeded, ring"),
        (lambda a: a | {"weights": "last"}, "weights of negatives is 'last': choose equal, rank"),
        (lambda a: a | {"count": 0}, "0 negatives an identity"),
        (lambda a: a | {"count": 6}, "a pool of 6 identities cannot give 6 other.* at least 7"),
        (lambda a: a | {"contexts": a["contexts"] * 2}, "row 0 of the contexts has length 2"),
        (lambda a: a | {"contexts": a["contexts"] * np.nan}, "row 0 of the contexts"),
        (lambda a: a | {"pool": a["contexts"][:, :4]}, "equal width"),
        (lambda a: a | {"pool": a["contexts"][:1]}, "a pool of 1 identities cannot give 1 other"),
        (
            lambda a: a | {"pool": a["contexts"] * np.array([[1]] * 4 + [[np.nan]] * 2)},
            "row 4 of the pool.*nan",
        ),
        (lambda a: a | {"identities": np.arange(3)}, "3 identity numbers"),
    ],
)
def test_bad_input(change, message):
    arguments = {"contexts": uniform(0, np.arange(6), 8), "pool": None, "rule": "far", "seed": 0}
    with pytest.raises(ContextsError, match=message):
        mine(**change(arguments))


@pytest.mark.parametrize(
    "index, message",
    [
        ([[1], [3]], "negative of identity 1 is 3, outside the pool of 3"),
        ([[1], [-2]], "negative of identity 1 is -2, outside"),
        ([[1], [1]], "identity 1 is its own"),
        ([[1, 2], [0, 1]], "identity 1 is its own"),
        ([[1, 3], [0, 2]], "negative of identity 0 is 3, outside"),
        ([1, 0], r"shape \(2,\) does not fit 2 identities"),
        ([[1]], r"shape \(1, 1\) does not fit 2 identities"),
    ],
)
def test_bad_maps(index, message):
    with pytest.raises(ContextsError, match=message):
        check_negatives(np.array(index), np.arange(2), 3)


# --- the stage


@pytest.fixture(scope="module")
def mined(tiny_build, tmp_path_factory):
    """Three far negatives in a pool of 5, weighted by rank, for the 1,024 identities of the first unit."""
    build = changed(tiny_build, negatives__count=3, negatives__weights="rank", negatives__pool=5)
    return make(build, tmp_path_factory.mktemp("mined"), stages=("contexts", "negatives"))


def test_the_stage_stores_the_map_with_cosines_and_weights(mined):
    spec, identities = mined["negatives"], np.arange(1024)
    pool = StoredPool(mined["contexts"], 1024)
    expected = mine(pool[0:1024], pool[0:5], "far", 0, count=3, weights="rank")
    stored = stored_negatives(spec, identities)
    np.testing.assert_array_equal(stored.index, expected.index)
    np.testing.assert_array_equal(stored.cosine, expected.cosine)
    np.testing.assert_array_equal(stored.weight, expected.weight)
    some = stored_negatives(spec, np.array([7, 2]))
    np.testing.assert_array_equal(some.index, expected.index[[7, 2]])
    rows = read_rows(spec, Unit(0, 0))
    np.testing.assert_array_equal(rows.column("negative").to_numpy(), expected.index[:, 0])
    np.testing.assert_array_equal(rows.column("cosine").to_numpy(), expected.cosine[:, 0])


def test_a_stored_map_that_points_at_itself_is_refused(mined, monkeypatch):
    damaged = {
        "negative": np.zeros((1024, 3), np.int64),
        "cosine": np.zeros((1024, 3), np.float32),
        "weight": np.zeros((1024, 3), np.float32),
    }
    monkeypatch.setattr("negfacediff_core.stages.negatives.read_arrays", lambda spec, unit: damaged)
    with pytest.raises(ContextsError, match="identity 0 is its own negative"):
        stored_negatives(mined["negatives"], np.arange(5))


@pytest.mark.parametrize("pool", [3, 1030])
def test_the_pool_may_be_smaller_or_larger_than_the_dataset(pool, tiny_build, tmp_path):
    build = changed(tiny_build, negatives__pool=pool)
    specs = make(build, tmp_path, stages=("contexts", "negatives"))
    contexts = StoredPool(specs["contexts"], max(pool, 5))
    stored = stored_negatives(specs["negatives"], np.arange(5))
    expected = mine(contexts[0:5], contexts[0:pool], "far", 0)
    np.testing.assert_array_equal(stored.index, expected.index)


def test_a_pool_too_small_for_the_count_is_refused_in_time(tiny_build, tmp_path):
    build = changed(tiny_build, negatives__count=5)
    with pytest.raises(
        ConfigError, match=r"negatives\.pool is 5, but .* far picks 5 other .* set it to 6 or more"
    ):
        planned(build, tmp_path)

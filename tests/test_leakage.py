"""The leakage gate's arithmetic: the search is exact, and thresholds are those of the pairs themselves."""

import io
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.evaluation.leakage import (
    PAIRS,
    RATES,
    SHORTLIST,
    Block,
    alike,
    calibrate,
    impostor_pairs,
    nearest,
    needed_pairs,
)
from negfacediff_core.evaluation.pair_sheet import Pair, pair_sheet


def units(seed, count, width):
    vectors = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def in_blocks(vectors, size, people=None):
    """Blocks of `size` rows; rows of nobody are in none."""
    blocks = []
    for start in range(0, len(vectors), size):
        rows = np.arange(start, min(start + size, len(vectors)))
        rows = rows if people is None else rows[people[rows] >= 0]
        blocks.append(Block.of(rows, vectors[rows]))
    return blocks


def cosines(one, other):
    one, other = one.astype(np.float64), other.astype(np.float64)
    one /= np.linalg.norm(one, axis=1, keepdims=True)
    return one @ (other / np.linalg.norm(other, axis=1, keepdims=True)).T


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    queries=st.integers(1, 300),
    gallery=st.integers(1, 80),
    width=st.integers(2, 24),
    size=st.integers(1, 90),
)
def test_the_search_equals_brute_force_whatever_the_blocks(seed, queries, gallery, width, size):
    asked, there = units(seed, queries, width), units(seed + 1, gallery, width)
    expected = cosines(asked, there)
    found = nearest(asked, in_blocks(there, size))
    np.testing.assert_array_equal(found.row, expected.argmax(axis=1))
    np.testing.assert_allclose(found.cosine, expected.max(axis=1), atol=1e-14)


def test_of_equal_images_the_first_is_named_in_and_across_blocks():
    vectors = units(0, 30, 8)
    vectors[[7, 9, 25]] = vectors[3]
    for size in (5, 8, 30):
        found = nearest(vectors[[25]], in_blocks(vectors, size))
        assert (found.row[0], SHORTLIST) == (3, 4)
        assert found.cosine[0] == pytest.approx(1, abs=1e-15)


def test_in_nothing_nothing_is_found():
    found = nearest(units(0, 3, 5), [Block.of(np.empty(0, np.int64), np.empty((0, 5), np.float32))])
    assert found.row.tolist() == [-1] * 3
    assert np.isnan(found.cosine).all()
    assert not alike(found.cosine, -1.0).any()


def brute_force(vectors, people, chosen):
    """Scores of all pairs of people of which one image is chosen, each once."""
    known, chosen = np.flatnonzero(people >= 0), set(chosen)
    pairs = [
        (i, j) for i, j in combinations(known, 2) if people[i] != people[j] and (i in chosen or j in chosen)
    ]
    scores = cosines(vectors, vectors)
    return np.array([scores[pair] for pair in pairs])


@pytest.mark.parametrize("sample", [1000, 90, 7])
@pytest.mark.parametrize("size", [400, 64])
def test_thresholds_are_the_lowest_that_keep_the_rate_among_real_impostors(sample, size):
    vectors = units(3, 250, 12)
    people = np.arange(250) // 3
    people[::17] = -1
    known = np.flatnonzero(people >= 0)
    taken = min(sample, len(known))
    chosen = known[np.arange(taken) * len(known) // taken]
    rates = (0.05, 0.01, 0.002)
    found = calibrate(in_blocks(vectors, size, people), people, rates, sample)
    scores = brute_force(vectors, people, chosen)
    assert found.pairs == len(scores)
    for rate, threshold in zip(rates, found.thresholds, strict=True):
        if len(scores) * rate < PAIRS:
            assert threshold is None
            continue
        # the scores of the calibration are products in float32
        assert (scores >= threshold + 1e-6).mean() <= rate
        assert (scores >= threshold - 1e-6).sum() > np.floor(rate * len(scores))
    others = cosines(vectors[chosen], vectors)
    others[people[chosen][:, None] == people[None]] = -np.inf
    others[:, people < 0] = -np.inf
    np.testing.assert_allclose(found.nearest, others.max(axis=1), atol=1e-6)


@given(
    people=st.lists(st.integers(0, 5), min_size=1, max_size=40),
    chosen=st.sets(st.integers(0, 39)),
)
def test_every_pair_of_two_people_is_counted_once(people, chosen):
    chosen = sorted(number for number in chosen if number < len(people))
    people = np.array(people)
    expected = len(brute_force(np.eye(len(people), dtype=np.float32), people, chosen))
    assert impostor_pairs(people, people[chosen]) == expected


def test_a_rate_takes_ten_pairs_above_its_threshold():
    assert [needed_pairs(rate) for rate in RATES] == [10_000, 100_000, 1_000_000]
    # 142 people make 10,011 pairs, 141 make 9,870
    for count, there in ((142, True), (141, False)):
        found = calibrate(in_blocks(units(0, count, 16), 64), np.arange(count))
        assert [threshold is not None for threshold in found.thresholds] == [there, False, False]


def test_one_person_has_no_impostors():
    found = calibrate(in_blocks(units(0, 6, 4), 6), np.zeros(6, np.int64))
    assert (found.pairs, found.thresholds) == (0, (None, None, None))
    assert np.isnan(found.nearest).all()


def test_a_gallery_without_faces_has_no_thresholds():
    blocks = [Block.of(np.empty(0, np.int64), np.empty((0, 4), np.float32))]
    found = calibrate(blocks, np.full(5, -1))
    assert (found.pairs, found.thresholds, len(found.nearest)) == (0, (None, None, None), 0)


def test_pairs_are_drawn_side_by_side():
    red, blue = np.zeros((64, 64, 3), np.uint8), np.zeros((200, 100, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    pairs = [
        Pair(red, blue, f"{n}/0", "somebody/with/a/very/long/name/of/a/file/0001.png", 0.5) for n in range(6)
    ]
    sheet = np.array(Image.open(io.BytesIO(pair_sheet(pairs, "title"))).convert("RGB")).astype(int)
    reds = (sheet == [255, 0, 0]).all(axis=2)
    blues = (sheet == [0, 0, 255]).all(axis=2)
    assert reds.sum() == 6 * 112 * 112  # enlarged to the whole square
    assert blues.sum() == 6 * 112 * 56  # with its aspect kept
    # the real one right of the generated one
    assert np.flatnonzero(reds.any(axis=0))[0] < np.flatnonzero(blues.any(axis=0))[0]
    with pytest.raises(NegFaceDiffError, match="no pair to draw"):
        pair_sheet([], "title")

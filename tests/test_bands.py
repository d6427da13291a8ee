"""Scores counted band by band: every pair once, whoever counts it, and in whatever order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.evaluation import bands
from negfacediff_core.evaluation.bands import (
    BINS,
    Images,
    add_up,
    band_bytes,
    band_identities,
    bins_of,
    levels_of,
    partners,
    score_band,
)
from negfacediff_core.evaluation.scores import compare


def faces(identities, replicates, width=16, seed=0):
    random = np.random.default_rng(seed)
    embeddings = random.standard_normal((identities, 1, width)) + 0.7 * random.standard_normal(
        (identities, replicates, width)
    )
    return embeddings.astype(np.float32), random.random((identities, replicates)) >= 0.2


def images_of(embeddings, valid, identities):
    chosen = np.zeros_like(valid)
    chosen[identities] = valid[identities]
    return Images(embeddings[chosen], np.nonzero(chosen)[0])


@given(count=st.integers(1, 60))
def test_two_bands_are_compared_once_and_all_bands_do_the_same_work(count):
    lists = [partners(band, count) for band in range(count)]
    pairs = [frozenset((band, other)) for band, others in enumerate(lists) for other in others]
    assert len(pairs) == len(set(pairs)) == count * (count + 1) // 2
    assert all(others[0] == band for band, others in enumerate(lists))
    lengths = {len(others) for others in lists}
    assert max(lengths) - min(lengths) <= (count % 2 == 0)


@settings(max_examples=12, deadline=None)
@given(
    identities=st.integers(2, 14), size=st.integers(1, 6), rows=st.integers(2, 40), seed=st.integers(0, 99)
)
def test_bands_add_up_to_the_exact_lists(identities, size, rows, seed):
    embeddings, valid = faces(identities, 4, seed=seed)
    valid[:, 0] = True
    exact = compare(embeddings, valid)
    parts = [range(start, min(start + size, identities)) for start in range(0, identities, size)]
    counted = [
        score_band(
            images_of(embeddings, valid, parts[band]),
            (images_of(embeddings, valid, parts[other]) for other in partners(band, len(parts))[1:]),
            rows=rows,
        )
        for band in range(len(parts))
    ]
    for kind, single in zip(add_up(counted), exact, strict=True):
        assert kind.size == single.size
        if kind.size:
            # a float32 score may be one rounding beyond the edge of its bin
            listed, binned = np.repeat(single.levels, single.counts), np.repeat(kind.levels, kind.counts)
            assert (listed - binned > -5e-7).all() and (listed - binned < 2 / BINS + 5e-7).all()
            assert kind.mean == pytest.approx(single.mean, abs=1e-12)
            assert kind.std == pytest.approx(single.std, abs=1e-7)  # of equal scores: a root of a rounding
        else:
            assert np.isnan(kind.mean) and np.isnan(kind.std)


def test_a_band_that_is_not_compared_inside_adds_the_other_pairs_alone():
    embeddings, valid = faces(9, 5)
    own, others = images_of(embeddings, valid, range(4)), images_of(embeddings, valid, range(4, 9))
    inside, across = score_band(own, ()), score_band(own, [others], inside=False)
    assert across.images == 0 and not across.genuine.any() and not across.gram.any()
    assert across.impostor.sum() == valid[:4].sum() * valid[4:].sum()
    for one, other in zip(add_up([inside, across]), add_up([score_band(own, [others])]), strict=True):
        np.testing.assert_array_equal(one.counts, other.counts)
        assert (one.mean, one.std) == (other.mean, other.std)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_counts_the_same_scores_but_for_their_last_rounding():
    embeddings, valid = faces(40, 10, width=64)
    own, others = images_of(embeddings, valid, range(20)), images_of(embeddings, valid, range(20, 40))
    for here, there in zip(
        add_up([score_band(own, [others])]),
        add_up([score_band(own, [others], device="cuda", rows=64)]),
        strict=True,
    ):
        assert here.size == there.size and (here.mean, here.std) == pytest.approx((there.mean, there.std))
        one, two = (np.repeat(kind.levels, kind.counts) for kind in (here, there))
        # sorted scores: none is further off than a rounding of float32 and the bin that it moves
        assert np.abs(one - two).max() < 2 / BINS + 2e-6


def test_other_images_may_come_in_any_pieces():
    embeddings, valid = faces(12, 5)
    own, others = images_of(embeddings, valid, range(4)), images_of(embeddings, valid, range(4, 12))
    whole = score_band(own, [others])
    pieces = [
        Images(others.embeddings[part], others.identity[part]) for part in (slice(0, 3), slice(3, None))
    ]
    seen = []
    again = score_band(own, iter(pieces), progress=seen.append)
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert sum(seen) == valid.sum()


def test_counts_move_on_before_a_bin_overflows(monkeypatch):
    embeddings, valid = faces(12, 5)
    own, others = images_of(embeddings, valid, range(6)), images_of(embeddings, valid, range(6, 12))
    whole = score_band(own, [others], rows=3)
    moves = []
    monkeypatch.setattr(bands, "_MOST_COUNTED", 30)
    move_on = bands._Counter._move_on
    monkeypatch.setattr(bands._Counter, "_move_on", lambda self: moves.append(move_on(self)))
    for one, other in zip(score_band(own, [others], rows=3), whole, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(moves) > 10


def test_every_score_has_its_bin():
    scores = np.array([-1.0, -1 + 2 / BINS, 0.0, 1.0 - 2 / BINS, 1.0, 1.0 + 1e-7, -1.0 - 1e-7])
    np.testing.assert_array_equal(bins_of(scores), [0, 1, BINS // 2, BINS - 1, BINS - 1, BINS - 1, 0])
    inside = np.random.default_rng(0).uniform(-1, 1, 1000)
    low = levels_of(bins_of(inside))
    assert (low <= inside).all() and (inside < low + 2 / BINS).all()


def test_equal_and_opposite_images_stay_in_the_histogram():
    own = np.random.default_rng(1).standard_normal((1, 512)).astype(np.float32)
    images = Images(np.concatenate([own, own * 3, -own]), np.array([0, 1, 2]))
    _, impostor = add_up([score_band(images, ())])
    # 1 and -1, whichever way float32 rounded them
    assert impostor.size == 3 and list(impostor.counts) == [2, 1]
    np.testing.assert_allclose(impostor.levels, [-1, 1], atol=4 / BINS)
    assert impostor.mean == pytest.approx(-1 / 3, abs=1e-12)


def test_genuine_pairs_of_an_identity_with_more_images_than_a_tile_has_rows(monkeypatch):
    embeddings = np.random.default_rng(0).standard_normal((2, 45, 8)).astype(np.float32)
    whole = compare(embeddings)
    scores = np.concatenate(list(bands.genuine_scores(embeddings[0].astype(np.float64), rows=7)))
    assert len(scores) == 45 * 44 // 2
    assert compare(embeddings, exact_images=0, block=7).genuine.size == whole.genuine.size == 45 * 44


def test_an_embedding_without_length_is_named():
    embeddings = np.ones((5, 4), np.float32)
    embeddings[3] = 0
    with pytest.raises(NegFaceDiffError, match="number 3"):
        score_band(Images(embeddings, np.arange(5)), (), rows=2)


def test_bands_are_whole_blocks_of_about_as_many_images():
    assert band_identities(50, 8) == 320 and band_identities(1, 8) == 16_384
    assert band_identities(10_000, 8) == 8  # one block at least
    assert band_bytes(16_384, 512) < 2**29

"""Genuine and impostor scores: every pair once, masks respected, streaming equal to the exact lists."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.evaluation import scores
from negfacediff_core.evaluation.bands import BINS
from negfacediff_core.evaluation.metrics import separability
from negfacediff_core.evaluation.scores import Distribution, compare


def faces(identities, replicates, width=16, seed=0, lost=0.2):
    random = np.random.default_rng(seed)
    embeddings = random.standard_normal((identities, 1, width)) + 0.7 * random.standard_normal(
        (identities, replicates, width)
    )
    return embeddings.astype(np.float32), random.random((identities, replicates)) >= lost


def plain_lists(embeddings, valid, impostors=None):
    """Two nested loops over images."""
    unit = embeddings.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    images = np.argwhere(valid)
    genuine, impostor = [], []
    for number, (a, r) in enumerate(images):
        for b, s in images[number + 1 :]:
            score = float(unit[a, r] @ unit[b, s])
            if a == b:
                genuine.append(score)
            elif impostors is None or impostors[a, b]:
                impostor.append(score)
    return sorted(genuine), sorted(impostor)


@settings(max_examples=25, deadline=None)
@given(
    identities=st.integers(1, 9),
    replicates=st.integers(1, 5),
    seed=st.integers(0, 99),
    lost=st.floats(0, 0.9),
)
def test_exact_lists_hold_every_pair_once(identities, replicates, seed, lost):
    embeddings, valid = faces(identities, replicates, seed=seed, lost=lost)
    found = compare(embeddings, valid)
    for kind, expected in zip(found, plain_lists(embeddings, valid), strict=True):
        assert kind.size == len(expected) and kind.resolution == 0
        np.testing.assert_allclose(np.repeat(kind.levels, kind.counts), expected, atol=1e-12)
        if expected:
            assert kind.mean == pytest.approx(np.mean(expected), abs=1e-12)
            assert kind.std == pytest.approx(np.std(expected), abs=1e-12)


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_streaming_agrees_with_the_exact_lists(block):
    embeddings, valid = faces(16, 6)
    exact = compare(embeddings, valid)
    streamed = compare(embeddings, valid, exact_images=0, block=block)
    for one, other in zip(exact, streamed, strict=True):
        assert one.size == other.size > 0
        assert other.mean == pytest.approx(one.mean, abs=1e-12)
        assert other.std == pytest.approx(one.std, abs=1e-12)
        listed = np.repeat(one.levels, one.counts)
        binned = np.repeat(other.levels, other.counts)
        # a score is at its level or above by less than a bin, give or take float32 rounding
        assert (listed - binned > -1e-6).all() and (listed - binned < 2 / BINS + 1e-6).all()
    separate, coarse = separability(*exact), separability(*streamed)
    assert coarse.fdr == pytest.approx(separate.fdr, rel=1e-10)
    assert coarse.eer == pytest.approx(separate.eer, abs=1e-5)
    assert coarse.resolution == 2 / BINS and separate.resolution == 0


def test_streamed_moments_have_a_closed_form():
    """The sum of all cosines is (|sum of unit vectors|² - n) / 2, of their squares (|gram|² - n) / 2."""
    embeddings, valid = faces(40, 8, lost=0)
    genuine, impostor = compare(embeddings, valid, exact_images=0, block=100)
    unit = scores.unit_vectors(embeddings.reshape(320, -1))
    total = (np.square(unit.sum(axis=0)).sum() - 320) / 2
    squares = (np.square(unit.T @ unit).sum() - 320) / 2
    assert genuine.size * genuine.mean + impostor.size * impostor.mean == pytest.approx(total, rel=1e-6)
    second = sum(kind.size * (kind.std**2 + kind.mean**2) for kind in (genuine, impostor))
    assert second == pytest.approx(squares, rel=1e-6)


def test_extreme_scores_stay_in_the_histogram():
    embeddings = np.ones((3, 2, 4), dtype=np.float32)
    embeddings[2] *= -1
    genuine, impostor = compare(embeddings, exact_images=0)
    assert genuine.size == 3 and impostor.size == 12
    assert impostor.levels[0] == -1 and impostor.levels[-1] == 1 - 2 / BINS
    assert list(impostor.counts) == [8, 4]


def test_paper_protocol_takes_the_first_images_and_a_seeded_share_of_later_identities(monkeypatch):
    monkeypatch.setattr(scores, "PAPER_IDENTITIES", 12)
    monkeypatch.setattr(scores, "PAPER_IMAGES", 3)
    monkeypatch.setattr(scores, "PAPER_IMPOSTOR_SHARE", 0.3)
    embeddings, valid = faces(20, 6)
    images, impostors = scores.PROTOCOLS["paper"](valid, 5)
    assert not images[12:].any() and not (images & ~valid).any()
    np.testing.assert_array_equal(images[:12].sum(axis=1), np.minimum(valid[:12].sum(axis=1), 3))
    assert not np.tril(impostors).any() and not impostors[:, 12:].any()
    expected = plain_lists(embeddings, images, impostors)
    for kind, listed in zip(compare(embeddings, valid, "paper", seed=5), expected, strict=True):
        np.testing.assert_allclose(np.repeat(kind.levels, kind.counts), listed, atol=1e-12)


def test_paper_protocol_keeps_every_score_however_many_there_are(monkeypatch):
    monkeypatch.setattr(scores, "PAPER_IMPOSTOR_SHARE", 0.5)
    embeddings, valid = faces(16, 6)
    for one, other in zip(
        compare(embeddings, valid, "paper"), compare(embeddings, valid, "paper", exact_images=0), strict=True
    ):
        assert other.resolution == 0
        np.testing.assert_array_equal(one.levels, other.levels)


def test_paper_protocol_at_its_published_size():
    valid = np.ones((1500, 25), dtype=bool)
    images, impostors = scores.PROTOCOLS["paper"](valid, 0)
    assert images.sum() == 1000 * 20
    assert impostors.sum() / (1000 * 999 / 2) == pytest.approx(0.05, abs=0.002)
    again, other = (scores.PROTOCOLS["paper"](valid, seed)[1] for seed in (0, 1))
    assert (impostors == again).all() and not (impostors == other).all()
    assert scores.PROTOCOLS["paper"](valid[:400], 0)[1].sum() == impostors[:400, :400].sum()


def test_the_paper_protocol_takes_no_memory_for_pairs_that_it_leaves_out():
    """A table of all pairs of 20,000 identities would be 400 MB."""
    valid = np.ones((20_000, 2), dtype=bool)
    tracemalloc.start()
    _, impostors = scores.select(valid, "paper", 0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert impostors.shape == (1000, 1000) and most < 32e6


def test_length_of_embeddings_does_not_matter_and_progress_is_told():
    embeddings, valid = faces(6, 4)
    told = []
    scaled = compare(
        embeddings * 7,
        valid,
        exact_images=0,
        block=5,
        progress=lambda done, total: told.append((done, total)),
    )
    assert scaled[0].mean == pytest.approx(compare(embeddings, valid)[0].mean, abs=1e-6)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (valid.sum(), valid.sum())


def test_masked_images_may_hold_anything():
    embeddings, valid = faces(5, 4)
    spoiled = np.where(valid[..., None], embeddings, np.nan)
    for one, other in zip(compare(spoiled, valid), compare(embeddings, valid), strict=True):
        np.testing.assert_array_equal(one.levels, other.levels)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_valid_images_may_not(value):
    embeddings, valid = faces(5, 4, lost=0)
    embeddings[1, 2] = value
    with pytest.raises(NegFaceDiffError, match="number 6"):
        compare(embeddings, valid)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"embeddings": np.ones((4, 3))}, "identities, replicates, width"),
        ({"embeddings": np.ones((4, 3, 2)), "valid": np.ones((3, 4), bool)}, r"\(3, 4\)"),
        ({"embeddings": np.ones((4, 3, 2)), "protocol": "half"}, "no protocol 'half'.*full, paper"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(NegFaceDiffError, match=message):
        compare(**arguments)


def test_lists_with_nan_are_refused():
    with pytest.raises(NegFaceDiffError, match="NaN"):
        Distribution.of(np.array([0.1, np.nan]))

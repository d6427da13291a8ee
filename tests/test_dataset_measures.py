"""What a dataset is worth: each pure measure against brute force, closed forms, and datasets made for it."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from negfacediff_core.evaluation.coverage import effective_dimensions, expected_nearest_cosine
from negfacediff_core.evaluation.scores import compare
from negfacediff_core.evaluation.summaries import QUANTILES, evenness, summarise
from negfacediff_core.evaluation.uniqueness import centres_of, crowding, match_threshold, strays
from negfacediff_core.evaluation.within import (
    DUPLICATE_COSINE,
    DUPLICATE_LEVELS,
    thumbnails,
    within_identities,
)
from negfacediff_core.faces.align import align_batch
from negfacediff_core.faces.embed import load_embedder
from negfacediff_core.renders.identity import draw_identity
from negfacediff_core.renders.render import render
from negfacediff_core.stages.models import PROJECT

seeds = st.integers(0, 2**32 - 1)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def drawn(seed, identities=6, images=5, width=8, spread=0.7):
    """Embeddings of identities about centres of their own, of any length, and which are valid."""
    rng = np.random.default_rng(seed)
    centres = unit(rng.standard_normal((identities, 1, width)))
    embeddings = centres + spread * unit(rng.standard_normal((identities, images, width)))
    embeddings *= rng.uniform(0.1, 30, (identities, images, 1))
    return embeddings.astype(np.float32), rng.random((identities, images)) < 0.7


def crops_of(seed, identities=6, images=5):
    return np.random.default_rng(seed).integers(0, 256, (identities, images, 112, 112, 3), np.uint8)


# --- the images of one identity ----------------------------------------------------------------------------


@settings(max_examples=20)
@given(seed=seeds)
def test_what_images_of_an_identity_are_to_each_other(seed):
    embeddings, valid = drawn(seed)
    small = thumbnails(crops_of(0))
    found = within_identities(embeddings, valid, small)
    for i, shown in enumerate(valid):
        vectors, pixels = unit(embeddings[i, shown].astype(float)), small[i, shown].astype(float)
        pairs = [(a, b) for a in range(len(vectors)) for b in range(a)]
        np.testing.assert_allclose(found.total[i], vectors.sum(0), atol=1e-6)
        assert np.isnan(found.own[i, ~shown]).all()
        if not pairs:
            assert np.isnan([found.consistency[i], found.spread[i], found.pixel_difference[i]]).all()
            assert np.isnan(found.own[i]).all() and found.near_duplicates[i] == 0
            continue
        own = [unit(np.delete(vectors, a, 0).mean(0)) @ vectors[a] for a in range(len(vectors))]
        np.testing.assert_allclose(found.own[i, shown], own, atol=1e-6)
        assert found.centre_least[i] == pytest.approx(min(own), abs=1e-6)
        assert found.spread[i] == pytest.approx(np.degrees(np.arccos(own)).mean(), abs=1e-3)
        assert found.consistency[i] == pytest.approx(np.mean([vectors[a] @ vectors[b] for a, b in pairs]))
        levels = [np.sqrt(((pixels[a] - pixels[b]) ** 2).mean()) for a, b in pairs]
        assert found.pixel_difference[i] == pytest.approx(np.mean(levels))


def test_thumbnails_are_means_of_four_by_four_pixels():
    crops = crops_of(1, 2, 1)
    small = thumbnails(crops).reshape(2, 1, 28, 28, 3)
    assert small[1, 0, 27, 3, 2] == crops[1, 0, 108:112, 12:16, 2].mean()
    assert small.mean() == pytest.approx(crops.mean(), rel=1e-5)


def test_an_identity_of_one_image_or_none_says_nothing():
    embeddings, _ = drawn(0, identities=2, images=1)
    found = within_identities(embeddings, np.array([[True], [False]]), thumbnails(crops_of(0, 2, 1)))
    assert np.isnan(found.consistency).all() and found.near_duplicates.tolist() == [0, 0]
    assert found.total[1].tolist() == [0] * 8


def test_images_that_cancel_have_no_centre():
    embeddings = np.array([[[1, 0], [-1, 0], [0, 1]]], np.float32)
    found = within_identities(embeddings, np.ones((1, 3), bool), thumbnails(crops_of(0, 1, 3)))
    assert found.own[0, 2] == 0 and np.isfinite(found.spread).all()


def jpeg(crop, quality):
    file = io.BytesIO()
    Image.fromarray(crop).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def noisy(crop):
    noise = np.random.default_rng(0).normal(0, 8, crop.shape)
    return np.clip(crop + noise, 0, 255).round().astype(np.uint8)


COPIES = {
    "the same": lambda crop: crop,
    "JPEG at quality 75": lambda crop: jpeg(crop, 75),
    "JPEG at quality 30": lambda crop: jpeg(crop, 30),
    "noise of 8 levels": noisy,
    "brighter by 6": lambda crop: np.clip(crop.astype(int) + 6, 0, 255).astype(np.uint8),
}


@pytest.fixture(scope="module")
def faces():
    """Aligned crops `(4, 4, 112, 112, 3)` of rendered identities, and the demo pack's judge."""
    found = [[render(draw_identity(0, i), r, size=64) for r in range(4)] for i in range(4)]
    aligned = [
        align_batch(np.stack([f.image for f in row]), np.stack([f.landmarks for f in row])) for row in found
    ]
    return np.stack(aligned), load_embedder(PROJECT / "packs/demo/judge")


def near_duplicates(crops, judge):
    """Near-duplicates of `(B, R, 112, 112, 3)` crops."""
    embeddings = judge.embed(crops.reshape(-1, 112, 112, 3)).reshape(*crops.shape[:2], -1)
    valid = np.ones(crops.shape[:2], bool)
    return within_identities(embeddings, valid, thumbnails(crops)).near_duplicates


def test_different_images_of_a_person_are_no_near_duplicates(faces):
    crops, judge = faces
    assert near_duplicates(crops, judge).tolist() == [0] * 4


@pytest.mark.parametrize("kind", COPIES)
def test_copies_of_an_image_are_near_duplicates(kind, faces):
    crops, judge = faces
    copied = np.stack([np.append(row, COPIES[kind](row[0])[None], axis=0) for row in crops])
    assert near_duplicates(copied, judge).tolist() == [1] * 4


def test_a_mirrored_image_is_no_near_duplicate(faces):
    crops, judge = faces
    turned = np.concatenate([crops[:, :1], crops[:, :1, :, ::-1]], axis=1)
    assert near_duplicates(turned, judge).tolist() == [0] * 4


@pytest.mark.parametrize(
    ("cosine", "levels", "count"),
    [
        (DUPLICATE_COSINE + 0.01, DUPLICATE_LEVELS - 1, 1),
        (DUPLICATE_COSINE - 0.01, DUPLICATE_LEVELS - 1, 0),
        (DUPLICATE_COSINE + 0.01, DUPLICATE_LEVELS + 1, 0),
    ],
)
def test_both_criteria_must_hold(cosine, levels, count):
    embeddings = np.array([[[1, 0], [cosine, np.sqrt(1 - cosine**2)]]], np.float32)
    crops = np.zeros((1, 2, 112, 112, 3), np.uint8)
    crops[0, 1] = round(levels)
    assert within_identities(embeddings, np.ones((1, 2), bool), thumbnails(crops)).near_duplicates == [count]


# --- identities against each other -------------------------------------------------------------------------


@settings(max_examples=20)
@given(seed=seeds, block=st.integers(1, 9))
def test_distinct_identities_are_those_of_a_loop_in_any_block(seed, block):
    centres = unit(np.random.default_rng(seed).standard_normal((30, 3)))
    kept, matches = [], 0
    for number, centre in enumerate(centres):
        matches += sum(centre @ other >= 0.6 for other in centres[:number])
        if all(centre @ centres[other] < 0.6 for other in kept):
            kept.append(number)
    found = crowding(centres, 0.6, block)
    assert found == (len(kept), matches, 30 * 29 // 2)


@pytest.mark.parametrize("classes", [1, 3, 8])
def test_capacity_of_equally_likely_classes_is_their_number(classes):
    members = 400 // classes
    found = crowding(np.repeat(np.eye(8)[:classes], members, axis=0), 0.5)
    assert found.distinct == classes
    assert found.capacity == pytest.approx(classes, rel=0.02)


def test_capacity_is_unknown_where_nobody_matches():
    assert crowding(np.eye(4), 0.5).capacity is None
    assert crowding(np.eye(4)[:1], 0.5) == (1, 0, 0)


def test_identities_without_images_have_no_centre():
    centres, numbers = centres_of(np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 1e-12]]))
    np.testing.assert_allclose(centres, [[0.6, 0.8]])
    assert numbers.tolist() == [1]


@settings(max_examples=20)
@given(seed=seeds)
def test_the_threshold_lets_that_share_of_impostors_match(seed):
    scores = compare(drawn(seed, identities=20)[0])
    impostors = np.repeat(scores.impostor.levels, scores.impostor.counts)
    for fmr in (0.1, 0.01):
        threshold = match_threshold(scores, fmr)
        assert (impostors >= threshold).mean() <= fmr
        below = impostors[impostors < threshold]
        assert (impostors >= below.max()).mean() > fmr


def test_a_threshold_that_no_score_reaches_is_none():
    twins = np.tile(unit(np.ones((1, 1, 4))), (3, 2, 1)).astype(np.float32)
    assert np.isnan(match_threshold(compare(twins), 0.1))


@settings(max_examples=20)
@given(seed=seeds)
def test_strays_are_nearer_to_others_than_to_the_rest_of_their_own(seed):
    embeddings, valid = drawn(seed, spread=1.2)
    found = within_identities(embeddings, valid, thumbnails(crops_of(0)))
    centres, numbers = centres_of(found.total)
    identity = np.nonzero(valid)[0]
    vectors = unit(embeddings[valid].astype(float))
    astray = strays(vectors, identity, found.own[valid], centres, numbers)
    for row, (i, vector) in enumerate(zip(identity, vectors, strict=True)):
        others = [vector @ centre for centre, j in zip(centres, numbers, strict=True) if j != i]
        rest = found.total[i] - vector
        alone = valid[i].sum() == 1
        assert astray[row] == (not alone and max(others, default=-2) > unit(rest) @ vector)


def test_an_image_of_another_person_is_a_stray_and_no_block_changes_that(monkeypatch):
    embeddings, _ = drawn(3, identities=5, spread=0.2)
    valid = np.ones((5, 5), bool)
    embeddings[2, 1] = embeddings[4, 0]
    found = within_identities(embeddings, valid, thumbnails(crops_of(0, 5)))
    centres, numbers = centres_of(found.total)
    given_ = unit(embeddings[valid].astype(float)), np.nonzero(valid)[0], found.own[valid], centres, numbers
    astray = strays(*given_)
    assert np.flatnonzero(astray).tolist() == [2 * 5 + 1]
    monkeypatch.setattr("negfacediff_core.evaluation.uniqueness._HELD", 11)
    np.testing.assert_array_equal(strays(*given_), astray)
    assert not strays(*given_[:3], centres[:0], numbers[:0]).any()


# --- contexts on their sphere ------------------------------------------------------------------------------


@settings(max_examples=20)
@given(seed=seeds, block=st.integers(1, 60))
def test_effective_dimensions_are_those_of_all_pairs(seed, block):
    contexts = unit(np.random.default_rng(seed).standard_normal((50, 6))).astype(np.float32)
    cosines = (contexts.astype(float) @ contexts.T.astype(float))[np.triu_indices(50, 1)]
    assert effective_dimensions(contexts, block) == pytest.approx(1 / (cosines**2).mean(), rel=1e-4)


@pytest.mark.parametrize("dimensions", [1, 5, 32])
def test_even_contexts_have_the_dimensions_that_they_fill(dimensions):
    contexts = np.zeros((4000, 32))
    contexts[:, :dimensions] = np.random.default_rng(0).standard_normal((4000, dimensions))
    assert effective_dimensions(unit(contexts).astype(np.float32)) == pytest.approx(dimensions, rel=0.02)


def test_contexts_in_a_cone_have_fewer_dimensions_and_orthogonal_ones_no_limit():
    rng = np.random.default_rng(0)
    cone = unit(rng.standard_normal((2000, 32)) + np.array([6.0, *[0.0] * 31]))
    assert effective_dimensions(cone.astype(np.float32)) < 8
    assert effective_dimensions(np.eye(8, dtype=np.float32)) > 1e6


@pytest.mark.parametrize("count", [2, 10, 1000])
def test_the_nearest_of_even_directions_in_space_has_a_closed_form(count):
    """On the ordinary sphere cosines are uniform: the greatest of n has the mean 1 - 2 / (n + 1)."""
    assert expected_nearest_cosine(count, 3) == pytest.approx(1 - 2 / count, abs=1e-4)


def test_the_nearest_of_even_directions_is_that_of_a_draw():
    contexts = unit(np.random.default_rng(1).standard_normal((1500, 64)))
    cosines = contexts @ contexts.T
    np.fill_diagonal(cosines, -1)
    assert expected_nearest_cosine(1500, 64) == pytest.approx(cosines.max(1).mean(), abs=2e-3)


# --- summaries ---------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_a_summary_counts_every_value_once(values):
    found = summarise(np.array(values), bins=7)
    assert sum(found["counts"]) == found["count"] == len(values)
    assert found["low"] <= found["mean"] + 1e-6 and found["mean"] - 1e-6 <= found["high"]
    np.testing.assert_allclose(found["quantiles"], np.quantile(values, QUANTILES))


def test_a_summary_keeps_to_its_limits_and_to_what_is_finite():
    found = summarise(np.array([[-5.0, 0.1, 0.9], [np.nan, np.inf, 7.0]]), (0.0, 1.0), bins=2)
    assert (found["low"], found["high"], found["counts"]) == (0.0, 1.0, [2, 2])
    assert found["mean"] == pytest.approx(3.0 / 4)
    assert summarise(np.array([np.nan])) is None
    assert sum(summarise(np.full(4, 2.5))["counts"]) == 4


def test_evenness_is_one_for_equal_shares_and_zero_for_one_class():
    assert evenness(np.array([5, 5, 5])) == pytest.approx(1)
    assert evenness(np.array([9, 0])) == 0
    assert evenness(np.array([5, 5, 0, 0])) == pytest.approx(0.5)  # the classes that nobody has count, too
    assert evenness(np.array([1, 3])) == pytest.approx(-(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75)))
    assert evenness(np.array([0, 0])) is None and evenness(np.array([4])) is None

"""IDperturb: unit contexts at a drawn cosine to their identity's, one draw an image, within the bounds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from negfacediff_core.contexts import normalise, uniform
from negfacediff_core.transforms import TRANSFORMS, idperturb, safe_lower_bound

WIDTH = 24


def rows(identities, images):
    numbers = np.arange(identities).repeat(images), np.tile(np.arange(images), identities)
    return uniform(0, np.arange(identities), WIDTH).repeat(images, axis=0), *numbers


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_an_image_has_its_own_context_in_every_batch_and_order(transform):
    contexts, identities, replicates = rows(5, 4)
    bound = np.full(20, 0.6)
    whole = TRANSFORMS[transform](contexts, 3, identities, replicates, bound)
    order = np.random.default_rng(0).permutation(20)[:13]
    part = TRANSFORMS[transform](contexts[order], 3, identities[order], replicates[order], bound[order])
    np.testing.assert_array_equal(part, whole[order])
    assert whole.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    assert len(np.unique(whole, axis=0)) == 20
    other = TRANSFORMS[transform](contexts, 4, identities, replicates, bound)
    assert not np.isclose(other, whole, atol=1e-3).all(axis=1).any()


def test_the_cosine_is_uniform_between_the_bound_and_one_and_the_direction_has_no_preference():
    contexts, identities, replicates = rows(1, 4000)
    turned = idperturb(contexts, 0, identities, replicates, np.full(4000, 0.6)).astype(np.float64)
    cosine = turned @ contexts[0]
    assert cosine.min() >= 0.6 - 1e-6 and cosine.max() <= 1 + 1e-6
    assert stats.kstest((cosine - 0.6) / 0.4, "uniform").pvalue > 1e-3
    aside = turned - cosine[:, None] * contexts[0]
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    np.testing.assert_allclose(aside.mean(axis=0), 0, atol=0.02)
    expected = (np.eye(WIDTH) - np.outer(contexts[0], contexts[0])) / (WIDTH - 1)
    np.testing.assert_allclose(aside.T @ aside / len(aside), expected, atol=0.01)


def test_a_bound_of_one_turns_nothing():
    contexts, identities, replicates = rows(3, 2)
    turned = idperturb(contexts, 0, identities, replicates, np.ones(6))
    np.testing.assert_allclose(turned, contexts, atol=1e-6)


@given(st.floats(0, 1), st.floats(-1, 1))
def test_the_safe_bound_is_half_the_angle_to_the_nearest_and_never_below_the_bound(bound, nearest):
    (found,) = safe_lower_bound(bound, np.array([nearest]))
    half = np.cos(np.arccos(nearest) / 2)
    assert found == pytest.approx(max(bound, half), abs=1e-7)


def test_safely_turned_contexts_stay_nearest_to_their_own_identity():
    centres = normalise(np.random.default_rng(1).standard_normal((12, 3)))
    cosines = centres @ centres.T
    nearest = np.where(np.eye(12, dtype=bool), -1, cosines).max(axis=1)
    bound = safe_lower_bound(0.0, nearest)
    identities, replicates = np.arange(12).repeat(50), np.tile(np.arange(50), 12)
    turned = idperturb(centres[identities], 0, identities, replicates, bound[identities])
    assert ((turned @ centres.T).argmax(axis=1) == identities).all()
    freely = idperturb(centres[identities], 0, identities, replicates, np.zeros(600))
    assert ((freely @ centres.T).argmax(axis=1) != identities).any()

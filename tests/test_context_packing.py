"""Contexts that are made together: packed on the sphere, or drawn anew until they are far enough apart."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from negfacediff_core import contexts
from negfacediff_core.contexts import unique
from negfacediff_core.errors import ContextsError


def drawn(seed, width):
    return lambda identities, attempts: contexts.uniform(seed, identities, width, attempts)


def cosines(vectors):
    table = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    np.fill_diagonal(table, -np.inf)
    return table


@pytest.mark.parametrize("count", [2, 5, 1500])
def test_the_closest_are_those_of_the_whole_table(count):
    vectors = contexts.uniform(0, np.arange(count), 6)
    found, table = contexts.closest(vectors), cosines(vectors)
    np.testing.assert_array_equal(found.other, table.argmax(axis=1))
    np.testing.assert_allclose(found.cosine, table.max(axis=1), atol=1e-12)


def test_packing_lowers_the_worst_cosine_markedly():
    start = contexts.uniform(0, np.arange(256), 16)
    packed = contexts.packed(0, 256, 16, 150)
    assert packed.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(packed, axis=1), 1, atol=1e-6)
    assert cosines(start).max() > 0.75
    assert cosines(packed).max() < 0.38


@pytest.mark.parametrize("count, width", [(2, 3), (5, 4), (9, 16), (17, 16), (20, 16), (32, 16), (120, 8)])
def test_packing_stays_above_the_bound_and_reaches_a_simplex(count, width):
    worst = cosines(contexts.packed(1, count, width, 200)).max()
    bound = contexts.lowest_worst_cosine(count, width)
    assert worst > bound - 1e-6
    if count <= width + 1:
        assert worst < bound + 1e-3


def test_the_bound_is_that_of_simplex_and_cross_polytope():
    simplex = contexts.normalise(np.eye(7) - 1 / 7)  # 7 points that span 6 dimensions
    assert cosines(simplex).max() == pytest.approx(contexts.lowest_worst_cosine(7, 6), abs=1e-6)
    cross = np.concatenate([np.eye(6), -np.eye(6)])
    assert cosines(cross).max() == contexts.lowest_worst_cosine(12, 6)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**40), count=st.integers(2, 40), width=st.integers(2, 12), steps=st.integers(0, 4)
)
def test_packing_is_never_worse_than_the_start(seed, count, width, steps):
    start = contexts.uniform(seed, np.arange(count), width)
    assert cosines(contexts.pack(start, steps)).max() <= cosines(start).max() + 1e-6


def test_packing_does_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(contexts.packed(0, 600, 32, 5))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(*results)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**40), count=st.integers(1, 40), block=st.integers(1, 50))
def test_kept_apart_is_the_plain_loop_over_identities(seed, count, block):
    width, bound = 12, 0.6
    draw = drawn(seed, width)
    kept, attempts = [], []
    for identity in range(count):
        for attempt in range(unique.ATTEMPTS):
            (context,) = draw(np.array([identity]), np.array([attempt]))
            if all(context.astype(np.float64) @ other.astype(np.float64) < bound for other in kept):
                break
        kept.append(context)
        attempts.append(attempt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unique, "BLOCK", block)
        found = contexts.draw_unique(draw, count, bound)
    np.testing.assert_array_equal(found.contexts, np.array(kept))
    np.testing.assert_array_equal(found.attempts, attempts)


def test_kept_apart_are_all_below_the_bound_and_mostly_the_first_draws():
    found = contexts.draw_unique(drawn(0, 64), 600, 0.42)
    assert cosines(found.contexts).max() < 0.42
    assert 0 < np.count_nonzero(found.attempts) < 100
    first = found.attempts == 0
    np.testing.assert_array_equal(found.contexts[first], contexts.uniform(0, np.arange(600), 64)[first])


def test_without_a_bound_all_are_first_draws():
    found = contexts.draw_unique(drawn(0, 3), 300, 1.0)
    np.testing.assert_array_equal(found.contexts, contexts.uniform(0, np.arange(300), 3))
    assert not found.attempts.any()


def test_an_identity_without_a_place_is_named_with_what_it_reached():
    with pytest.raises(ContextsError, match=r"max_cosine is 0\.3, but identity (\d+) of 300") as raised:
        contexts.draw_unique(drawn(0, 20), 300, 0.3)
    reached = float(str(raised.value).split("a cosine of ")[1].split(";")[0])
    identity = int(str(raised.value).split("identity ")[1].split(" ")[0])
    assert 0.3 <= reached < 0.5
    contexts.draw_unique(drawn(0, 20), identity, 0.3)  # those before it had places
    with pytest.raises(ContextsError, match=f"identity {identity} "):
        contexts.draw_unique(drawn(0, 20), identity + 1, 0.3)


@pytest.mark.parametrize("count, width, bound", [(5, 8, -0.25), (12, 8, 0.0), (100, 8, -0.9)])
def test_bounds_that_no_directions_meet_are_refused(count, width, bound):
    with pytest.raises(ContextsError, match=f"no {count} directions in {width} dimensions"):
        contexts.check_possible(count, width, bound)
    contexts.check_possible(count, width, bound + 1)


def test_given_identities_that_are_too_close_are_named():
    vectors = np.eye(6, 8, dtype=np.float32)
    contexts.check_distinct(vectors, 0.1)
    vectors[4] = contexts.normalise(vectors[1:2] + 0.5 * vectors[4:5])
    message = r"identities (1 and 4|4 and 1) have a cosine of 0\.8944.* \(2 of 6"
    with pytest.raises(ContextsError, match=message):
        contexts.check_distinct(vectors, 0.5)

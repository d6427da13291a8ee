"""Figures of verification: by scikit-learn and pyeer, on sets with known answers, and their intervals."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pyeer import eer_stats as pyeer
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import KFold
from verification_material import lfw_order

from negfacediff_core.recognition.fold_accuracy import (
    FOLDS,
    contiguous_folds,
    even_folds,
    fold_accuracy,
    resampled_accuracies,
)
from negfacediff_core.recognition.verification_bootstrap import FIGURES, draw_weights, interval, resample
from negfacediff_core.recognition.verify import (
    TEMPLATE_FARS,
    Verified,
    differences,
    far_name,
    pair_figures,
    pair_scores,
    template_figures,
)


def field_accuracy(distances, same):
    """The protocol as it is told, fold by fold."""
    found, thresholds = [], np.arange(0, 4, 0.01)
    for train, test in KFold(FOLDS).split(distances):
        right = ((distances[train] < thresholds[:, None]) == same[train]).mean(axis=1)
        best = thresholds[np.argmax(right)]
        found.append((((distances[test] < best) == same[test]).mean(), best))
    return np.array(found).T


def draws_of(pairs):
    """Distances with ties, some of them at thresholds, and which pairs are genuine."""
    distances = arrays(np.float64, pairs, elements=st.floats(0, 4, width=32))
    return st.tuples(
        distances
        | distances.map(lambda values: values.round(2))
        | distances.map(lambda values: values.round(1)),
        arrays(np.bool_, pairs),
    )


@settings(max_examples=30)
@given(st.integers(FOLDS, 60).flatmap(draws_of))
def test_ten_folds_are_those_of_scikit_learn(drawn):
    distances, same = drawn
    found = fold_accuracy(distances, same, contiguous_folds(len(same)))
    accuracies, thresholds = field_accuracy(distances, same)
    np.testing.assert_allclose(found.accuracies, accuracies, atol=1e-12)
    np.testing.assert_allclose(found.thresholds, thresholds, atol=1e-12)
    assert found.mean == pytest.approx(accuracies.mean()) and found.std == pytest.approx(np.std(accuracies))


def test_a_hard_set_as_large_as_lfw_is_judged_as_by_the_plain_loops():
    same = lfw_order(10, 300)
    random = np.random.default_rng(0)
    distances = np.clip(np.where(same, random.normal(1.2, 0.3, 6000), random.normal(1.9, 0.2, 6000)), 0, 4)
    found = fold_accuracy(distances, same, contiguous_folds(6000))
    accuracies, thresholds = field_accuracy(distances, same)
    np.testing.assert_array_equal(found.accuracies, accuracies)
    np.testing.assert_array_equal(found.thresholds, thresholds)
    # two normal distributions: the best threshold solves a quadratic, and judges so many rightly
    assert found.mean == pytest.approx(best_accuracy_of_normals(1.2, 0.3, 1.9, 0.2), abs=0.01)
    # an exact search moves it by a few pairs
    exact = np.unique(distances)
    exact = np.concatenate([[0.0], (exact[1:] + exact[:-1]) / 2, [4.1]])
    assert abs(fold_accuracy(distances, same, contiguous_folds(6000), exact).mean - found.mean) < 0.002


def best_accuracy_of_normals(low, low_std, high, high_std):
    """The highest share that a threshold between two normal distributions judges rightly."""
    return max(
        (1 + math.erf((t - low) / low_std / 2**0.5)) / 4 + (1 + math.erf((high - t) / high_std / 2**0.5)) / 4
        for t in np.arange(low, high, 1e-3)
    )


@pytest.mark.parametrize("wrong", [0, 1, 3])
def test_a_set_with_so_many_wrong_pairs_in_each_fold_has_that_accuracy(wrong):
    same = lfw_order(10, 10)
    distances = np.where(same, 0.1, 3.0)
    for fold in range(10):
        distances[20 * fold : 20 * fold + wrong] = 3.0
    found = fold_accuracy(distances, same, contiguous_folds(200))
    assert found.accuracies.tolist() == [1 - wrong / 20] * 10
    assert found.std == pytest.approx(0, abs=1e-12)


def test_the_tenth_fold_has_no_say_in_its_threshold():
    same = lfw_order(10, 5)
    distances = np.where(same, 0.5, 2.5)
    distances[:10] = np.where(same[:10], 3.5, 3.9)  # a fold that is separable, elsewhere
    found = fold_accuracy(distances, same, contiguous_folds(100))
    assert found.accuracies.tolist() == [0.5] + [1.0] * 9


def test_folds_are_stretches_of_the_list_or_of_each_kind():
    assert [len(test) for _, test in KFold(FOLDS).split(np.empty(57))] == np.bincount(
        contiguous_folds(57)
    ).tolist()
    same = lfw_order(10, 30)
    assert (even_folds(same) == contiguous_folds(600)).all()
    sorted_list = np.repeat([True, False], [40, 60])
    folds = even_folds(sorted_list)
    assert np.bincount(folds[sorted_list]).tolist() == [4] * 10
    assert np.bincount(folds[~sorted_list]).tolist() == [6] * 10


@settings(max_examples=25)
@given(
    arrays(np.float64, 40, elements=st.floats(-1, 1, width=32))
    | arrays(np.float64, 40, elements=st.sampled_from([-0.5, 0.0, 0.1, 0.3])),
    st.integers(1, 39),
)
def test_rates_are_those_of_scikit_learn(cosines, genuine):
    same = np.arange(40) < genuine
    found = template_figures(cosines, same)
    fpr, tpr, _ = roc_curve(same, cosines, drop_intermediate=False)
    assert found["auc"] == pytest.approx(roc_auc_score(same, cosines))
    for far in TEMPLATE_FARS:
        assert found["tar"][far_name(far)] == pytest.approx(tpr[fpr <= far].max())
        # as published evaluations choose: of the closest the lowest threshold
        gaps = np.abs(fpr - far)[::-1]
        # the curve of scikit-learn begins at a threshold of infinity, which no pair reaches
        assert found["tar_closest"][far_name(far)] >= tpr[::-1][gaps.argmin()] - 1e-12


def test_the_eer_is_that_of_pyeer():
    random = np.random.default_rng(1)
    genuine, impostor = random.normal(0.4, 0.15, 500), random.normal(0.0, 0.1, 900)
    found = template_figures(np.concatenate([genuine, impostor]), np.arange(1400) < 500)
    _, fmr, fnmr = pyeer.calculate_roc(genuine, impostor)
    assert found["eer"] == pytest.approx(pyeer.get_eer_values(fmr, fnmr)[-1])
    assert (found["genuine"], found["impostor"]) == (500, 900)


def test_distances_are_those_of_the_cosines():
    unit = np.random.default_rng(0).standard_normal((9, 5))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    pairs = np.array([[0, 1], [2, 3], [4, 4], [8, 0]])
    cosines, distances = pair_scores(unit, pairs)
    np.testing.assert_allclose(distances, 2 - 2 * cosines, atol=1e-12)
    assert distances[2] == 0


def scored(seed, pairs=200, gap=0.4):
    """Scores of a recogniser on one set: cosines, distances, kinds and folds."""
    random = np.random.default_rng(seed)
    same = lfw_order(10, pairs // 20)
    cosines = np.clip(random.normal(np.where(same, gap, 0.0), 0.2), -1, 1).round(3)
    return cosines, 2 - 2 * cosines, same, contiguous_folds(pairs)


def test_a_draw_counts_each_pair_as_often_as_it_is_drawn():
    cosines, distances, same, folds = scored(0)
    weights = np.array(list(draw_weights(folds, draws=5, seed=3)))
    assert (weights.reshape(5, 10, 20).sum(axis=2) == 20).all()
    found = resample(cosines, distances, same, folds, weights)
    for row, figures in zip(weights, found, strict=True):
        times = np.repeat(np.arange(len(same)), row.astype(int))
        expected = pair_figures(cosines[times], distances[times], same[times], folds[times])
        np.testing.assert_allclose(
            figures, [expected["accuracy"], expected["eer"], expected["tar"]["1e-3"]], atol=1e-12
        )
    ones = np.ones((1, len(same)))
    assert next(resampled_accuracies(distances, same, folds, ones)) == pytest.approx(
        fold_accuracy(distances, same, folds).mean
    )


def test_draws_are_those_of_one_generator_fold_by_fold():
    folds = np.array([2, 0, 0, 1, 1, 1, 0, 2, 1, 2, 2, 2])
    generator = np.random.Generator(np.random.Philox(7))
    expected = np.empty((9, len(folds)))
    for fold, size in enumerate((3, 4, 5)):
        expected[:, folds == fold] = generator.multinomial(size, np.full(size, 1 / size), 9)
    np.testing.assert_array_equal(list(draw_weights(folds, 9, seed=7)), expected)


def test_a_row_of_draws_is_held_at_a_time():
    """Of 100 draws of 10,000 pairs, which are 8 MB, a part is there at a time."""
    cosines, distances, same, folds = scored(0, pairs=10_000)
    tracemalloc.start()
    try:
        found = resample(cosines, distances, same, folds, draw_weights(folds, draws=100))
        assert tracemalloc.get_traced_memory()[1] < 6e6 and found.shape == (100, 3)
    finally:
        tracemalloc.stop()


def test_intervals_hold_the_true_accuracy_about_as_often_as_they_say():
    """Over sets of the same kind, the interval of one set holds the mean of all in most cases."""
    accuracies, limits = [], []
    for seed in range(40):
        _, distances, same, folds = scored(seed, pairs=400)
        accuracies.append(fold_accuracy(distances, same, folds).mean)
        weights = draw_weights(folds, draws=40, seed=seed)
        drawn = list(resampled_accuracies(distances, same, folds, weights))
        limits.append(interval(np.array(drawn)[:, None])[0])
    truth = np.mean(accuracies)
    held = np.mean([low <= truth <= high for low, high in limits])
    assert 0.8 <= held <= 1.0


def test_differences_are_paired():
    """Of two recognisers that err on the same pairs, the difference is surer than either figure."""
    cosines, _, same, folds = scored(0, pairs=1000)
    weights = list(draw_weights(folds, draws=200))
    slightly = cosines + np.random.default_rng(9).normal(0, 0.005, len(cosines))
    one, other = (
        Verified(pair_figures(c, 2 - 2 * c, same, folds), c, resample(c, 2 - 2 * c, same, folds, weights))
        for c in (slightly, cosines)
    )
    found = differences(one, other)
    assert list(found) == list(FIGURES)
    for name, (low, high) in zip(FIGURES[:2], interval(one.draws), strict=False):
        assert found[name]["low"] <= found[name]["difference"] <= found[name]["high"]
        assert found[name]["high"] - found[name]["low"] < 0.8 * (high - low)
    assert found["accuracy"]["difference"] == one.figures["accuracy"] - other.figures["accuracy"]
    same_again = differences(one, one)
    assert all(value == 0 for row in same_again.values() for value in row.values())
    assert differences(Verified(one.figures, one.cosines, np.empty((0, 3))), other) == {}

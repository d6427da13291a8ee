"""Separability figures: reference outputs, the tool pyeer on random scores, and closed forms."""

import dataclasses
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pyeer import eer_stats as pyeer

from negfacediff_core.contexts import uniform
from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.evaluation.bands import BINS, bins_of, levels_of
from negfacediff_core.evaluation.metrics import (
    error_rates,
    fisher_discriminant_ratio,
    point_at,
    point_at_most,
    point_closest,
    separability,
)
from negfacediff_core.evaluation.scores import Distribution

DATA = Path(__file__).parent / "data"
EXPECTED = json.loads((DATA / "metrics_expected.json").read_text())["cases"]


def figures(genuine, impostor):
    return separability(Distribution.of(np.asarray(genuine)), Distribution.of(np.asarray(impostor)))


@pytest.mark.parametrize("case", EXPECTED)
def test_reference_outputs(case):
    with np.load(DATA / "metrics_scores.npz") as file:
        found = figures(file[f"{case}/genuine"], file[f"{case}/impostor"])
    expected, tool = EXPECTED[case], EXPECTED[case]["pyeer"]
    wanted = {
        "fdr": expected["FDR"],
        "fmr100": expected["fmr100_strict_FMR_le_target"]["fnmr"],
        "fmr1000": expected["fmr1000_strict_FMR_le_target"]["fnmr"],
        "zero_fmr": expected["fmr0_strict_FMR_le_target"]["fnmr"],
        "fmr100_closest": tool["fmr100"],
        "fmr1000_closest": tool["fmr1000"],
        "zero_fmr_closest": tool["fmr0"],
        "eer": tool["eer"],
        "eer_threshold": tool["eer_th"],
        "auc": tool["auc"],
        "decidability": tool["decidability"],
        "genuine_mean": tool["gmean"],
        "genuine_std": tool["gstd"],
        "impostor_mean": tool["imean"],
        "impostor_std": tool["istd"],
    }
    actual = dataclasses.asdict(found)
    for name, value in wanted.items():
        assert actual[name] == pytest.approx(value, abs=1e-9), name


def score_lists(least):
    """Scores with and without ties."""
    fine = arrays(np.float64, st.integers(least, 30), elements=st.floats(-1, 1, width=32))
    return fine | fine.map(lambda scores: scores.round(1))


@settings(max_examples=100, deadline=None)
@given(genuine=score_lists(2), impostor=score_lists(2))
def test_agrees_with_pyeer(genuine, impostor):
    found = figures(genuine, impostor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pyeer warns of inverted scores
        _, fmr, fnmr = pyeer.calculate_roc(genuine, impostor)
        auc = pyeer.calculate_roc_auc(fmr, fnmr)
        eer = pyeer.get_eer_values(fmr, fnmr)[-1]
    for name, target in {"fmr100_closest": 0.01, "fmr1000_closest": 0.001, "zero_fmr_closest": 0}.items():
        assert getattr(found, name) == pytest.approx(pyeer.get_fmr_op(fmr, fnmr, target)[1], abs=1e-9), name
    # pyeer's curve ends at the highest score: the corner beyond it is added here
    assert found.auc == pytest.approx(auc + fmr[-1] * (1 - fnmr[-1]) / 2, abs=1e-9)
    if (fmr <= fnmr).any():  # otherwise the curves do not meet, for which pyeer says 1
        assert found.eer == pytest.approx(eer, abs=1e-9)
    if genuine.std() + impostor.std() > 1e-9:
        decidability = pyeer.get_decidability_value(
            genuine.mean(), genuine.std(), impostor.mean(), impostor.std()
        )
        assert found.decidability == pytest.approx(decidability, rel=1e-9, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(genuine=score_lists(1), impostor=score_lists(1))
def test_rates_by_their_definition(genuine, impostor):
    found = figures(genuine, impostor)
    rates = error_rates(Distribution.of(genuine), Distribution.of(impostor))
    for threshold, fmr, fnmr in zip(*rates, strict=True):
        assert fmr == (impostor >= threshold).mean() and fnmr == (genuine < threshold).mean()
    for limit, value in ((0.01, found.fmr100), (0.001, found.fmr1000), (0.0, found.zero_fmr)):
        assert value == min(n for m, n in zip(rates.fmr, rates.fnmr, strict=True) if m <= limit)
    assert 0 <= found.fmr100 <= found.fmr1000 <= found.zero_fmr <= 1
    wins = (genuine[:, None] > impostor).mean() + (genuine[:, None] == impostor).mean() / 2
    assert found.auc == pytest.approx(wins, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(genuine=score_lists(1), impostor=score_lists(1), rate=st.floats(0, 1), threshold=st.floats(-1.1, 1.1))
def test_any_operating_point_by_its_definition(genuine, impostor, rate, threshold):
    rates = error_rates(Distribution.of(genuine), Distribution.of(impostor))
    at = point_at(rates, threshold)
    assert at == (threshold, (impostor >= threshold).mean(), (genuine < threshold).mean())
    most, closest = point_at_most(rates, rate), point_closest(rates, rate)
    assert most.fmr <= rate and point_at(rates, most.threshold) == most
    lower = rates.thresholds[rates.thresholds < most.threshold]
    assert all(point_at(rates, one).fmr > rate for one in lower)
    seen = np.unique(np.concatenate([genuine, impostor]))
    assert abs(closest.fmr - rate) == min(abs((impostor >= one).mean() - rate) for one in seen)
    assert closest.threshold in seen and point_at(rates, closest.threshold) == closest


def binned(scores):
    """The distribution of scores as it is left when they are only counted in bins."""
    levels, counts = np.unique(levels_of(bins_of(scores)), return_counts=True)
    return Distribution(levels, counts.astype(np.int64), scores.mean(), scores.std(), 2 / BINS)


def crowded(least):
    """Scores of which many share a bin, and few do not."""
    near = arrays(
        np.float64, st.integers(least, 30), elements=st.integers(0, 40).map(lambda n: n / 10 / BINS)
    )
    return near | score_lists(least) | near.map(lambda scores: scores - 1)


@settings(max_examples=200, deadline=None)
@given(genuine=crowded(1), impostor=crowded(1))
def test_binned_scores_give_the_eer_within_its_bound(genuine, impostor):
    exact, coarse = figures(genuine, impostor), separability(binned(genuine), binned(impostor))
    assert exact.eer_bound == 0
    assert abs(coarse.eer - exact.eer) <= coarse.eer_bound + 1e-15
    rates = error_rates(binned(genuine), binned(impostor))
    for name in ("fmr100", "fmr1000", "zero_fmr"):
        # at the edge above, and no further than the genuine scores of one bin are many
        worse = getattr(coarse, name) - getattr(exact, name)
        assert worse >= -1e-15 and worse <= np.diff(rates.fnmr, append=1.0).max() + 1e-15


@settings(max_examples=200, deadline=None)
@given(genuine=score_lists(1), impostor=score_lists(1))
def test_bins_with_one_score_each_lose_nothing(genuine, impostor):
    seen = np.unique(np.concatenate([genuine, impostor]))
    assume(len(np.unique(bins_of(seen))) == len(seen))
    exact, coarse = figures(genuine, impostor), separability(binned(genuine), binned(impostor))
    for name in ("eer", "fmr100", "fmr1000", "zero_fmr", "fmr100_closest", "fmr1000_closest", "auc", "fdr"):
        assert getattr(coarse, name) == pytest.approx(getattr(exact, name), abs=1e-12), name
    assert coarse.eer_threshold == pytest.approx(exact.eer_threshold, abs=2 / BINS)


@pytest.mark.parametrize(
    "genuine, impostor", [((0.36, 0.13), (0.02, 0.06)), ((0.54, 0.21), (0.0, 0.07)), ((0.1, 0.05), (0, 0.05))]
)
def test_the_eer_of_bins_is_within_a_hundred_thousandth_at_densities_of_recognisers(genuine, impostor):
    """Means and deviations of the published sets, and one that is hardly separated."""
    random = np.random.default_rng(0)
    scores = [np.clip(random.normal(*kind, 500_000), -1, 1) for kind in (genuine, impostor)]
    exact, coarse = figures(*scores), separability(*map(binned, scores))
    assert abs(coarse.eer - exact.eer) <= coarse.eer_bound <= 1e-5
    assert abs(coarse.fmr1000 - exact.fmr1000) <= 1e-5 and abs(coarse.auc - exact.auc) <= 1e-5


def test_perfect_and_inverted_separation():
    perfect = figures([0.8, 0.9], [0.0, 0.1])
    assert (perfect.eer, perfect.zero_fmr, perfect.auc) == (0, 0, 1)
    inverted = figures([0.0, 0.1], [0.8, 0.9])
    assert (inverted.eer, inverted.zero_fmr, inverted.auc) == (1, 1, 0)


def test_normal_scores_have_the_textbook_figures():
    random = np.random.default_rng(0)
    found = figures(random.normal(0.5, 0.1, 400_000), random.normal(0.0, 0.1, 400_000))
    assert found.fdr == pytest.approx(0.25 / 0.02, rel=0.01)
    # Phi(-2.5): the threshold halfway is 2.5 deviations from both means
    assert found.eer == pytest.approx(0.5 * math.erfc(2.5 / math.sqrt(2)), rel=0.05)
    assert found.eer_threshold == pytest.approx(0.25, abs=0.005)


def test_degenerate_ratio():
    assert fisher_discriminant_ratio(0.5, 0, 0.1, 0) == math.inf
    assert fisher_discriminant_ratio(0.5, 0, 0.5, 0) == 0


@pytest.mark.parametrize("genuine, impostor", [([], [0.1]), ([0.1], [])])
def test_nothing_to_compare_is_an_error(genuine, impostor):
    with pytest.raises(NegFaceDiffError, match="at least two identities"):
        figures(genuine, impostor)


def faces(noise, identities=20, replicates=5, seed=0, width=32):
    """Embeddings around one centre an identity, with some images masked."""
    random = np.random.default_rng(seed)
    centres = uniform(seed, np.arange(identities), width)
    embeddings = centres[:, None] + noise * random.standard_normal((identities, replicates, width))
    return embeddings.astype(np.float32), random.random((identities, replicates)) > 0.2, centres


def cosine(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return a @ b / np.sqrt((a @ a) * (b @ b))

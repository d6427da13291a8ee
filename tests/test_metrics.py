"""Separability figures: reference outputs, the tool pyeer on random scores, and closed forms."""

import dataclasses
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pyeer import eer_stats as pyeer

from negfacediff_core.contexts import uniform
from negfacediff_core.errors import ContextsError, NegFaceDiffError
from negfacediff_core.evaluation.identities import bootstrap_fdr, context_fidelity, identity_statistics
from negfacediff_core.evaluation.metrics import error_rates, fisher_discriminant_ratio, separability
from negfacediff_core.evaluation.scores import Distribution, compare

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


def test_bootstrap_without_resampling_noise_is_the_fdr():
    """Identities that are all drawn equally often would give the FDR itself; the draws scatter around it."""
    embeddings, valid, _ = faces(0.15)
    fdr = separability(*compare(embeddings, valid)).fdr
    draws = bootstrap_fdr(embeddings, valid, 400, seed=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert low < fdr < high and draws.shape == (400,)
    np.testing.assert_array_equal(draws, bootstrap_fdr(embeddings, valid, 400, seed=1))


def test_bootstrap_draw_equals_an_explicit_resample():
    embeddings, valid, _ = faces(0.2, identities=6, replicates=4)
    picks = np.random.Generator(np.random.Philox(3)).integers(0, 6, size=(5, 6))
    for pick, found in zip(picks, bootstrap_fdr(embeddings, valid, 5, seed=3), strict=True):
        genuine, impostor = [], []
        for place, a in enumerate(pick):
            for first in np.flatnonzero(valid[a]):
                genuine += [
                    cosine(embeddings[a, first], embeddings[a, r])
                    for r in np.flatnonzero(valid[a])
                    if r > first
                ]
                for b in pick[place + 1 :]:
                    if a != b:
                        impostor += [
                            cosine(embeddings[a, first], embeddings[b, r]) for r in np.flatnonzero(valid[b])
                        ]
        assert found == pytest.approx(figures(genuine, impostor).fdr, rel=1e-6)


def cosine(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return a @ b / np.sqrt((a @ a) * (b @ b))


def test_interval_narrows_with_more_identities():
    spread = []
    for identities in (10, 80):
        embeddings, valid, _ = faces(0.15, identities)
        draws = bootstrap_fdr(embeddings, valid, 200, seed=0)
        spread.append(draws.std() / draws.mean())
    assert spread[1] < 0.6 * spread[0]


def test_fidelity_to_the_context():
    embeddings, valid, contexts = faces(0.0)
    exact = context_fidelity(embeddings, valid, contexts)
    assert exact.rank1 == 1 and exact.mean == pytest.approx(1) and exact.std == pytest.approx(0, abs=1e-6)
    embeddings[3, valid[3].argmax()] = contexts[5]
    shown = context_fidelity(embeddings, valid, contexts, block=7)
    assert shown.rank1 == pytest.approx(1 - 1 / valid.sum())
    assert np.isnan(context_fidelity(embeddings, np.zeros_like(valid), contexts).rank1)
    with pytest.raises(ContextsError, match="same identities and width"):
        context_fidelity(embeddings, valid, contexts[:, :-1])


def test_identity_statistics_against_plain_loops():
    embeddings, valid, _ = faces(0.2)
    valid[4] = False
    valid[6] = np.arange(5) == 2
    columns = identity_statistics(embeddings, valid, block=3)
    assert list(columns["images"]) == list(valid.sum(axis=1))
    for identity in (0, 9):
        rows = np.flatnonzero(valid[identity])
        pairs = [
            cosine(embeddings[identity, a], embeddings[identity, b]) for a in rows for b in rows if a < b
        ]
        assert columns["genuine_mean"][identity] == pytest.approx(np.mean(pairs))
    assert np.isnan(columns["genuine_mean"][[4, 6]]).all()
    assert columns["nearest"][4] == -1 and np.isnan(columns["nearest_cosine"][4])
    unit = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
    centres = (unit * valid[..., None]).sum(axis=1)
    similar = [-2 if j in (0, 4) else cosine(centres[0], centres[j]) for j in range(20)]
    assert columns["nearest"][0] == int(np.argmax(similar))
    assert columns["nearest_cosine"][0] == pytest.approx(max(similar), abs=1e-6)

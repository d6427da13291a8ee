"""The bootstrap over identities: explicit resamples, subsets of large sets, and paired differences."""

import numpy as np
import pytest

from negfacediff_core.evaluation import bootstrap as module
from negfacediff_core.evaluation import scores
from negfacediff_core.evaluation.bootstrap import FIGURES, Resampled, bootstrap, draw_weights, subsets_of
from negfacediff_core.evaluation.metrics import separability
from negfacediff_core.evaluation.scores import Distribution, compare


def faces(noise, identities=20, replicates=5, seed=0, width=32):
    """Embeddings around one centre an identity, with some images masked."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((identities, 1, width)) / np.sqrt(width)
    embeddings = centres + noise * random.standard_normal((identities, replicates, width))
    return embeddings.astype(np.float32), random.random((identities, replicates)) > 0.2


def resampled(embeddings, valid, draws=200, seed=0, protocol="full"):
    return bootstrap(lambda chosen: (embeddings[chosen], valid[chosen]), valid.shape, draws, seed, protocol)


def figures_of(scores):
    found = separability(*scores)
    return np.array([getattr(found, name) for name in FIGURES])


@pytest.mark.parametrize("protocol, share", [("full", 1.0), ("paper", 0.2)])
def test_intervals_cover_the_truth_about_as_often_as_they_say(protocol, share, monkeypatch):
    """FDR and EER of 36 simulated sets of 30 identities each, against those of one of 600."""
    monkeypatch.setattr(scores, "PAPER_IMPOSTOR_SHARE", share)
    monkeypatch.setattr(module, "LEVELS", 256)
    truth = figures_of(compare(*faces(0.15, 600, 5, seed=999)))
    covered = []
    for seed in range(36):
        found = resampled(*faces(0.15, 30, 5, seed=seed), draws=60, seed=seed, protocol=protocol)
        low, high = found.interval(found.estimate[0]).T
        covered.append((low <= truth) & (truth <= high))
    fdr, eer = np.mean(covered, axis=0)[:2]
    # 95% in the limit. Of 100 such sets 90 and 94% are covered by FDR, 80 and 82% by EER, whose draws move in
    # steps where identities are so few; 36 sets tell it to within 13% (two deviations)
    assert fdr >= 0.8 and eer >= 0.68


def cosine(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return a @ b / np.sqrt((a @ a) * (b @ b))


@pytest.mark.parametrize("protocol", ["full", "paper"])
def test_a_draw_equals_an_explicit_resample(protocol, monkeypatch):
    monkeypatch.setattr(scores, "PAPER_IMPOSTOR_SHARE", 0.6)
    embeddings, valid = faces(0.3, identities=6, replicates=4)
    _, compared = scores.select(valid, protocol, 3)
    weights = draw_weights(6, 6, 5, seed=4).astype(int)
    assert (weights != 1).any(axis=1).all()
    found = resampled(embeddings, valid, 5, 3, protocol)  # the first subset draws from the stream after
    for drawn, figures in zip(weights, found.draws[0], strict=True):
        pick = np.repeat(np.arange(6), drawn)
        genuine, impostor = [], []
        for place, a in enumerate(pick):
            for first in np.flatnonzero(valid[a]):
                genuine += [
                    cosine(embeddings[a, first], embeddings[a, r])
                    for r in np.flatnonzero(valid[a])
                    if r > first
                ]
                for b in pick[place + 1 :]:
                    if a != b and (compared is None or compared[a, b]):
                        impostor += [
                            cosine(embeddings[a, first], embeddings[b, r]) for r in np.flatnonzero(valid[b])
                        ]
        # copies of a score differ by a rounding where they are computed apart
        explicit = (Distribution.of(np.round(kind, 12)) for kind in (genuine, impostor))
        assert figures == pytest.approx(figures_of(explicit), abs=1e-6)


def test_a_small_set_is_resampled_whole_about_its_figures():
    embeddings, valid = faces(0.15)
    figures = figures_of(compare(embeddings, valid))
    found = resampled(embeddings, valid, 400)
    assert found.estimate.shape == (1, 4) and found.draws.shape == (1, 400, 4)
    assert found.estimate[0] == pytest.approx(figures, abs=1e-6)
    low, high = found.interval(figures).T
    np.testing.assert_allclose([low, high], np.quantile(found.draws[0], [0.025, 0.975], axis=0), atol=1e-6)
    assert low[0] < figures[0] < high[0]
    np.testing.assert_array_equal(found.draws, resampled(embeddings, valid, 400).draws)


def test_intervals_narrow_with_more_identities():
    spread = []
    for identities in (10, 80):
        draws = resampled(*faces(0.15, identities)).draws[0, :, 0]
        spread.append(draws.std() / draws.mean())
    assert spread[1] < 0.6 * spread[0]


def test_subsets_of_a_large_set_scatter_as_the_whole_does(monkeypatch):
    """A bag of little bootstraps of 4 x 30 of 120 identities against the plain bootstrap of all."""
    embeddings, valid = faces(0.15, identities=120, replicates=4)
    whole = resampled(embeddings, valid)
    monkeypatch.setattr(module, "MOST_IDENTITIES", 30)
    parts = resampled(embeddings, valid)
    assert len(parts.estimate) == 4 and len(whole.estimate) == 1
    figures = whole.estimate[0]
    wide, narrow = (np.diff(found.interval(figures)).ravel() for found in (whole, parts))
    np.testing.assert_allclose(narrow[:3], wide[:3], rtol=0.25)
    # so strict a rate rests on seven pairs of a subset this small, and scatters more
    assert 0.8 < narrow[3] / wide[3] < 2
    low, high = parts.interval(figures).T
    assert (low < figures).all() and (figures < high).all()


def test_joined_cells_change_rates_by_little(monkeypatch):
    embeddings, valid = faces(0.25, identities=60)
    fine = resampled(embeddings, valid, 50)
    monkeypatch.setattr(module, "LEVELS", 512)
    coarse = resampled(embeddings, valid, 50)
    np.testing.assert_allclose(coarse.draws[..., 0], fine.draws[..., 0], rtol=1e-12)
    # among some 400 genuine pairs, of which a draw takes one up to five times
    off = np.abs(coarse.draws[..., 1:] - fine.draws[..., 1:])
    assert off.mean() < 0.5 / 400 and off.max() < 6 / 400


@pytest.mark.parametrize(
    "identities, images, subsets, size", [(50, 5, 1, 50), (2000, 50, 4, 320), (500, 1, 1, 320)]
)
def test_subsets_are_disjoint_and_as_large_as_they_may_be(identities, images, subsets, size):
    chosen = subsets_of(identities, images, seed=0)
    assert len(chosen) == subsets and all(len(part) == size for part in chosen)
    every = np.concatenate(chosen)
    assert len(np.unique(every)) == len(every) and every.max() < identities
    assert all((np.diff(part) > 0).all() for part in chosen)


def test_subsets_of_many_images_are_of_fewer_identities():
    assert [len(part) for part in subsets_of(100, 1000, seed=0)] == [16] * 4


def test_weights_draw_as_many_identities_as_the_set_has():
    weights = draw_weights(1000, 50, 400, seed=1)
    assert (weights.sum(axis=1) == 1000).all()
    assert weights.mean() == 20 and weights.var() == pytest.approx(1000 / 50 * (1 - 1 / 50), rel=0.05)


def test_pairing_removes_what_two_datasets_share():
    """The same identities, one set with more noise: the difference is surer than either figure."""
    one, other = (resampled(*faces(noise, identities=60)) for noise in (0.15, 0.16))
    paired = np.diff(one.less(other).interval(one.estimate[0] - other.estimate[0]))[0, 0]
    apart = np.hypot(*(np.diff(found.interval(found.estimate[0]))[0, 0] for found in (one, other)))
    assert paired < 0.6 * apart


def test_draws_without_pairs_have_no_figure():
    embeddings, valid = faces(0.2, identities=2, replicates=3)
    valid[:] = True
    found = resampled(embeddings, valid, 60)
    single = (draw_weights(2, 2, 60, seed=1) == 0).any(axis=1)
    assert single.any() and (np.isnan(found.draws[0]).any(axis=1) == single).all()
    assert np.isfinite(found.interval(found.estimate[0])).all()
    valid[:, 1:] = False
    assert np.isnan(resampled(embeddings, valid, 10).interval(np.zeros(4))).all()
    valid[:] = False
    assert np.isnan(resampled(embeddings, valid, 10).estimate).all()


def test_an_interval_of_several_subsets_is_the_mean_of_their_offsets():
    draws = np.stack(
        [np.tile(np.arange(101.0)[:, None], (1, 4)), np.tile(np.arange(101.0)[:, None] * 3, (1, 4))]
    )
    found = Resampled(np.stack([np.full(4, 50.0), np.full(4, 150.0)]), draws)
    np.testing.assert_allclose(found.interval(np.full(4, 10.0), confidence=0.9), [[10 - 90, 10 + 90]] * 4)


def test_the_paper_protocol_resamples_its_own_identities_and_no_others(monkeypatch):
    for place in (scores, module):
        monkeypatch.setattr(place, "PAPER_IDENTITIES", 12)
    monkeypatch.setattr(scores, "PAPER_IMPOSTOR_SHARE", 0.5)
    embeddings, valid = faces(0.15)
    figures = figures_of(compare(embeddings, valid, "paper", seed=5))
    found = resampled(embeddings, valid, 100, 5, "paper")
    assert found.estimate.shape == (1, 4)
    assert found.estimate[0] == pytest.approx(figures, abs=1e-6)
    again = resampled(embeddings[:12], valid[:12], 100, 5, "paper")
    np.testing.assert_array_equal(found.draws, again.draws)

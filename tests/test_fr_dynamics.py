"""Training dynamics and the pruning that follows from them."""

import csv

import numpy as np
import pytest
from crop_folders import nobody, save_crops, tiny_job
from hypothesis import given, settings
from hypothesis import strategies as st

from negfacediff_core.errors import ConfigError
from negfacediff_core.recognition.dynamics import (
    LEAST,
    RIGHT,
    UNSEEN,
    WRONG,
    dynamic_uncertainty,
    last_seen,
    mislabelled,
    most_uncertain,
    read_dynamics,
    spread_probabilities,
)
from negfacediff_core.recognition.fit import fit
from negfacediff_core.recognition.pruning import prune_training

NONE = np.nan


def test_dynamic_uncertainty_is_the_mean_of_the_deviations_in_windows():
    random = np.random.default_rng(0)
    probability = random.random((14, 5))
    expected = np.mean([probability[start : start + 10].std(axis=0, ddof=1) for start in range(5)], axis=0)
    np.testing.assert_allclose(dynamic_uncertainty(probability), expected)
    np.testing.assert_allclose(dynamic_uncertainty(probability[:4]), probability[:4].std(axis=0, ddof=1))
    assert dynamic_uncertainty(np.full((12, 1), 0.7))[0] == pytest.approx(0)
    with pytest.raises(ConfigError, match="two epochs"):
        dynamic_uncertainty(probability[:1])


def test_epochs_without_an_image_are_left_out_of_its_uncertainty():
    probability = np.array([[0.1, NONE, 0.3], [0.5, 0.2, NONE], [0.9, 0.6, NONE]])
    found = dynamic_uncertainty(probability)
    np.testing.assert_allclose(found[:2], [0.4, np.std([0.2, 0.6], ddof=1)])
    assert np.isnan(found[2])


def test_a_share_of_the_most_uncertain_is_kept_and_what_is_unknown():
    assert most_uncertain(np.array([0.1, 0.5, NONE, 0.4, 0.2]), 0.5).tolist() == [0, 1, 1, 1, 0]


def kept_by_hand(falling, apart):
    """DiffProb's own words, for one identity of more than five images of different probabilities."""
    while True:
        kept = [0]
        for place in range(1, len(falling)):
            if falling[kept[-1]] - falling[place] > apart:
                kept.append(place)
        if len(kept) >= LEAST:
            return kept
        apart *= 0.99


@given(
    st.lists(st.integers(0, 10_000), min_size=6, max_size=30, unique=True),
    st.floats(0.001, 0.5),
    st.randoms(),
)
@settings(max_examples=60)
def test_diffprob_keeps_what_the_paper_says(numbers, apart, order):
    falling = np.sort(np.array(numbers) / 10_000)[::-1]
    places = list(range(len(falling)))
    order.shuffle(places)
    kept = spread_probabilities(falling[places], np.zeros(len(places), np.int64), apart)
    assert sorted(np.array(places)[kept]) == kept_by_hand(falling, apart)


def test_diffprob_looks_at_each_identity_alone_and_keeps_the_unknown():
    labels = np.array([0, 1] * 6 + [2, 2, 2])
    probability = np.array([0.9, 0.1] + [0.5, 0.4, 0.3, 0.3, 0.2, 0.25, 0.1, 0.35, 0.0, NONE] + [0.5] * 3)
    both = spread_probabilities(probability, labels, 0.05)
    for label in range(3):
        own = labels == label
        alone = spread_probabilities(probability[own], np.zeros(own.sum(), np.int64), 0.05)
        assert both[own].tolist() == alone.tolist()
    assert both[labels == 2].all()  # no more than five
    assert both[np.isnan(probability)].all()
    same = spread_probabilities(np.full(9, 0.99), np.zeros(9, np.int64), 0.1)
    assert same.sum() == LEAST
    with pytest.raises(ConfigError, match=r"in \(0, 1\)"):
        spread_probabilities(probability, labels, 0.0)


def test_what_an_image_last_looked_like_counts():
    outcome = np.array([[WRONG, RIGHT, WRONG, UNSEEN], [RIGHT, WRONG, UNSEEN, UNSEEN]], np.uint8)
    assert mislabelled(outcome).tolist() == [False, True, True, False]
    probability = np.array([[0.1, NONE, NONE], [0.2, 0.5, NONE]])
    np.testing.assert_array_equal(last_seen(probability), [0.2, 0.5, NONE])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a training of three epochs, in which every image but a few is seen in each."""
    folder = tmp_path_factory.mktemp("trained")
    job = tiny_job(save_crops(folder / "set"), folder / "out", epochs=3)
    fit(job, nobody)
    return job


def test_a_training_records_every_image_of_every_epoch(trained):
    dynamics = read_dynamics(trained.folder)
    assert [name for name, *_ in dynamics.images] == list(trained.training.names)
    assert (dynamics.labels == trained.training.labels).all()
    seen = dynamics.outcome != UNSEEN
    assert (seen.sum(axis=1) == trained.steps * trained.batch).all()
    assert (np.isfinite(dynamics.probability) == seen).all()
    assert (dynamics.probability[seen] > 0).all() and (dynamics.probability[seen] <= 1).all()
    with (trained.folder / "curves.csv").open() as file:
        accuracy = [float(row["accuracy"]) for row in csv.DictReader(file)]
    found = [(row == RIGHT).sum() / (row != UNSEEN).sum() for row in dynamics.outcome]
    assert accuracy == pytest.approx(found, abs=1e-5)


@pytest.mark.parametrize("rule", ["dynunc", "diffprob", "none"])
def test_pruning_writes_a_filter(trained, rule):
    whole = prune_training(trained.folder, "none", 1.0, 0.1, clean=False)
    assert (whole.images, whole.held_out) == (len(trained.training), len(trained.held_out))
    pruned = prune_training(trained.folder, rule, 0.5, 0.1, clean=True)
    names = {row["image"] for row in csv.DictReader(pruned.text.splitlines())}
    assert names >= set(trained.held_out.names)
    assert len(names) == pruned.images + pruned.held_out
    dynamics = read_dynamics(trained.folder)
    wrong = {dynamics.images[i][0] for i in np.flatnonzero(mislabelled(dynamics.outcome))}
    assert pruned.mislabelled == len(wrong) > 0 and not wrong & names
    if rule == "none":
        assert pruned.images == len(trained.training) - len(wrong)


def test_a_folder_without_dynamics_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has finished an epoch"):
        prune_training(tmp_path, "dynunc", 0.5, 0.1, clean=True)

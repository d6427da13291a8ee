"""Training dynamics and the pruning that follows from them."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from crop_folders import TINY, nobody, save_crops, tiny_job
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.cli import app
from negfacediff_core.errors import ConfigError, DamagedError, StoppedError
from negfacediff_core.recognition.backbones import build_backbone
from negfacediff_core.recognition.dynamics import (
    LEAST,
    RIGHT,
    UNSEEN,
    dynamic_uncertainty,
    most_uncertain,
    read_dynamics,
    read_final,
    spread_probabilities,
)
from negfacediff_core.recognition.fit import fit
from negfacediff_core.recognition.pruning import prune_training
from negfacediff_core.stopping import ended_when
from negfacediff_core.tensor_files import read_tensors

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


def test_of_each_identity_a_share_of_the_most_uncertain_is_kept_and_what_is_unknown():
    scores = np.arange(20.0)
    labels = np.repeat([0, 1], [12, 8])
    kept = most_uncertain(scores, labels, 0.7)
    # 8 of 12, and 5.6 of 8: rounded down, the highest
    assert np.flatnonzero(kept).tolist() == [*range(4, 12), *range(15, 20)]
    assert [most_uncertain(scores, labels, 0.1)[labels == one].sum() for one in (0, 1)] == [LEAST, LEAST]
    assert most_uncertain(np.arange(100.0), np.zeros(100, int), 0.29).sum() == 29
    few = np.array([0.1, NONE, 0.3])
    assert most_uncertain(few, np.array([0, 0, 0]), 0.1).all()
    assert most_uncertain(np.array([0.1, 0.5, NONE, 0.4]), np.zeros(4, int), 0.5, least=1).tolist() == [
        False,
        True,
        True,
        False,
    ]


def kept_by_hand(falling, apart):
    """DiffProb as its code has it, for one identity of more than five images."""
    for step in range(100):
        kept = [0]
        for place in range(1, len(falling)):
            if falling[kept[-1]] - falling[place] > (1 - 0.01 * step) * apart:
                kept.append(place)
        if len(kept) >= LEAST:
            return kept
    return list(range(len(falling)))


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
    assert spread_probabilities(np.full(9, 0.99), np.zeros(9, np.int64), 0.1).all()
    with pytest.raises(ConfigError, match=r"in \(0, 1\)"):
        spread_probabilities(probability, labels, 0.0)


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


def test_in_the_end_the_trained_network_looks_at_every_image_unchanged(trained):
    state = read_tensors(trained.folder / "state.pt")["module"]
    network = build_backbone(TINY)
    network.load_state_dict(
        {name[9:]: value for name, value in state.items() if name.startswith("backbone.")}
    )
    crops = torch.from_numpy(trained.training.read(np.arange(len(trained.training)))).permute(0, 3, 1, 2)
    with torch.inference_mode():
        embeddings = network.eval()(crops / 127.5 - 1)
    normalised = [torch.nn.functional.normalize(one) for one in (embeddings, state["head.centres"])]
    cosine = (normalised[0] @ normalised[1].T).double()
    labels = torch.from_numpy(trained.training.labels)
    logits = trained.recipe.scale * cosine
    logits[torch.arange(len(labels)), labels] -= trained.recipe.scale * trained.recipe.head_margin
    final = read_final(trained.folder)
    expected = logits.softmax(1)[torch.arange(len(labels)), labels]
    np.testing.assert_allclose(final.probability, expected, rtol=1e-3)
    assert (final.mislabelled == (cosine.argmax(1) != labels).numpy()).all()
    last = read_dynamics(trained.folder).probability[-1]
    assert not np.allclose(last[np.isfinite(last)], final.probability[np.isfinite(last)], rtol=0.05)


def test_a_training_that_was_stopped_at_its_last_look_takes_it_again(trained, tmp_path):
    folder = shutil.copytree(trained.folder, tmp_path / "again")
    job = tiny_job(trained.folder.parent / "set", folder, epochs=3)
    (folder / "dynamics" / "final.npz").unlink()
    state = (folder / "state.pt").read_bytes()
    with ended_when(lambda: True), pytest.raises(StoppedError, match="to go on with"):
        fit(job, nobody)
    assert read_final(folder) is None
    fit(job, nobody)
    for one, other in zip(read_final(folder), read_final(trained.folder), strict=True):
        assert (one == other).all()
    assert (folder / "state.pt").read_bytes() == state


@pytest.mark.parametrize("rule", ["dynunc", "diffprob", "none"])
def test_pruning_writes_a_filter(trained, rule):
    pruned = prune_training(trained.folder, rule, 0.5, 0.1, clean=True)
    names = {row["image"] for row in csv.DictReader(pruned.text.splitlines())}
    assert names >= set(trained.held_out.names) and pruned.held_out == len(trained.held_out)
    assert len(names) == pruned.images + pruned.held_out
    kept = [name in names for name in trained.training.names]
    assert pruned.identities - pruned.lost == len(np.unique(trained.training.labels[kept]))
    assert (pruned.trained, pruned.identities, pruned.epochs, pruned.planned) == (len(kept), 9, 3, 3)
    wrong = {trained.training.names[i] for i in np.flatnonzero(read_final(trained.folder).mislabelled)}
    assert pruned.mislabelled == len(wrong) > 0 and not wrong & names
    if rule == "none":
        assert pruned.images == len(trained.training) - len(wrong)


def test_diffprob_and_cleaning_go_by_what_the_trained_network_says(trained, tmp_path):
    folder = shutil.copytree(trained.folder, tmp_path / "other")
    count = len(trained.training)
    probability = np.random.default_rng(0).random(count).astype(np.float32)
    outcome = np.full(count, RIGHT, np.uint8)
    np.savez(folder / "dynamics" / "final.npz", log_probability=np.log(probability), outcome=outcome)
    description = json.loads((folder / "training.json").read_text())
    description["origin"]["samples"] = "those of far"
    (folder / "training.json").write_text(json.dumps(description))
    pruned = prune_training(folder, "diffprob", 1.0, 0.1, clean=True)
    expected = spread_probabilities(probability.astype(np.float64), trained.training.labels, 0.1)
    rows = list(csv.DictReader(pruned.text.splitlines()))
    assert {row["samples"] for row in rows} == {"those of far"}
    names = {row["image"] for row in rows}
    assert names - set(trained.held_out.names) == set(np.array(trained.training.names)[expected])
    assert pruned.mislabelled == 0


def test_a_training_that_is_not_over_is_told(trained, tmp_path, capsys):
    folder = shutil.copytree(trained.folder, tmp_path / "begun")
    for name in ("final.npz", "epoch-0003.npz"):
        (folder / "dynamics" / name).unlink()
    for rule, clean in (("diffprob", False), ("dynunc", True), ("none", True)):
        with pytest.raises(ConfigError, match=r"after 2 of 3 epochs.*Go on with the training"):
            prune_training(folder, rule, 0.5, 0.1, clean)
    kept = str(tmp_path / "kept.csv")
    app(["prune", str(folder), "--out", kept], standalone_mode=False)
    written = capsys.readouterr()
    assert "36 of 36 images kept, of 9 of 9 identities; and 12 images" in written.out
    assert "first 2 of 3 epochs" in written.err
    app(["prune", str(trained.folder), "--rule", "none", "--clean", "--out", kept], standalone_mode=False)
    written = capsys.readouterr()
    assert "look like another identity: left out." in written.out and not written.err
    with pytest.raises(ConfigError, match="add --clean"):
        prune_training(trained.folder, "none", 0.5, 0.1, clean=False)


def test_a_folder_without_dynamics_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has finished an epoch"):
        prune_training(tmp_path, "dynunc", 0.5, 0.1, clean=True)


@pytest.mark.parametrize("content", [None, b"", b"none"])
@pytest.mark.parametrize("name", ["images.csv", "held_out.csv", "epoch-0002.npz", "final.npz"])
def test_damaged_dynamics_are_told(name, content, trained, tmp_path):
    folder = shutil.copytree(trained.folder, tmp_path / "damaged")
    path = folder / "dynamics" / name
    if content is not None:
        path.write_bytes(content)
    elif name == "held_out.csv":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedError, match=name):
        prune_training(folder, "diffprob", 0.5, 0.1, clean=True)

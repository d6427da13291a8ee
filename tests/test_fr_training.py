"""Training recognisers: interrupted and continued, chosen, refused, exported."""

import csv
import dataclasses
import fcntl
import json
import math
import os
import resource
from itertools import count

import numpy as np
import pytest
import torch
from crop_folders import EXECUTION, RECIPE, TINY, crops, nobody, save_crops, tiny_job

from negfacediff_core.errors import (
    ConfigError,
    NegFaceDiffError,
    PlaceError,
    StoppedError,
    StoreError,
    WeightsError,
)
from negfacediff_core.faces.embed import load_embedder
from negfacediff_core.faces.packs import open_file
from negfacediff_core.images import to_float
from negfacediff_core.recognition import fit as loop
from negfacediff_core.recognition import training_job
from negfacediff_core.recognition.classifier import MarginHead
from negfacediff_core.recognition.course import Position, judged, rate_at
from negfacediff_core.recognition.export import export_forms, load_trained
from negfacediff_core.recognition.fit import fit
from negfacediff_core.recognition.recipe import Head, RecogniserConfig, TrainingExecution
from negfacediff_core.recognition.set_openers import open_set
from negfacediff_core.recognition.training_job import (
    architecture_of,
    check_folder,
    claim,
    owned,
    plan_training,
    starting_network,
)
from negfacediff_core.stopping import ended_when
from negfacediff_core.tensor_files import read_tensors, write_tensors

ALWAYS = EXECUTION.model_copy(update={"checkpoint_seconds": 0.0})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Twelve identities, four crops of each."""
    return save_crops(tmp_path_factory.mktemp("crops") / "set")


class Interrupted(BaseException):
    """What a killed process leaves looks the same on disk."""


def interrupt_at(images):
    """A progress that ends the training once so many images are seen."""

    def progress(done, total):
        if done == images:
            raise Interrupted

    return progress


def equal(one, other):
    """Whether two states hold the same, bit for bit, but for the time that it took."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        timed = {"seconds", "images_per_second", "waited"}
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one.keys() - timed)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize(
    "recipe",
    [
        {"head": "adaface", "margin": 0.4, "operations": 2},
        {"head": "elasticface", "accumulate": 2, "schedule": "plateau", "patience": 1},
        {"precision": "bf16"},
    ],
    ids=["adaface", "elasticface in two parts", "bf16"],
)
def test_a_training_that_was_interrupted_equals_one_that_was_not(
    source, tmp_path, recipe, monkeypatch, capfd
):
    monkeypatch.setattr(training_job, "fast_bfloat16", lambda: True)
    job = tiny_job(source, tmp_path / "whole", ALWAYS, **recipe)
    assert (job.steps, job.batch) == (4, 8)
    whole = fit(job, nobody)
    parts = dataclasses.replace(job, folder=tmp_path / "parts")
    for images in (24, 40):  # in the middle of the first epoch, and of the second
        with pytest.raises(Interrupted):
            fit(parts, interrupt_at(images))
        assert read_tensors(parts.folder / "state.pt")["position"]["step"] in (3, 1)
    told = []
    # another number of loading threads changes nothing
    more = parts.execution.model_copy(update={"loaders": 1})
    assert fit(dataclasses.replace(parts, execution=more), lambda *now: told.append(now)) == whole
    assert told == [(40, 64), (48, 64), (56, 64), (64, 64)]
    for name in ("state.pt", "best.pt"):
        assert equal(read_tensors(job.folder / name), read_tensors(parts.folder / name)), name
    for epoch in (1, 2):
        saved = [np.load(each.folder / "dynamics" / f"epoch-{epoch:04d}.npz") for each in (job, parts)]
        assert (saved[0]["log_probability"] == saved[1]["log_probability"]).all()
        assert (saved[0]["outcome"] == saved[1]["outcome"]).all()
    assert not list(tmp_path.rglob("*.partial"))
    assert capfd.readouterr() == ("", "")  # Fabric would tell of its precision


def test_bfloat16_is_for_processors_that_have_it(source, tmp_path, monkeypatch):
    job = tiny_job(source, tmp_path, precision="bf16")
    for fast, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(training_job, "fast_bfloat16", lambda fast=fast: fast)
        assert job.precision == precision


@pytest.mark.parametrize("asked", [2, 5], ids=["between steps", "while an epoch is judged"])
def test_a_training_that_nobody_wants_any_more_is_saved_and_goes_on(source, tmp_path, asked):
    job = tiny_job(source, tmp_path / "whole")
    whole = fit(job, nobody)
    parts = dataclasses.replace(job, folder=tmp_path / "parts")
    times = count(1)
    with ended_when(lambda: next(times) == asked), pytest.raises(StoppedError, match="to go on with"):
        fit(parts, nobody)
    # the usual checkpoint was minutes away
    assert read_tensors(parts.folder / "state.pt")["position"]["step"] == min(asked, job.steps)
    assert not list(parts.folder.glob("curves.csv"))
    assert fit(parts, nobody) == whole
    for name in ("state.pt", "best.pt"):
        assert equal(read_tensors(job.folder / name), read_tensors(parts.folder / name)), name


def test_a_finished_training_is_left_as_it_is(source, tmp_path, monkeypatch):
    job = tiny_job(source, tmp_path, epochs=1)
    first = fit(job, nobody)
    monkeypatch.setattr(loop, "run_processes", None)
    assert fit(job, nobody) == first


def test_a_training_learns_and_its_folder_tells_how(source, tmp_path):
    job = tiny_job(source, tmp_path, epochs=8)
    best = fit(job, nobody)
    rows = list(csv.DictReader((tmp_path / "curves.csv").open()))
    assert [int(row["epoch"]) for row in rows] == list(range(1, 9))
    losses = [float(row["loss"]) for row in rows]
    assert losses[-1] < 0.7 * losses[0]
    assert float(rows[-1]["accuracy"]) > max(0.5, 1.5 * float(rows[0]["accuracy"]))
    assert best["eer"] == pytest.approx(min(float(row["eer"]) for row in rows), abs=1e-6)
    assert best["eer"] < 0.3 and best["epochs"] == 8
    picture = (tmp_path / "curves.svg").read_text()
    assert picture.startswith("<svg") and "EER, held-out identities" in picture
    assert read_tensors(tmp_path / "best.pt")["scores"]["epoch"] == best["epoch"]


def test_identities_are_either_trained_on_or_held_out(source, tmp_path):
    job = tiny_job(source, tmp_path)
    folders = [{name.split("/")[0] for name in part.names} for part in (job.training, job.held_out)]
    assert [len(each) for each in folders] == [9, 3] and not folders[0] & folders[1]
    assert (job.training.classes, job.held_out.classes) == (9, 3)
    other = tiny_job(source, tmp_path, seed=1)
    assert other.held_out.names != job.held_out.names


@pytest.mark.parametrize("head", Head)
def test_every_head_gives_a_loss_and_honest_probabilities(head):
    width, classes = 8, 5
    generator = torch.Generator().manual_seed(0)
    embeddings = 3 * torch.randn(6, width, generator=generator)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    margins = MarginHead(head, width, classes, 16.0, 0.3, seed=0)
    outcome = margins(embeddings, labels, torch.Generator().manual_seed(1))
    plain = MarginHead("cosface", width, classes, 16.0, 0.0, seed=0)
    without = plain(embeddings, labels, generator)
    assert outcome.loss > without.loss
    torch.testing.assert_close(-without.log_probability.mean(), without.loss)
    torch.testing.assert_close(-outcome.log_probability.mean(), outcome.loss)
    scores = torch.nn.functional.normalize(embeddings) @ torch.nn.functional.normalize(plain.centres).T
    assert torch.equal(outcome.right, scores.argmax(1) == labels)
    again = MarginHead(head, width, classes, 16.0, 0.3, seed=0)
    sampled = again(embeddings, labels, torch.Generator().manual_seed(1), sampled=torch.arange(classes))
    assert torch.equal(sampled.loss, outcome.loss)


def test_a_sampled_subset_of_classes_leaves_the_others_alone():
    head = MarginHead("cosface", 8, 10, 16.0, 0.3, seed=0)
    embeddings = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    outcome = head(embeddings, torch.tensor([3, 7]), torch.Generator(), sampled=torch.tensor([1, 3, 7]))
    outcome.loss.backward()
    assert head.centres.grad.abs().sum(1).nonzero()[:, 0].tolist() == [1, 3, 7]


def test_adaface_looks_at_the_norms_before_they_are_made_one():
    labels, embeddings = torch.tensor([0, 1]), torch.randn(2, 8)
    losses = [
        MarginHead("adaface", 8, 5, 16.0, 0.4, seed=0)(size * embeddings, labels, torch.Generator()).loss
        for size in (1.0, 30.0)
    ]
    assert not torch.isclose(*losses)


def test_the_rate_falls_as_the_schedules_say():
    steps = 10
    recipe = RecogniserConfig(batch_size=256, drops=(3, 5))
    rates = [rate_at(recipe, Position(epoch=epoch), steps) for epoch in range(6)]
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005])
    plateau = recipe.model_copy(update={"schedule": "plateau"})
    assert rate_at(plateau, Position(epoch=30, falls=2), steps) == pytest.approx(0.0005)
    cosine = recipe.model_copy(update={"schedule": "cosine", "epochs": 4})
    assert rate_at(cosine, Position(epoch=2), steps) == pytest.approx(0.025)
    assert rate_at(cosine, Position(epoch=3, step=9), steps) < 0.0002
    warm = recipe.model_copy(update={"warmup": 2.0})
    assert rate_at(warm, Position(), steps) == pytest.approx(0.05 / 20)
    assert rate_at(warm, Position(epoch=1, step=9), steps) == pytest.approx(0.05)


def test_the_best_epoch_is_that_of_the_lowest_eer_and_of_equals_the_clearer_one():
    position = Position()
    for epoch, (eer, fdr) in enumerate([(0.2, 1.0), (0.1, 2.0), (0.1, 3.0), (0.1, 2.5), (0.3, 9.0)]):
        position = judged(dataclasses.replace(position, epoch=epoch), {"eer": eer, "fdr": fdr}, patience=2)
    assert position.best["epoch"] == 3
    assert (position.idle, position.falls) == (0, 1)


def test_plateau_ends_when_the_rate_has_fallen_often_enough(source, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "held_out_scores", lambda *_: {"eer": 0.5, "fmr100": 1.0, "fdr": 0.0})
    job = tiny_job(source, tmp_path, schedule="plateau", patience=1, epochs=20)
    result = fit(job, nobody)
    assert (result["epoch"], result["epochs"]) == (1, 5)
    rates = [float(row["learning_rate"]) for row in csv.DictReader((tmp_path / "curves.csv").open())]
    assert rates == pytest.approx([RECIPE.peak_rate * 0.1**falls for falls in (0, 0, 1, 2, 3)])


def test_another_training_is_not_mixed_in(source, tmp_path):
    fit(tiny_job(source, tmp_path, epochs=1), nobody)
    with pytest.raises(ConfigError, match="margin, seed differ"):
        fit(tiny_job(source, tmp_path, epochs=1, seed=1, margin=0.1), nobody)
    fewer = tiny_job(source, tmp_path, epochs=1)
    kept = fewer.training.chosen(np.arange(30))
    with pytest.raises(ConfigError, match="the images differ"):
        fit(dataclasses.replace(fewer, training=kept), nobody)
    others = dataclasses.replace(
        fewer.training, origin=fewer.training.origin._replace(digest="of other pixels")
    )
    with pytest.raises(ConfigError, match="the images differ"):
        fit(dataclasses.replace(fewer, training=others), nobody)
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(WeightsError, match=r"state.pt cannot be read"):
        fit(fewer, nobody)


def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    with owned(tmp_path / "out"), pytest.raises(StoreError, match="another process trains"):  # noqa: SIM117
        with owned(tmp_path / "out"):
            pass
    with owned(tmp_path / "out"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot write"), owned(tmp_path / "file" / "out"):
        pass
    # what the training itself raises is its own
    with pytest.raises(BlockingIOError), owned(tmp_path / "out"):
        raise BlockingIOError


def test_a_folder_is_locked_in_the_way_that_nfs_can(tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr(fcntl, "flock", lambda handle, how: modes.append(fcntl.fcntl(handle, fcntl.F_GETFL)))
    with owned(tmp_path / "out"):
        assert [mode & os.O_ACCMODE for mode in modes] == [os.O_RDWR]


def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    write_tensors(path, {"weight": torch.ones(2)})

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(PlaceError, match=r"cannot write .*state\.pt: the disk is full"):
            write_tensors(path, {"weight": torch.zeros(2)})
    # where the disk takes a part of the file, torch raises an error of its own
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StoreError, match="File too large"):
            write_tensors(path, {"weight": torch.zeros(10**6)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(read_tensors(path)["weight"], torch.ones(2)) and len(list(tmp_path.iterdir())) == 1


def test_the_rate_follows_the_images_that_a_step_has(source, tmp_path):
    job = tiny_job(source, tmp_path, batch_size=64, schedule="steps", learning_rate=0.512)
    assert (job.batch, job.rate(Position())) == (36, pytest.approx(0.036))
    claim(job)
    eight = job.execution.model_copy(update={"processes": 8})
    with pytest.raises(ConfigError, match=r"the images of a step \(36, 32; by the processes\) differ"):
        check_folder(dataclasses.replace(job, execution=eight))


@pytest.mark.parametrize("batch_size", [8, 32], ids=["in its steps", "in its last step"])
def test_a_training_that_diverges_is_told(source, tmp_path, batch_size):
    job = tiny_job(source, tmp_path, batch_size=batch_size)
    job = dataclasses.replace(job, recipe=job.recipe.model_copy(update={"learning_rate": 1e30}))
    with pytest.raises(NegFaceDiffError, match="diverged in epoch 1"):
        fit(job, nobody)


@pytest.mark.parametrize(
    ("recipe", "execution", "error", "words"),
    [
        ({"precision": "fp16"}, {}, ConfigError, "for GPUs"),
        ({"held_out": 0.5, "batch_size": 64, "accumulate": 16}, {}, ConfigError, "change batch_size"),
        ({}, {"processes": 3}, ConfigError, "change batch_size, accumulate or processes"),
        ({"start": "nowhere.pth"}, {}, WeightsError, "no nowhere.pth"),
    ],
)
def test_what_cannot_be_is_refused_before_work(source, tmp_path, recipe, execution, error, words):
    asked = EXECUTION.model_copy(update=execution)
    with pytest.raises(error, match=words):
        tiny_job(source, tmp_path / "out", asked, **recipe)
    assert not (tmp_path / "out").exists()


def test_too_few_identities_are_refused(tmp_path):
    found = open_set(save_crops(tmp_path / "set", 3, 2), tmp_path, nobody)
    with pytest.raises(ConfigError, match="two must be left to train on"):
        plan_training(found, RECIPE, EXECUTION, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(source, tmp_path):
    with pytest.raises(ConfigError, match="torch sees 0"):
        tiny_job(source, tmp_path, TrainingExecution(device="cuda"))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("margin", -0.5, "-1 for the head"),
        ("batch_size", 7, "equal parts"),
        ("drops", (5, 3), "ascending epochs"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(field, value, words):
    with pytest.raises(ValueError, match=words):
        RecogniserConfig.model_validate({"accumulate": 2, field: value})


def test_published_margins_are_the_default():
    assert [RecogniserConfig(head=head).head_margin for head in Head] == [0.35, 0.5, 0.35, 0.4]
    assert RecogniserConfig(margin=0.0).head_margin == 0


def test_recipes_name_the_published_networks():
    for depth in (18, 34, 50, 100):
        architecture = architecture_of(RecogniserConfig(backbone=f"iresnet{depth}"))
        assert sum(architecture["layers"]) * 2 + 2 in (depth, depth - 1, depth + 1)
        assert (architecture["width"], architecture["dropout"]) == (512, 0.4)


def test_a_training_starts_from_the_weights_of_another(source, tmp_path):
    plan = RECIPE.model_copy(update={"epochs": 1})
    found = open_set(source, tmp_path, nobody)
    job = plan_training(found, plan, EXECUTION, tmp_path / "first")
    network = starting_network(job)
    torch.save({"state_dict_of_no_use": 1}, tmp_path / "none.pt")
    torch.save({"architecture": job.architecture, "backbone": network.state_dict()}, tmp_path / "best.pt")
    following = plan.model_copy(update={"start": str(tmp_path), "seed": 9})
    again = starting_network(plan_training(found, following, EXECUTION, tmp_path / "second"))
    assert torch.equal(again.fc.weight, network.fc.weight)
    wider = following.model_copy(update={"width": 32})
    with pytest.raises(WeightsError, match="set backbone and width"):
        plan_training(found, wider, EXECUTION, tmp_path / "third")
    with pytest.raises(WeightsError, match=r"none\.pt"):
        none = following.model_copy(update={"start": str(tmp_path / "none.pt")})
        plan_training(found, none, EXECUTION, tmp_path / "fourth")


def test_weights_to_start_from_are_needed_until_there_is_a_state(source, tmp_path):
    start = tmp_path / "start.pt"
    found = open_set(source, tmp_path, nobody)
    network = starting_network(plan_training(found, RECIPE, EXECUTION, tmp_path))
    architecture = architecture_of(RECIPE)
    torch.save({"architecture": architecture, "backbone": network.state_dict()}, start)
    recipe = RECIPE.model_copy(update={"start": str(start)})
    job = plan_training(found, recipe, EXECUTION, tmp_path / "out")
    claim(job)
    assert len(json.loads((tmp_path / "out" / "training.json").read_text())["start"]) == 64
    torch.nn.init.zeros_(network.fc.weight)
    torch.save({"architecture": architecture, "backbone": network.state_dict()}, start)
    with pytest.raises(ConfigError, match="the weights of start differ"):
        claim(job)
    start.unlink()
    with pytest.raises(WeightsError, match=r"no .*start\.pt"):
        plan_training(found, recipe, EXECUTION, tmp_path / "out")
    (tmp_path / "out" / "state.pt").touch()
    claim(plan_training(found, recipe, EXECUTION, tmp_path / "out"))


def test_both_onnx_forms_give_the_embeddings_of_the_network(source, tmp_path):
    fit(tiny_job(source, tmp_path, epochs=1), nobody)
    network = load_trained(tmp_path / "best.pt")
    pictures = crops(3, 1)[:, 0]
    with torch.inference_mode():
        expected = network(to_float(pictures)).numpy()
    pack, sdfr = export_forms(network, tmp_path)
    np.testing.assert_allclose(load_embedder(pack.parent).embed(pictures), expected, atol=1e-4)
    session = open_file(sdfr).session
    unit = pictures.transpose(0, 3, 1, 2).astype(np.float32) / 255
    np.testing.assert_allclose(session.run(None, {"crops": unit})[0], expected, atol=1e-4)
    assert not math.isclose(float(np.abs(expected).max()), 0)
    assert architecture_of(RECIPE)["width"] == TINY["width"]

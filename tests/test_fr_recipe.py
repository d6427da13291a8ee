"""What fields of a recipe do to a training."""

import json

import pytest
import torch
from crop_folders import nobody, save_crops, tiny_job

from negfacediff_core.errors import ConfigError
from negfacediff_core.recognition.classifier import MarginHead
from negfacediff_core.recognition.course import Position, is_over, judged
from negfacediff_core.recognition.fit import fit
from negfacediff_core.recognition.recipe import RecogniserConfig
from negfacediff_core.recognition.training_job import check_folder, starting_network
from negfacediff_core.tensor_files import read_tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Six identities, four crops of each."""
    return save_crops(tmp_path_factory.mktemp("recipe") / "set", 6, 4)


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_a_step_is_no_longer_than_its_clipped_gradients(source, tmp_path, clip):
    plain = {"epochs": 1, "batch_size": 64, "momentum": 0.0, "weight_decay": 0.0, "learning_rate": 1.0}
    job = tiny_job(source, tmp_path, clip=clip, schedule="steps", **plain)
    assert job.steps == 1
    fit(job, nobody)
    trained, recipe = read_tensors(tmp_path / "state.pt")["module"], job.recipe
    head = MarginHead(recipe.head, recipe.width, job.training.classes, recipe.scale, 0.0, recipe.seed)
    for name, part in (("backbone", starting_network(job)), ("head", head)):
        moved = [trained[f"{name}.{key}"] - value.detach() for key, value in part.named_parameters()]
        length = torch.cat([one.flatten() for one in moved]).norm() / job.rate(Position())
        if clip:
            assert length == pytest.approx(clip, rel=1e-2)
        else:
            assert length > 0.1


def test_plateau_can_end_by_epochs_without_gain_alone():
    recipe = RecogniserConfig(schedule="plateau", patience=2, stop=7, epochs=100)
    position = Position()
    for epoch, eer in enumerate([0.3, 0.2, *[0.2] * 20]):
        if is_over(recipe, position):
            break
        position = judged(position, {"eer": eer, "fdr": 1.0}, recipe.patience)
        position.epoch = epoch + 1
    # the best is the second epoch; the rate has fallen three times since
    assert (position.epoch, position.best["epoch"], position.falls) == (9, 2, 3)
    assert is_over(recipe.model_copy(update={"stop": 0}), Position(epoch=3, falls=4))
    assert not is_over(recipe, Position(epoch=3, falls=4, best={"epoch": 2.0}))
    assert not is_over(recipe, Position())


def test_a_training_of_an_earlier_version_goes_on(source, tmp_path):
    job = tiny_job(source, tmp_path)
    description = job.describe()
    for name in ("clip", "policy", "stop"):
        del description["recipe"][name]
    (tmp_path / "training.json").write_text(json.dumps(description))
    check_folder(job)
    with pytest.raises(ConfigError, match="clip differ"):
        check_folder(tiny_job(source, tmp_path, clip=5.0))

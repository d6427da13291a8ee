"""The study of recognisers: sets of equal size, pairs of rendered people, and the table."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from crop_folders import crops

from flows import study as flow_module
from flows.cli import BAD_INPUT, main
from flows.study import cases, check_study, equal_sets, load_study, study_recognition, table_of
from negfacediff_core.errors import ConfigError
from negfacediff_core.faces.align import TEMPLATE_112
from negfacediff_core.recognition.datasets import PackedReader, TrainingSet, pack
from negfacediff_core.recognition.embedding import Embedding
from negfacediff_core.recognition.origins import Origin
from negfacediff_core.recognition.people import People, drawn_pairs, rendered_people, verify_people


def people(identities, images):
    """What a render set holds of people whose crops are the whole pictures."""
    return SimpleNamespace(
        images=crops(identities, images),
        landmarks=np.broadcast_to(TEMPLATE_112, (identities, images, 5, 2)).astype(np.float32),
        identities=np.arange(identities),
    )


def numbered(tmp_path, numbers):
    """A training set of images with these numbers."""
    numbers = np.array(numbers)
    reader = PackedReader(tmp_path / "crops.u8")
    if not reader.path.exists():
        pack(reader.path, len(numbers), iter([crops(len(numbers), 1)[:, 0]]))
    labels = np.unique(numbers[:, 0], return_inverse=True)[1]
    names, origin = tuple(map(str, range(len(numbers)))), Origin("files", "made here")
    return TrainingSet(reader, names, labels, np.arange(len(numbers)), origin, numbers)


def test_sets_become_equal_in_identities_and_images(tmp_path):
    first = numbered(tmp_path, [[0, 0], [0, 1], [0, 2], [3, 0], [3, 2], [5, 0], [5, 1]])
    second = numbered(tmp_path, [[0, 1], [0, 2], [3, 0], [5, 0], [5, 4]])
    equal = equal_sets([first, second], 2)
    assert equal[0].numbers.tolist() == [[0, 0], [0, 1], [5, 0], [5, 1]]
    assert equal[1].numbers.tolist() == [[0, 1], [0, 2], [5, 0], [5, 4]]
    assert all(one.labels.tolist() == [0, 0, 1, 1] for one in equal)
    with pytest.raises(ConfigError, match="No identity has 3 usable crops"):
        equal_sets([first, second], 3)


def test_pairs_of_people_are_balanced_and_no_one_is_in_two_folds():
    found = np.ones((40, 3), bool)
    found[7, 1] = found[8, 0] = False
    pairs, same, folds = drawn_pairs(found, seed=0, genuine=4)
    assert len(same) == 40 * 8 and same.sum() == 160
    shown = pairs // 3
    assert ((shown[:, 0] == shown[:, 1]) == same).all()
    assert (pairs[:, 0] != pairs[:, 1]).all() and found.ravel()[pairs].all()
    assert (folds == shown[:, 0] * 10 // 40).all() and (folds == shown[:, 1] * 10 // 40).all()
    assert (drawn_pairs(found, seed=0, genuine=4)[0] == pairs).all()
    for few in (found[:19], found[:, :1]):
        with pytest.raises(ConfigError, match="at least 20 with two images each"):
            drawn_pairs(few, seed=0)


class Told:
    """A recogniser that reads the embedding from a corner of the crop."""

    width, weights, input_size = 4, SimpleNamespace(name="told"), 112

    def embed(self, crops, flip):
        return crops[:, 0, :4, 0].astype(np.float32) - 128


def test_all_people_are_compared_and_rates_are_those_of_all_comparisons():
    random = np.random.default_rng(0)
    told = random.integers(100, 156, (20, 1, 4)) + random.integers(-9, 10, (20, 3, 4))
    crops_of = np.zeros((20, 3, 112, 112, 3), np.uint8)
    crops_of[:, :, 0, :4] = told[..., None]
    found = np.ones((20, 3), bool)
    found[3, 0] = False
    figures = verify_people(People("told", crops_of, found), Embedding(Told()))

    unit = (told - 128.0) / np.linalg.norm(told - 128.0, axis=2, keepdims=True)
    unit, who = unit[found], np.nonzero(found)[0]
    first, second = np.triu_indices(len(unit), 1)
    cosines, same = (unit @ unit.T)[first, second], who[first] == who[second]
    assert figures["genuine"] == same.sum() and figures["impostor"] == (~same).sum()
    impostors = np.sort(cosines[~same])[::-1]
    # accepted are cosines above that of the first impostor who may not be: at 1e-2 of 1,650 that is the 17th
    assert figures["tar_1e-2"] == pytest.approx((cosines[same] > impostors[len(impostors) // 100]).mean())
    assert figures["tar_1e-4"] == pytest.approx((cosines[same] > impostors[0]).mean())
    assert 0.5 < figures["accuracy"] < 1 and 0 < figures["eer"] < 0.5


def test_rendered_people_are_aligned_by_their_landmarks():
    renders = people(20, 2)
    aligned = rendered_people(renders)
    assert aligned.found.shape == (20, 2) and aligned.found.all()
    assert np.abs(aligned.crops.astype(int) - renders.images).max() <= 2


def test_the_study_that_ships_compares_the_negative_alone():
    study = load_study("negative")
    check_study(study)
    builds = [case.build for case in cases(study)]
    assert len(builds) == 6 and study.images <= builds[0].images
    assert {(build.negatives.rule, build.samples.w) for build in builds} == {("none", 0.0), ("far", 0.5)}
    one, other = (build.model_dump() for build in builds[::3])
    for build in (one, other):
        del build["name"], build["negatives"]["rule"], build["samples"]["w"]
    assert one == other


def test_a_study_builds_trains_verifies_and_tells(tmp_path, monkeypatch):
    study = load_study("negative").model_copy(update={"seeds": [0, 1], "images": 2})
    built, sizes, shown = [], [], {}
    monkeypatch.setattr(flow_module, "build_dataset", lambda build, *_: built.append(build.name))
    numbers = [[identity, replicate] for identity in range(6) for replicate in range(3)]
    monkeypatch.setattr(flow_module, "_crops_of", lambda *_: numbered(tmp_path, numbers))
    shown_people = rendered_people(people(20, 2))
    monkeypatch.setattr(flow_module, "_people", lambda *_: {"": shown_people, "orl_": shown_people})
    monkeypatch.setattr(
        flow_module, "create_markdown_artifact", lambda text, key, _: shown.update({key: text})
    )

    monkeypatch.setattr(flow_module, "licences_behind", lambda store, run: [{"part": run}])

    def trained(place, crops, recipe, execution, source, licences):
        sizes.append((place.name, len(crops), recipe.seed))
        assert source == f"run {place.name} of unused" and licences == [{"part": place.name}]
        return {"pack": "packs/demo/judge", "eer": 0.25, "epoch": 3.0}

    monkeypatch.setattr(flow_module, "train_in", trained)
    rows = study_recognition.fn(study, store="unused", out=str(tmp_path / "out"))
    assert built == [f"negative-{side}-{seed}" for seed in (0, 1) for side in ("none", "far")]
    assert sizes == [(name, 12, int(name[-1])) for name in built]
    assert json.loads((tmp_path / "out" / "rows.json").read_text()) == rows
    table = (tmp_path / "out" / "table.md").read_text()
    assert shown == {"study-negative": table} and table == table_of(study, rows)
    line = next(line for line in table.splitlines() if line.startswith("| far negative"))
    assert "| 12 |" in line and "25.0% ± 0.0%" in line and line.endswith("| 2 |")
    # the same recogniser on both: no difference, seed by seed
    apart = table.splitlines()[-1]
    assert apart.startswith("| far negative, w = 0.5, less the first | | +0.00% ± 0.00%")
    assert 0.5 <= rows[0]["accuracy"] == rows[0]["orl_accuracy"] <= 1 and 0 <= rows[0]["tar_1e-3"] <= 1
    assert all(row["seconds"] > 0 for row in rows)


def test_bad_studies_are_told(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    text = "name: mine\ntitle: Mine\nbase: demo\nseeds: [0]\nbuilds: [{name: a, group: a}]\nimages: 1\n"
    for content, words in (
        (text, "images is 1"),
        (text.replace("images: 1", "images: 2\nrecipe: papre"), "'papre'"),
        (
            text.replace("images: 1", "images: 900"),
            "images is 900: of each identity the build mine-a-0",
        ),
    ):
        file.write_text(content)
        with pytest.raises(SystemExit) as stop:
            main(["study-recognition", str(file), "--out", str(tmp_path / "out")])
        assert stop.value.code == BAD_INPUT
        assert words in capsys.readouterr().err
    with pytest.raises(ConfigError, match="studies are negative"):
        load_study("negativ")

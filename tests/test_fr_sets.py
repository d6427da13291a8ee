"""Training sets: a run of a store, exports of every format, other folders; and the filters of them."""

import csv
import os
import pickle
import shutil

import numpy as np
import pytest
from crop_folders import crops, nobody, save_crops
from PIL import Image

from flows import export as flow
from negfacediff_core.errors import ConfigError, DamagedError
from negfacediff_core.export.filter import filter_text
from negfacediff_core.export.recordio import pack, record
from negfacediff_core.export.settings import ExportConfig
from negfacediff_core.recognition.datasets import filtered
from negfacediff_core.recognition.set_openers import open_set
from negfacediff_core.stages.training_set import training_set_of
from negfacediff_core.store.extents import read_array, read_column
from negfacediff_core.store.runs import read_run, stages_of_run, write_run

ONE = flow.DEFAULT_EXECUTION.model_copy(update={"workers": 1})
FORMATS = {
    "imagefolder": {"format": "imagefolder"},
    "rec": {"format": "rec"},
    "rec headerless": {"format": "rec", "variant": "headerless"},
    "webdataset": {"format": "webdataset"},
    "huggingface": {"format": "huggingface"},
}


@pytest.fixture(scope="module")
def store(tiny_build, tiny_store, tmp_path_factory):
    """The store of a run of 5 identities x 3 images, some of which show no face."""
    store = shutil.copytree(tiny_store, tmp_path_factory.mktemp("sets") / "store")
    record = read_run(str(store), "tiny")
    write_run(str(store), "tiny", {**record, "config": tiny_build.model_dump(mode="json"), "seconds": 1.0})
    return str(store)


@pytest.fixture(autouse=True)
def no_sync(monkeypatch):
    """Tests end before the power fails, and other programs' files are not theirs to wait for."""
    monkeypatch.setattr(os, "sync", lambda: None)


def export(store, out, **asked):
    """Export in this process."""
    flow.export_dataset.fn("tiny", str(out), ExportConfig(**asked), execution=ONE, store=store)
    return out


def expected(store):
    """Identity and replicate of the images that are ok, and their crops."""
    stages = stages_of_run(store, "tiny")
    usable = read_column(stages["embeddings"], "status", 5, 3) == "ok"
    return np.argwhere(usable), read_array(stages["aligned"], "image", 5, 3)[usable]


def check_same(training, store):
    numbers, pixels = expected(store)
    assert training.numbers.tolist() == numbers.tolist()
    assert (training.read(np.arange(len(training))) == pixels).all()
    identities = sorted(set(numbers[:, 0].tolist()))
    assert training.labels.tolist() == [identities.index(identity) for identity, _ in numbers.tolist()]


def test_a_run_is_a_training_set(store, tmp_path):
    stages = stages_of_run(store, "tiny")
    told = []
    training = training_set_of(stages, "tiny", tmp_path, lambda *now: told.append(now))
    check_same(training, store)
    units = len(stages["aligned"].grid.units())
    assert told[0] == (0, units) and told[-1] == (units, units)
    (packed,) = tmp_path.iterdir()
    before = packed.stat().st_mtime_ns
    check_same(training_set_of(stages, "tiny", tmp_path, nobody), store)
    assert packed.stat().st_mtime_ns == before


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_of_any_format_is_the_same_training_set(form, store, tmp_path):
    out = export(store, tmp_path / "out", **FORMATS[form])
    training = open_set(out, tmp_path, nobody)
    check_same(training, store)
    # as it travels to other processes
    check_same(pickle.loads(pickle.dumps(training)), store)


def test_a_folder_of_folders_is_a_training_set(tmp_path):
    folder = save_crops(tmp_path / "set", 3, 2)
    (folder / "0000" / "notes.txt").write_text("no image")
    training = open_set(folder, tmp_path, nobody)
    assert training.names[:3] == ("0000/0.png", "0000/1.png", "0001/0.png")
    assert training.labels.tolist() == [0, 0, 1, 1, 2, 2] and training.numbers is None
    assert (training.read(np.array([3])) == crops(3, 2)[1, 1]).all()


def test_a_rec_file_of_others_with_labels_in_any_order_and_split_records(tmp_path):
    pictures = crops(3, 1)[:, 0]
    content, offsets = b"", []
    for key, label in enumerate((40, 7, 40)):
        # the magic number at a multiple of 4 within an image splits its record
        path = tmp_path / f"{key}.png"
        Image.fromarray(pictures[key]).save(path)
        image = path.read_bytes()
        image += bytes(-len(image) % 4) + b"\x0a\x23\xd7\xce" + b"end"
        offsets.append(len(content))
        content += record(pack(label, key, image))
    (tmp_path / "train.rec").write_bytes(content)
    (tmp_path / "train.idx").write_text("".join(f"{key}\t{offset}\n" for key, offset in enumerate(offsets)))
    training = open_set(tmp_path, tmp_path, nobody)
    assert training.labels.tolist() == [1, 0, 1]
    assert (training.read(np.arange(3)) == pictures).all()
    (tmp_path / "train.idx").write_text("0\t0\n1\t11\n")
    with pytest.raises(DamagedError, match="no record begins at byte 11"):
        open_set(tmp_path, tmp_path, nobody)
    (tmp_path / "train.idx").write_text("zero")
    with pytest.raises(DamagedError, match=r"train\.idx cannot be read"):
        open_set(tmp_path, tmp_path, nobody)


def test_what_is_no_training_set_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="There is no folder"):
        open_set(tmp_path / "nowhere", tmp_path, nobody)
    with pytest.raises(ConfigError, match="holds no images"):
        open_set(tmp_path, tmp_path, nobody)
    with pytest.raises(ConfigError, match="shows 1 identities"):
        open_set(save_crops(tmp_path / "one", 1, 2), tmp_path, nobody)
    wide = save_crops(tmp_path / "wide", 2, 1)
    Image.new("RGB", (128, 96)).save(wide / "0000" / "0.png")
    with pytest.raises(ConfigError, match="128x96 pixels: training takes aligned crops of 112x112"):
        open_set(wide, tmp_path, nobody)
    (wide / "0000" / "0.png").write_bytes(b"")
    with pytest.raises(DamagedError, match=r"0000/0\.png is no image"):
        open_set(wide, tmp_path, nobody)


def test_a_filter_chooses_the_images_of_an_export_and_of_a_training(store, tmp_path):
    numbers, _ = expected(store)
    some = numbers[::2].tolist()
    kept = tmp_path / "kept.csv"
    kept.write_text(filter_text((f"{i}_{r}", i, r) for i, r in some))
    out = export(store, tmp_path / "out", filter=str(kept))
    with (out / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [[int(row["identity"]), int(row["replicate"])] for row in rows] == some
    whole = training_set_of(stages_of_run(store, "tiny"), "tiny", tmp_path, nobody)
    assert filtered(whole, kept).numbers.tolist() == some
    manifest = (out / "manifest.json").read_text()
    assert str(tmp_path) not in manifest and '"filter": "' in manifest
    # the same images from a file elsewhere are the same export
    moved = shutil.move(kept, tmp_path / "moved.csv")
    export(store, out, filter=str(moved))


def test_a_filter_of_names_chooses_files(tmp_path):
    training = open_set(save_crops(tmp_path / "set", 4, 2), tmp_path, nobody)
    kept = tmp_path / "kept.csv"
    kept.write_text(filter_text((name, None, None) for name in ("0003/1.png", "0001/0.png", "0001/1.png")))
    few = filtered(training, kept)
    assert few.names == ("0001/0.png", "0001/1.png", "0003/1.png")
    assert few.labels.tolist() == [0, 0, 1]
    assert (few.read(np.array([2])) == training.read(np.array([7]))).all()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("image,identity,replicate\n", "takes no image"),
        ("name\nx\n", "first line is not image,identity,replicate"),
        ("image,identity,replicate\nx,one,2\n", "cannot be read"),
        ("image,identity,replicate\nx,,\n", "come from no store"),
        ("image,identity,replicate\nx,0,7\n", "image 7 of identity 0"),
    ],
)
def test_a_filter_that_does_not_fit_a_run_is_refused(content, words, store, tmp_path):
    path = tmp_path / "kept.csv"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        export(store, tmp_path / "out", filter=str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        export(store, tmp_path / "out", filter=str(tmp_path / "nowhere.csv"))


def test_a_filter_of_another_set_is_refused(tmp_path):
    training = open_set(save_crops(tmp_path / "set", 2, 2), tmp_path, nobody)
    path = tmp_path / "kept.csv"
    path.write_text(filter_text([("0000/0.png", None, None), ("0009/0.png", None, None)]))
    with pytest.raises(ConfigError, match=r"takes 1 images that .* 0009/0\.png"):
        filtered(training, path)

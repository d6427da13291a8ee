"""Training sets: a run of a store, exports of every format, other folders; and the filters of them."""

import csv
import os
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from crop_folders import crops, nobody, save_crops
from PIL import Image

from flows import export as flow
from negfacediff_core.errors import ConfigError, DamagedError, PlaceError, StoreError
from negfacediff_core.export.filter import filter_text
from negfacediff_core.export.recordio import pack, record
from negfacediff_core.export.settings import ExportConfig
from negfacediff_core.recognition import datasets
from negfacediff_core.recognition.datasets import filtered, unreadable
from negfacediff_core.recognition.datasets import pack as pack_crops
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
    assert training.origin.kind == "aligned" and training.origin.digest == stages["aligned"].fingerprint
    (packed,) = tmp_path.glob("*.u8")
    before = packed.stat().st_mtime_ns
    check_same(training_set_of(stages, "tiny", tmp_path, nobody), store)
    assert packed.stat().st_mtime_ns == before
    # what a power cut has left is packed again
    os.truncate(packed, 1000)
    check_same(training_set_of(stages, "tiny", tmp_path, nobody), store)


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_of_any_format_is_the_same_training_set(form, store, tmp_path):
    out = export(store, tmp_path / "out", **FORMATS[form])
    training = open_set(out, tmp_path, nobody)
    check_same(training, store)
    # as it travels to other processes
    check_same(pickle.loads(pickle.dumps(training)), store)
    assert training.origin.kind == "manifest"
    assert training.origin.samples == stages_of_run(store, "tiny")["samples"].fingerprint
    told = []
    assert unreadable(training, 2, lambda *now: told.append(now)) == []
    assert told[-1:] == ([] if form == "huggingface" else [(len(training), len(training))])


def test_other_images_of_the_same_names_are_another_training_set(tmp_path):
    first = open_set(save_crops(tmp_path / "set", 3, 2), tmp_path, nobody)
    again = open_set(shutil.copytree(tmp_path / "set", tmp_path / "again"), tmp_path, nobody)
    assert again.fingerprint == first.fingerprint
    path = tmp_path / "again" / "0002" / "1.png"
    # of the same size, and in one place alone
    path.write_bytes(path.read_bytes()[:-20] + bytes(20))
    other = open_set(tmp_path / "again", tmp_path, nobody)
    assert (other.names, other.labels.tolist()) == (first.names, first.labels.tolist())
    assert other.fingerprint != first.fingerprint


def test_crops_that_were_packed_are_not_those_of_another_export(store, tmp_path):
    first = export(store, tmp_path / "first", format="huggingface")
    other = shutil.copytree(first, tmp_path / "other")
    for path in (other / "data").iterdir():
        table = parquet.read_table(path)
        images = table.column("image").to_pylist()[::-1]
        column = pa.array(images, table.schema.field("image").type)
        parquet.write_table(table.set_column(0, "image", column), path)
    (other / "manifest.json").write_text((other / "manifest.json").read_text() + " ")
    sets = [open_set(each, tmp_path / "work", nobody) for each in (first, other)]
    pixels = [each.read(np.arange(len(each))) for each in sets]
    assert (pixels[0] == pixels[1][::-1]).all()
    assert sets[0].names == sets[1].names and sets[0].fingerprint != sets[1].fingerprint


def test_packing_looks_for_room_first_and_counts(tmp_path, monkeypatch):
    with pytest.raises(DamagedError, match="37,632 bytes long, and 75,264 were expected"):
        pack_crops(tmp_path / "crops.u8", 2, iter([crops(1, 1)[:, 0]]))
    monkeypatch.setattr(datasets.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9e9))
    with pytest.raises(PlaceError, match=r"9\.0 GB free, and the crops take 37\.6 GB"):
        pack_crops(tmp_path / "crops.u8", 1_000_000, iter([]))
    assert [path.name for path in tmp_path.iterdir()] == [".packing.lock"]


def test_all_crops_that_cannot_be_read_are_told_at_once(tmp_path):
    folder = save_crops(tmp_path / "set", 3, 3)
    training = open_set(folder, tmp_path, nobody)
    whole = (folder / "0000" / "1.png").read_bytes()
    (folder / "0000" / "1.png").write_bytes(whole[:3000])
    Image.new("RGB", (96, 112)).save(folder / "0001" / "2.png")
    (folder / "0002" / "0.png").unlink()
    wrong = unreadable(training, 2, nobody)
    assert [each.split(" ")[0] for each in wrong] == [
        str(folder / each) for each in ("0000/1.png", "0001/2.png", "0002/0.png")
    ]
    assert "is no image" in wrong[0] and "96x112" in wrong[1] and "No such file" in wrong[2]


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
    for text in ("zero", "", "7\n"):
        (tmp_path / "train.idx").write_text(text)
        with pytest.raises(DamagedError, match=r"train\.idx cannot be read"):
            open_set(tmp_path, tmp_path, nobody)


# The heads of labels.csv.
PATH, KEY = (b"%s,label,identity,replicate\n" % key for key in (b"path", b"key"))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"data/train.parquet": b""}, r"labels\.csv cannot be read as that of an export"),
        ({"labels.csv": b"name,age\nx,3\n"}, "it has the columns path, label, identity, replicate"),
        ({"labels.csv": PATH + b"x,zero,1,2\n"}, "cannot be read"),
        ({"labels.csv": PATH + b"x,,1,2\n"}, "a cell is empty"),
        ({"labels.csv": PATH}, "it names no image"),
        ({"labels.csv": PATH + b"x.png,0,0,0\ny.png,1,1,0\n"}, r"x\.png cannot be read"),
        ({"data/train.parquet": b"none", "labels.csv": PATH + b"x,0,0,0\n"}, "train.parquet"),
        ({"shard-000000.tar": b"none", "labels.csv": KEY + b"x,0,0,0\n"}, "from byte 0 on"),
        ({"shard-000000.tar": b"", "labels.csv": KEY + b"x,0,0,0\n"}, "from byte 0 on"),
        ({"shard-000000.tar": bytes(1024), "labels.csv": KEY + b"x,0,0,0\n"}, "no image x"),
    ],
)
def test_damaged_and_foreign_sets_end_in_a_sentence(files, words, tmp_path):
    for name, content in files.items():
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with pytest.raises((ConfigError, StoreError), match=words):
        open_set(tmp_path / "set", tmp_path, nobody)


def test_a_tar_file_that_ends_early_is_damaged(store, tmp_path):
    out = export(store, tmp_path / "out", format="webdataset")
    (shard,) = out.glob("*.tar")
    for size in (shard.stat().st_size - 1024, 3000):
        os.truncate(shard, size)
        with pytest.raises(DamagedError, match="is not as negfacediff export writes it"):
            open_set(out, tmp_path, nobody)


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


def test_a_filter_of_another_run_is_refused(store, tmp_path):
    training = training_set_of(stages_of_run(store, "tiny"), "tiny", tmp_path, nobody)
    kept = tmp_path / "kept.csv"
    for samples in (training.origin.samples, "another"):
        kept.write_text(filter_text([("x", *map(int, training.numbers[0]))], samples))
        if samples != "another":
            assert len(filtered(training, kept)) == 1
    with pytest.raises(ConfigError, match="of the images of samples/another"):
        filtered(training, kept)


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

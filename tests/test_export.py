"""Exports of a small store: what is in them, and who reads them."""

import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
import webdataset
from exports import ONE, contents, export, finished_run
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from flows import export as flow
from flows import growth
from flows.cli import main
from negfacediff_core.errors import ConfigError, StoreError
from negfacediff_core.export import challenges
from negfacediff_core.export.challenges import Challenge
from negfacediff_core.export.filter import filter_text
from negfacediff_core.export.images import DIGITAL_SOURCE
from negfacediff_core.export.manifest import MANIFEST, read_files, read_head
from negfacediff_core.export.read_recordio import read_set
from negfacediff_core.export.settings import ExportConfig
from negfacediff_core.export.webdataset import member
from negfacediff_core.store.extents import read_array, read_column
from negfacediff_core.store.records import forget
from negfacediff_core.store.runs import read_run, stages_of_run, write_run


@pytest.fixture(autouse=True)
def no_sync(monkeypatch):
    """Tests end before the power fails, and other programs' files are not theirs to wait for."""
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture(scope="module")
def store(tiny_build, tiny_store, tmp_path_factory):
    """A finished run of 5 identities x 3 images, of which some show no face."""
    return finished_run(tiny_build, tiny_store, tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def usable(store):
    """Which images of the run are ok `(5, 3)`; some identities have several, and some images are not."""
    usable = read_column(stages_of_run(str(store), "tiny")["embeddings"], "status", 5, 3) == "ok"
    assert 0 < usable.sum() < usable.size and usable.sum(axis=1).max() >= 2
    return usable


def labels_of(folder):
    """The rows of labels.csv."""
    return list(csv.DictReader(io.StringIO((folder / "labels.csv").read_text())))


def decoded(data):
    """Pixels of an encoded image."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_a_folder_of_images_holds_the_crops_that_are_ok(store, usable, tmp_path):
    result = export(store, tmp_path / "out")
    crops = read_array(stages_of_run(str(store), "tiny")["aligned"], "image", 5, 3)
    rows = labels_of(tmp_path / "out")
    assert [[int(row["identity"]), int(row["replicate"])] for row in rows] == np.argwhere(usable).tolist()
    for row in rows:
        image = decoded((tmp_path / "out" / row["path"]).read_bytes())
        assert (image == crops[int(row["identity"]), int(row["replicate"])]).all()
    folders = sorted(path.name for path in (tmp_path / "out" / "images").iterdir())
    assert [folders.index(row["path"].split("/")[1]) for row in rows] == [int(row["label"]) for row in rows]
    assert (tmp_path / "out" / "list.txt").read_text().split("\n")[0] == (
        f"{rows[0]['path'].removeprefix('images/')} 0"
    )
    assert (result["images"], result["identities"]) == (len(rows), len(folders))
    sizes = {path: len(data) for path, data in contents(tmp_path / "out").items() if path != MANIFEST}
    assert {one.path: one.size for one in read_files(tmp_path / "out")} == sizes
    assert read_head(tmp_path / "out")["total"] == {"files": len(sizes), "bytes": sum(sizes.values())}
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["files"].keys() == sizes.keys()
    assert result["bytes"] == sum(sizes.values())


def test_what_became_of_a_copy_is_told(store, usable, tmp_path, capsys):
    out = tmp_path / "out"
    export(store, out)
    paths = [row["path"] for row in labels_of(out)]
    capsys.readouterr()

    def checked():
        with pytest.raises(SystemExit) as stop:
            main(["verify-export", str(out)])
        return stop.value.code, capsys.readouterr()

    code, said = checked()
    assert code == 0 and f"{usable.sum() + 6} files, " in said.out and "all as they were" in said.out
    changed = bytearray((out / paths[1]).read_bytes())
    changed[-1] ^= 1
    (out / paths[1]).write_bytes(changed)
    (out / paths[0]).unlink()
    (out / "more").write_bytes(b"")
    (out / ".git").mkdir()
    (out / ".git" / "config").write_bytes(b"")
    code, said = checked()
    assert code == 1 and "config" not in said.out
    for line in (f"{paths[0]} is missing", f"{paths[1]} is not what was exported", "more is no part of the"):
        assert line in said.out
    manifest = (out / MANIFEST).read_text()
    for text in (manifest[:-20], manifest[:200], manifest.replace('"bytes": ', '"size": ')):
        (out / MANIFEST).write_text(text)
        code, said = checked()
        assert code == 2 and "is damaged or of an earlier version" in said.err
    (out / MANIFEST).unlink()
    code, said = checked()
    assert code == 2 and "is no export: there is no manifest.json" in said.err


@pytest.mark.parametrize("lost", ["labels.csv", "images"])
def test_an_export_that_lacks_files_does_not_count_as_complete(store, tmp_path, lost):
    export(store, tmp_path / "out")
    lost = tmp_path / "out" / lost
    shutil.rmtree(lost) if lost.is_dir() else lost.write_bytes(b"")
    with pytest.raises(ConfigError, match="is there already, and is not this export, or not all of it"):
        export(store, tmp_path / "out")


@pytest.mark.parametrize("encoding", ["png", "jpeg"])
def test_every_image_says_that_a_network_made_it(store, tmp_path, encoding):
    export(store, tmp_path / "out", encoding=encoding, quality=90)
    for path in (tmp_path / "out" / "images").rglob("*.*"):
        image = Image.open(path)
        packet = image.info["xmp" if encoding == "jpeg" else "XML:com.adobe.xmp"]
        packet = packet.decode() if isinstance(packet, bytes) else packet
        tree = ElementTree.fromstring(packet.split("?>", 1)[1].rsplit("<?", 1)[0])
        (description,) = tree.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
        assert description.attrib["{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"] == (
            DIGITAL_SOURCE
        )
        assert image.format == encoding.upper() and image.size == (112, 112)


@pytest.mark.parametrize("variant", ["header", "headerless"])
def test_records_hold_the_same_images(store, usable, tmp_path, variant):
    export(store, tmp_path / "out", format="rec", variant=variant)
    crops = read_array(stages_of_run(str(store), "tiny")["aligned"], "image", 5, 3)
    found = read_set(tmp_path / "out")
    assert len(found.images) == usable.sum() and found.classes == usable.any(axis=1).sum()
    for record, row, crop in zip(found.images, labels_of(tmp_path / "out"), crops[usable], strict=True):
        assert (decoded(record.image) == crop).all()
        assert record.labels == (float(row["label"]),) and record.key == int(row["key"])


def test_webdataset_reads_the_shards(store, usable, tmp_path, monkeypatch):
    monkeypatch.setattr("negfacediff_core.export.webdataset.SHARD_PIXELS", 2 * 112 * 112 * 3)
    monkeypatch.setitem(flow.FORMATS, "webdataset", flow.FORMATS["webdataset"]._replace(piece=1))
    export(store, tmp_path / "out", format="webdataset")
    shards = sorted(map(str, (tmp_path / "out").glob("shard-*.tar")))
    assert len(shards) > 1
    read = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    crops = read_array(stages_of_run(str(store), "tiny")["aligned"], "image", 5, 3)[usable]
    rows = labels_of(tmp_path / "out")
    assert [sample["__key__"] for sample in read] == [row["key"] for row in rows]
    for sample, crop, row in zip(read, crops, rows, strict=True):
        assert (sample["png"] == crop).all() and sample["cls"] == int(row["label"])
        assert sample["json"]["identity"] == int(row["identity"])
        assert sample["json"]["norm"] == pytest.approx(float(row["norm"]), rel=1e-4)


@pytest.mark.parametrize(("name", "size"), [("0000001_0002.png", 7001), ("a" * 100, 0), ("1.cls", 512)])
def test_headers_of_shards_are_those_of_tarfile(name, size):
    described = tarfile.TarInfo(name)
    described.size = size
    header, data, filling = member(name, b"x" * size)
    assert header == described.tobuf(tarfile.USTAR_FORMAT)
    assert (len(data) + len(filling)) % 512 == 0 and len(filling) < 512


@pytest.mark.slow  # the import of `datasets` takes seconds
@pytest.mark.parametrize("form", ["huggingface", "imagefolder"])
def test_datasets_loads_the_folder_offline(store, usable, tmp_path, form):
    export(store, tmp_path / "out", format=form)
    script = (
        "import datasets, json, sys, numpy\n"
        "train = datasets.load_dataset(sys.argv[1], split='train', cache_dir=sys.argv[2])\n"
        "names = train.features['label'].names\n"
        "print(json.dumps([[int(numpy.asarray(row['image'].convert('RGB'), dtype=int).sum()), row['label'], "
        "names[row['label']]] for row in train]))\n"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "out", tmp_path / "cache"],
        env=offline,
        capture_output=True,
        text=True,
        check=True,
    )
    crops = read_array(stages_of_run(str(store), "tiny")["aligned"], "image", 5, 3)[usable]
    rows = labels_of(tmp_path / "out")
    expected = [
        [int(crop.sum()), int(row["label"]), f"{int(row['identity']):07d}"]
        for crop, row in zip(crops, rows, strict=True)
    ]
    assert json.loads(found.stdout.splitlines()[-1]) == expected


def test_raw_images_are_those_of_the_generator(store, tmp_path):
    export(store, tmp_path / "out", images="raw", status=("ok", "no_face"))
    samples = read_array(stages_of_run(str(store), "tiny")["samples"], "image", 5, 3)
    rows = labels_of(tmp_path / "out")
    assert len(rows) == 15 and rows[0]["detection_score"] != ""
    for row in rows:
        image = decoded((tmp_path / "out" / row["path"]).read_bytes())
        assert (image == samples[int(row["identity"]), int(row["replicate"])]).all()


def test_images_are_chosen_by_quality_and_number(store, usable, tmp_path):
    norms = read_column(stages_of_run(str(store), "tiny")["embeddings"], "norm", 5, 3)
    least = float(np.median(norms[usable]))
    export(store, tmp_path / "quality", min_quality=least)
    kept = [(int(row["identity"]), int(row["replicate"])) for row in labels_of(tmp_path / "quality")]
    assert kept == [tuple(place) for place in np.argwhere(usable & (norms >= least)).tolist()]
    enough = np.flatnonzero(usable.sum(axis=1) >= 2)
    result = export(store, tmp_path / "two", images_per_identity=2, identities=1)
    rows = labels_of(tmp_path / "two")
    assert [int(row["identity"]) for row in rows] == [enough[0]] * 2
    assert [int(row["replicate"]) for row in rows] == np.flatnonzero(usable[enough[0]])[:2].tolist()
    assert result["short"] == 5 - len(enough)


def test_too_few_images_are_refused_with_what_lacks(store, usable, tmp_path):
    counts = usable.sum(axis=1)
    lacking = int((3 - counts[counts < 3]).sum())
    with pytest.raises(
        ConfigError, match=rf"5 identities with 3 usable images .* {lacking} images? in all"
    ) as raised:
        export(store, tmp_path / "out", images_per_identity=3, identities=5)
    assert "--refill" in str(raised.value)
    with pytest.raises(ConfigError, match="none of the images can be used"):
        export(store, tmp_path / "out", min_quality=1e9)
    with pytest.raises(ConfigError, match="build it with embeddings"):
        export(store, tmp_path / "out", min_cosine=0.5)
    with pytest.raises(ConfigError, match=r"at least one identity .* have more made, with negfacediff grow"):
        export(store, tmp_path / "out", min_images=4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("run", "asked", "said"),
    [
        ("tiny", {"identities": 9, "filter": "kept.csv"}, "new images, which are in no filter"),
        ("tiny", {"images_per_identity": 3}, "enough identities: say how many"),
        ("tiny.kept", {"identities": 9}, "what a leakage gate kept of tiny, and does not grow"),
    ],
)
@pytest.mark.usefixtures("kept")
def test_a_refill_that_cannot_help_is_refused_at_once(store, tmp_path, capsys, run, asked, said):
    settings = ExportConfig(**asked)
    with pytest.raises(ConfigError, match=said):
        flow.export_dataset.fn(run, str(tmp_path / "out"), settings, refill=True, store=str(store))
    options = [f"--{name.replace('_', '-')}={value}" for name, value in asked.items()]
    with pytest.raises(SystemExit) as stop:
        main(["export", str(store), run, "--out", str(tmp_path / "out"), "--refill", *options])
    assert stop.value.code == 2 and said in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("kept")
def test_of_too_few_that_a_gate_kept_it_is_said_what_grows(store, tmp_path):
    settings = ExportConfig(identities=9)
    with pytest.raises(
        ConfigError, match=r"grow the run that it came from \(negfacediff grow .* tiny\)"
    ) as error:
        flow.export_dataset.fn("tiny.kept", str(tmp_path / "out"), settings, store=str(store))
    assert "--refill" not in str(error.value)


def test_a_filter_of_another_run_is_refused(store, usable, tmp_path):
    samples = stages_of_run(str(store), "tiny")["samples"].fingerprint
    identity, replicate = np.argwhere(usable)[1].tolist()
    kept = tmp_path / "kept.csv"
    for source in (samples, ""):
        kept.write_text(filter_text([("a", identity, replicate)], source))
        export(store, tmp_path / f"out{source}", filter=str(kept))
        (row,) = labels_of(tmp_path / f"out{source}")
        assert [int(row["identity"]), int(row["replicate"])] == [identity, replicate]
        said = f"| filter | SHA-256 {hashlib.sha256(kept.read_bytes()).hexdigest()} |"
        assert said in (tmp_path / f"out{source}" / "DATASHEET.md").read_text()
    kept.write_text(filter_text([("a", identity, replicate)], "0123456789abcdef"))
    with pytest.raises(ConfigError, match=f"of samples/0123456789abcdef, not of samples/{samples}"):
        export(store, tmp_path / "other", filter=str(kept))


@pytest.mark.parametrize("stage", ["aligned", "evaluation"])
def test_a_run_that_is_not_finished_is_refused(store, tmp_path, stage):
    shutil.copytree(store, tmp_path / "store")
    spec = stages_of_run(str(tmp_path / "store"), "tiny")[stage]
    forget(spec, spec.grid.units()[0])
    with pytest.raises(StoreError, match=r"1 units of the run tiny are missing.*resume"):
        export(tmp_path / "store", tmp_path / "out")


def test_a_refill_finishes_a_growth_that_was_cut_short(store, usable, tmp_path, monkeypatch):
    place = str(shutil.copytree(store, tmp_path / "store"))
    aligned = stages_of_run(place, "tiny")["aligned"]
    forget(aligned, aligned.grid.units()[0])
    asked = []

    def finishing(**given):
        asked.append(growth.grown(place, "tiny", given["identities"], 0, given["until_identities"]))
        shutil.copytree(store, place, dirs_exist_ok=True)

    monkeypatch.setattr(flow, "grow_dataset", finishing)
    settings = ExportConfig(identities=2, images_per_identity=1)
    for out in ("out", "again"):
        flow.export_dataset.fn("tiny", str(tmp_path / out), settings, refill=True, execution=ONE, store=place)
        assert len(labels_of(tmp_path / out)) == 2
    ((build, said),) = asked
    assert (build.identities, build.images) == usable.shape and "is finished first" in said


@pytest.fixture(scope="module")
def kept(store):
    """A run as a leakage gate keeps it."""
    record = read_run(str(store), "tiny")
    settings = {"gallery": "gallery", "policy": "drop", "fmr": 0.001}
    write_run(
        str(store),
        "tiny.kept",
        {"stages": record["stages"], "gate": {"run": "tiny", "settings": settings}, "versions": {}},
    )


@pytest.mark.usefixtures("kept")
def test_a_run_that_a_gate_kept_is_exported_as_any_other(store, usable, tmp_path):
    result = flow.export_dataset.fn("tiny.kept", str(tmp_path / "out"), execution=ONE, store=str(store))
    assert result["images"] == usable.sum()
    assert "A leakage gate took out" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_refill_grows_the_run_until_there_are_enough(store, usable, tmp_path):
    shutil.copytree(store, tmp_path / "store")
    before = contents(tmp_path / "store")
    state = flow.export_dataset(
        "tiny",
        str(tmp_path / "out"),
        ExportConfig(identities=6, images_per_identity=2),
        refill=True,
        execution=ONE.model_copy(update={"accept_licences": True}),
        store=str(tmp_path / "store"),
        return_state=True,
    )
    result = state.result()
    assert state.message.startswith("12 images of 6 identities, ")
    rows = labels_of(tmp_path / "out")
    assert (result["images"], result["identities"]) == (12, 6)
    assert [int(row["label"]) for row in rows] == np.repeat(range(6), 2).tolist()
    chosen = [int(row["identity"]) for row in rows][::2]
    # the first six that have enough by now; those that had it before are among them
    assert chosen == sorted(chosen)
    assert set(np.flatnonzero(usable.sum(axis=1) >= 2)) <= set(chosen)
    after = contents(tmp_path / "store")
    assert all(after[path] == data for path, data in before.items() if "/done/" in path)
    mine = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        shown = {one.key: one.data for one in client.read_artifacts(artifact_filter=mine)}
    assert shown["dataset-export"] == 100
    assert "12 images of 6 identities" in shown["export"] and f"`{tmp_path / 'out'}`" in shown["export"]
    assert "Left out: " in shown["export"] and "Licence: CC0 1.0." in shown["export"]


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_the_command_says_what_it_wrote_and_what_was_left_out(store, usable, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "export",
                str(store),
                "tiny",
                "--out",
                str(tmp_path / "out"),
                "--min-images",
                "2",
                "--workers",
                "1",
            ]
        )
    assert stop.value.code == 0
    said = capsys.readouterr().out
    short = int((usable.sum(axis=1) < 2).sum())
    assert f"Left out: {short} identities with fewer than 2 usable images" in said
    assert "Licence: CC0 1.0." in said and f"{tmp_path / 'out'}/README.md" in said
    for options, wrong in (
        (["--out", "s3://bucket/out"], "no local folder"),
        (["--out", str(tmp_path / "new"), "--status", "no_face"], "have no aligned crop"),
        (
            ["--out", str(tmp_path / "new"), "--min-cosine", "0.5", "--max-cosine", "0.1"],
            "no image is in that",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["export", str(store), "tiny", *options])
        assert stop.value.code == 2 and wrong in capsys.readouterr().err


def test_an_export_for_a_challenge_keeps_its_limits_and_says_so(store, usable, tmp_path):
    with pytest.raises(ConfigError, match="10,000 identities with 50 usable images each were asked for"):
        export(store, tmp_path / "whole", challenge="frcsyn-500k")
    with pytest.raises(ConfigError, match="no leakage gate has taken such people out of the run tiny"):
        export(store, tmp_path / "real", challenge="datacv-10k")
    assert not list(tmp_path.iterdir())
    made = export(store, tmp_path / "out", challenge="sdfr-1m", images_per_identity=1)
    assert made["images"] == (usable.sum(axis=1) >= 1).sum()
    assert "SDFR (arXiv 2404.04580), task 1" in (tmp_path / "out" / "README.md").read_text()


def test_more_images_than_a_challenge_allows_are_refused(store, tmp_path, monkeypatch):
    limits = challenges.CHALLENGES[Challenge.sdfr_1m]
    monkeypatch.setitem(challenges.CHALLENGES, Challenge.sdfr_1m, replace(limits, images=2))
    with pytest.raises(ConfigError, match="allows 2 images"):
        export(store, tmp_path / "out", challenge="sdfr-1m", images_per_identity=1)
    assert not list(tmp_path.iterdir())

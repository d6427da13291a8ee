"""The stages of the leakage gate: who is found, what is refused, and that a run without what leaks is made of
copies.
"""

import json
import re
import shutil

import numpy as np
import pytest
import yaml
from context_material import save_pack, save_pictures
from PIL import Image
from stage_builds import EXECUTION, changed, make

from flows.leakage import GateRecord, gate_names, holds_kept
from flows.leakage_plan import estimate
from negfacediff_core.config import LeakageConfig
from negfacediff_core.errors import ConfigError, ContextsError, StoreError, WeightsError
from negfacediff_core.evaluation.leakage import search_operations
from negfacediff_core.faces.align import TEMPLATE_112, similarity_transform, warp
from negfacediff_core.faces.detect import load_detector, main_face
from negfacediff_core.faces.embed import load_embedder
from negfacediff_core.stages import gallery as gallery_stage
from negfacediff_core.stages import kept
from negfacediff_core.stages.build import run_unit
from negfacediff_core.stages.gate import _shortened, plan_gate
from negfacediff_core.stages.leakage import leaking, read_report, thresholds_at
from negfacediff_core.store.extents import read_array, read_column
from negfacediff_core.store.layout import Unit
from negfacediff_core.store.records import pending
from negfacediff_core.store.runs import run_names, write_run
from negfacediff_core.store.shards import prepare, read_arrays, read_file, read_rows
from negfacediff_core.store.verify import check_units, survey

EXTENT = (5, 3)


@pytest.fixture
def store(tiny_store, tmp_path):
    return shutil.copytree(tiny_store, tmp_path / "store")


def run_gate(store, **settings):
    """Plan a gate of the tiny run and make all of it."""
    gate = plan_gate(str(store), "tiny", LeakageConfig(**settings))
    for spec in gate.stages.values():
        prepare(spec)
        for unit in pending(spec):
            run_unit(spec, unit, EXECUTION)
    return gate


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def judged(gate):
    """The judge's unit embeddings of the run's images `(5, 3, 16)`, and which there are."""
    embeddings = read_array(gate.run["embeddings"], "embedding", *EXTENT).astype(np.float64)
    valid = read_column(gate.run["embeddings"], "status", *EXTENT) == "ok"
    lengths = np.linalg.norm(embeddings, axis=2, keepdims=True)
    return embeddings / np.where(valid[..., None], lengths, 1), valid


def test_every_image_and_centre_has_its_nearest_of_a_folder(store, tiny_pack, tmp_path):
    gallery = tmp_path / "people"
    for person in range(4):
        save_pictures(gallery / f"p{person}", range(10 * person, 10 * person + 2))
    save_pictures(gallery / "p1", [19], face=False)
    (gallery / "p2" / "broken.png").write_bytes(b"no picture")
    gate = run_gate(store, gallery=str(gallery))

    detector, judge = load_detector(tiny_pack / "faces"), load_embedder(tiny_pack / "judge")
    names, faces = [], []
    for path in sorted(gallery.rglob("0*.png")):
        image = np.array(Image.open(path))
        found = detector.detect(image[None])[0]
        if len(found.scores):
            landmarks = found.landmarks[main_face(found, *image.shape[:2])]
            crop = warp(image, similarity_transform(landmarks, TEMPLATE_112))
            names.append(path.relative_to(gallery).as_posix())
            faces.append(judge.embed(crop[None])[0])
    faces = unit(np.array(faces, np.float64))
    embeddings, valid = judged(gate)
    assert valid.any() and not valid.all() and len(faces) == 8

    rows = read_rows(gate.stages["gallery"], Unit(0, 0))
    status = dict(zip(rows.column("name").to_pylist(), rows.column("status").to_pylist(), strict=True))
    assert {name for name, one in status.items() if one == "ok"} == set(names)
    assert (status["p1/019.png"], status["p2/broken.png"]) == ("no_face", "failed")
    assert rows.column("person").to_pylist() == [int(name[1]) for name in rows.column("name").to_pylist()]

    found = gate.stages["neighbours"]
    cosine = read_column(found, "first_cosine", *EXTENT)
    nearest = read_column(found, "first_nearest", *EXTENT)
    expected = embeddings[valid] @ faces.T
    np.testing.assert_allclose(cosine[valid], expected.max(axis=1), atol=1e-6)
    named = np.array(rows.column("name").to_pylist())[nearest[valid]]
    assert named.tolist() == [names[index] for index in expected.argmax(axis=1)]
    assert np.isnan(cosine[~valid]).all() and (nearest[~valid] == -1).all()

    counted = read_rows(gate.stages["leakage"], Unit(0, 0))
    for identity, there in enumerate(valid):
        expected = np.nan
        if there.any():
            expected = (unit(embeddings[identity][there].sum(axis=0)) @ faces.T).max()
        assert counted.column("first_cosine")[identity].as_py() == pytest.approx(
            expected, abs=1e-6, nan_ok=True
        )
    report = read_report(gate.stages["leakage"])
    assert report["compared"] == valid.sum()
    assert {key: report["gallery"][key] for key in ("images", "faces", "people")} == {
        "images": 10,
        "faces": 8,
        "people": 4,
    }
    # eight faces of four people: 24 pairs are too few for any rate, and nothing is counted
    (judge,) = report["recognisers"]
    assert judge["impostor_pairs"] == 24
    assert [row["threshold"] for row in judge["rates"]] == [None] * 3
    assert [row["images"] for row in judge["rates"]] == [None] * 3
    worst = judge["worst_images"][0]
    assert worst["cosine"] == np.nanmax(cosine) == cosine[worst["identity"], worst["replicate"]]
    with pytest.raises(ConfigError, match=r"24 impostor pairs, too few .* FMR 0\.001, which takes 10,000"):
        thresholds_at(report, 1e-3)
    assert survey(str(store)).findings == [] == list(check_units(survey(str(store)).units))


@pytest.fixture
def known_faces(store, tmp_path, tiny_pack):
    """A file of embeddings: 200 strangers, and two images of the run itself."""
    gate = plan_gate(str(store), "tiny", LeakageConfig(gallery=str(save_pictures(tmp_path / "one", [1]))))
    embeddings, valid = judged(gate)
    own = embeddings[valid][[0, 7]]
    # as close to each other as images of the tiny networks are
    noise = 0.03 * np.random.default_rng(0).standard_normal((200, embeddings.shape[-1]))
    strangers = unit(unit(embeddings[valid].mean(axis=0)) + noise)
    file = tmp_path / "gallery.npz"
    names = [f"stranger {number}" for number in range(200)] + ["leaked 0", "leaked 1"]
    np.savez(file, embeddings=np.concatenate([strangers, own]).astype(np.float32), names=names)
    return str(file), [tuple(map(int, place)) for place in np.argwhere(valid)[[0, 7]]]


def test_what_leaks_is_listed_and_left_out_of_a_run_of_copies(store, tiny_build, known_faces):
    file, own = known_faces
    gate = run_gate(store, gallery=file)
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    counted = gate.stages["leakage"]
    report = read_report(counted)
    (threshold,) = thresholds_at(report, 1e-3)
    cosine = read_column(gate.stages["neighbours"], "first_cosine", *EXTENT)
    expected = cosine >= threshold
    assert threshold < 1 and all(cosine[place] == pytest.approx(1) for place in own)
    listed = leaking(counted, 1e-3)
    places = list(zip(*(listed.column(axis).to_pylist() for axis in ("identity", "replicate")), strict=True))
    assert places == [tuple(place) for place in np.argwhere(expected)]
    names = dict(zip(places, listed.column("first_nearest").to_pylist(), strict=True))
    assert [names[place] for place in own] == ["leaked 0", "leaked 1"]
    row = report["recognisers"][0]["rates"][0]
    assert (row["images"], row["identities"]) == (expected.sum(), expected.any(axis=1).sum())
    assert report["rates"][0] == {"fmr": 1e-3, "some": row["images"], "all": row["images"]}
    assert report["rates"][2] == {"fmr": 1e-5, "some": None, "all": None}

    marked = kept.plan(gate.run["embeddings"], counted, 1e-3)
    made = kept.remake(tiny_build, gate.run, marked)
    assert {"embeddings", "evaluation"} <= made.keys() and "aligned" not in made
    for spec in made.values():
        prepare(spec)
    for one in pending(marked):
        kept.mark_unit(marked, one)
    for spec in made.values():
        for one in pending(spec):
            run_unit(spec, one, EXECUTION)
    valid = read_column(gate.run["embeddings"], "status", *EXTENT) == "ok"
    status = read_column(marked, "status", *EXTENT)
    np.testing.assert_array_equal(status == kept.LEAKED, expected)
    np.testing.assert_array_equal(status == "ok", valid & ~expected)
    for one in marked.grid.units():
        original = read_arrays(gate.run["embeddings"], one)
        assert all(
            np.array_equal(values, original[name]) for name, values in read_arrays(marked, one).items()
        )
    figures = json.loads(read_file(made["evaluation"], Unit(0, 0), "report.json"))
    left = int((valid & ~expected).sum())
    assert (figures["kept_images"], figures["kept_fraction"]) == (left, left / 15)
    pairs = figures["genuine_count"] + figures["impostor_count"]
    assert pairs == left * (left - 1) // 2 and 2 < left < valid.sum()
    changed_files = [path for path, content in before.items() if path.read_bytes() != content]
    assert changed_files == []


def test_two_recognisers_are_both_asked(store, tiny_pack, tmp_path):
    second = tmp_path / "second" / "judge.onnx"
    second.parent.mkdir()
    # the same network to every pixel, but another file
    content = (tiny_pack / "judge" / "judge.onnx").read_bytes()
    second.write_bytes(content.replace(b"pytorch", b"pyTorch", 1))
    assert second.read_bytes() != content
    gallery = save_pictures(tmp_path / "people", range(5))
    gate = run_gate(store, gallery=str(gallery), recognisers=(str(tiny_pack / "judge"), str(second)))
    found = gate.stages["neighbours"]
    for column in ("nearest", "cosine"):
        one, other = (read_column(found, f"{role}_{column}", *EXTENT) for role in ("first", "second"))
        np.testing.assert_array_equal(one, other)
    report = read_report(gate.stages["leakage"])
    assert [one["recogniser"] for one in report["recognisers"]] == ["judge/judge.onnx", "second/judge.onnx"]
    assert report["recognisers"][0]["sha256"] != report["recognisers"][1]["sha256"]


def test_a_gallery_is_embedded_once_and_another_one_elsewhere(store, tmp_path, monkeypatch):
    monkeypatch.setattr("negfacediff_core.stages.gallery.BLOCK", 2)
    gallery = save_pictures(tmp_path / "people", range(5))
    gate = run_gate(store, gallery=str(gallery))
    again = plan_gate(str(store), "tiny", LeakageConfig(gallery=str(gallery)))
    assert [pending(spec) for spec in again.stages.values()] == [[], [], []]
    assert [unit.identity_block for unit in again.stages["gallery"].grid.units()] == [0, 1, 2]
    save_pictures(gallery, [9])
    other = plan_gate(str(store), "tiny", LeakageConfig(gallery=str(gallery)))
    assert all(other.stages[name].fingerprint != spec.fingerprint for name, spec in gate.stages.items())
    assert len(pending(other.stages["gallery"])) == 3


def test_gates_are_told_apart_by_gallery_recognisers_and_detector(store, tiny_pack, tmp_path):
    def label(gallery, **settings):
        return plan_gate(str(store), "tiny", LeakageConfig(gallery=str(gallery), **settings)).label

    faces = save_pictures(tmp_path / "Training images, all 4 of them", range(4))
    first = label(faces)
    assert re.fullmatch("training-images-[0-9a-f]{6}", first) and label(faces) == first
    copied = label(shutil.copytree(faces, tmp_path / "copy"))
    assert copied == f"copy-{first[-6:]}"
    save_pictures(faces, [9])
    assert label(faces)[:-6] == first[:-6] and label(faces) != first
    second = save_pack(tmp_path / "pack", tiny_pack) / "recogniser.onnx"
    second.write_bytes(second.read_bytes().replace(b"pytorch", b"pyTorch", 1))
    others = {
        label(faces),
        label(faces, recognisers=(str(second.parent),)),
        label(faces, recognisers=(str(tiny_pack / "judge"), str(second.parent))),
        label(faces, detector_size=96),
    }
    assert len(others) == 4
    kept = gate_names("r" * 63, f"{'g' * 16}-{first[-6:]}").kept
    longest = gate_names(kept, f"{'g' * 16}-{first[-6:]}").counts
    write_run(str(store), longest, {"stages": {}})
    assert longest in run_names(str(store))
    with pytest.raises(StoreError, match="use 1 to 200 lower-case letters"):
        write_run(str(store), 3 * longest, {"stages": {}})


@pytest.mark.parametrize(
    "name, short",
    [
        ("faces", "faces"),
        ("public-test-sets-of-2024", "public-test-sets"),
        ("photographs-of-people", "photographs-of"),
        ("allphotographsofpeople", "allphotographsof"),
    ],
)
def test_the_name_of_a_gallery_is_cut_between_words(name, short):
    assert _shortened(name) == short


@pytest.mark.parametrize(
    "name, kept",
    [("a.kept", True), ("a.kept.set-12", True), ("a.leakage.set-12", False), ("a.keptish", False)],
)
def test_runs_of_a_gate_are_known_with_a_gallery_in_their_name_and_without(name, kept):
    gate = GateRecord(run="a", settings=LeakageConfig(gallery="people"))
    assert holds_kept(name, gate) is kept


def test_a_gallery_that_changes_under_the_gate_is_refused(store, tmp_path):
    gallery = save_pictures(tmp_path / "people", range(3))
    gate = plan_gate(str(store), "tiny", LeakageConfig(gallery=str(gallery)))
    save_pictures(gallery, [7])
    prepare(gate.stages["gallery"])
    gallery_stage._folder.cache_clear()  # as in another process
    with pytest.raises(WeightsError, match="has changed since"):
        run_unit(gate.stages["gallery"], Unit(0, 0), EXECUTION)


def test_the_dry_run_counts_what_is_left_and_writes_nothing(store, tmp_path):
    gallery = save_pictures(tmp_path / "people", range(6))
    settings = LeakageConfig(gallery=str(gallery))
    gate = plan_gate(str(store), "tiny", settings)
    before = sorted(store.rglob("*"))
    planned = estimate(gate, EXECUTION)
    images, embed, search, centres, compare = planned.rows
    # units are whole: 6 identities x 4 images
    assert (images.left, embed.left) == ("6 images", "24 images")
    assert [row.left for row in (search, centres, compare)] == ["24 x 6", "5 x 6", "6 x 6"]
    assert search.operations == search_operations(24, 6, 16) == 2 * 24 * 6 * 16
    assert all(row.seconds > 0 for row in planned.rows)
    assert planned.disk == 4 * 16 * (6 + 24)
    assert sorted(store.rglob("*")) == before
    run_gate(store, gallery=str(gallery))
    done = estimate(plan_gate(str(store), "tiny", settings), EXECUTION)
    assert [row.seconds for row in done.rows] == [0] * 5


def refused(kind, message, store, **settings):
    with pytest.raises(kind, match=message):
        plan_gate(str(store), settings.pop("run", "tiny"), LeakageConfig(**settings))


def test_bad_input_is_refused_before_anything_is_written(store, tiny_pack, tmp_path, known_faces):
    people = str(save_pictures(tmp_path / "people", range(3)))
    before = sorted(store.rglob("*"))
    judge, empty = str(tiny_pack / "judge"), tmp_path / "empty"
    empty.mkdir()
    refused(StoreError, "There is no run tinny in .*; runs there: tiny", store, gallery=people, run="tinny")
    refused(WeightsError, "nothing at nowhere", store, gallery="nowhere")
    refused(
        ContextsError,
        "holds no images",
        store,
        gallery=str(empty),
    )
    refused(
        WeightsError,
        "recogniser: .* holds no recognition",
        store,
        gallery=people,
        recognisers=(str(tiny_pack / "faces"),),
    )
    refused(ConfigError, "both recognisers are", store, gallery=people, recognisers=(judge, judge))
    refused(
        ConfigError,
        r"fmr is 0\.01, but thresholds are made at 0\.001, 0\.0001, 1e-05",
        store,
        gallery=people,
        fmr=0.01,
    )
    narrow = tmp_path / "narrow.npz"
    np.savez(narrow, embeddings=np.ones((4, 3), np.float32))
    refused(ContextsError, r"holds embeddings \(4, 3\), but .* \(images, 16\)", store, gallery=str(narrow))
    zero = tmp_path / "zero.npz"
    np.savez(
        zero, embeddings=np.eye(4, 16, k=1, dtype=np.float32) * np.array([1, 0, 1, 1], np.float32)[:, None]
    )
    refused(
        ContextsError,
        r"has 1 rows that are not finite or zero \(the first is row 1\)",
        store,
        gallery=str(zero),
    )
    second = save_pack(tmp_path / "pack", tiny_pack) / "recogniser.onnx"
    second.write_bytes(second.read_bytes().replace(b"pytorch", b"pyTorch", 1))
    refused(
        ContextsError,
        "of one recogniser, but two are asked",
        store,
        gallery=known_faces[0],
        recognisers=(judge, str(second.parent)),
    )
    assert sorted(store.rglob("*")) == before


def test_the_recogniser_that_conditioned_the_generator_is_refused(tiny_build, tiny_pack, tmp_path):
    generator = shutil.copytree(tiny_pack / "generator", tmp_path / "generator")
    second = save_pack(tmp_path / "pack", tiny_pack) / "recogniser.onnx"
    second.write_bytes(second.read_bytes().replace(b"pytorch", b"pyTorch", 1))
    config = generator / ".hydra" / "config.yaml"
    content = yaml.safe_load(config.read_text())
    content["constants"]["conditioner_sha256"] = load_embedder(second).sha256
    config.write_text(yaml.safe_dump(content))
    store = tmp_path / "store"
    make(changed(tiny_build, samples__generator=str(generator)), store)
    people = str(save_pictures(tmp_path / "people", range(3)))
    assert plan_gate(str(store), "tiny", LeakageConfig(gallery=people)).conditioner_known
    refused(
        ConfigError,
        "conditioned the generator, which learned to please it",
        store,
        gallery=people,
        recognisers=(str(second),),
    )
    shutil.rmtree(generator)
    assert not plan_gate(str(store), "tiny", LeakageConfig(gallery=people)).conditioner_known


def test_a_run_that_is_not_finished_is_refused(tiny_store, tmp_path):
    store = shutil.copytree(tiny_store, tmp_path / "my store")
    next((store / "embeddings").rglob("done/*.json")).unlink()
    people = str(save_pictures(tmp_path / "people", range(3)))
    refused(
        StoreError,
        "1 units .* of the run tiny are missing: .* negfacediff resume '.*/my store' tiny",
        store,
        gallery=people,
    )

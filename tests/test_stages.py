"""What the stages of a build make of each other, in any order, interrupted, grown or shared."""

import json
import pickle
import shutil

import numpy as np
import pytest
from stage_builds import EXECUTION, changed, make, planned
from stored_files import results

from negfacediff_core.diffusion.engine import Samples, SamplingEngine
from negfacediff_core.errors import BuildError, ContextsError, StoreError
from negfacediff_core.evaluation.figures import FIGURES, SETTINGS
from negfacediff_core.faces.detect import Faces, main_face
from negfacediff_core.stages.build import plan_build, run_unit
from negfacediff_core.stages.contexts import contexts_of
from negfacediff_core.stages.evaluation import score_panel, sheet_panel
from negfacediff_core.stages.negatives import stored_negatives
from negfacediff_core.store.extents import read_array, read_column
from negfacediff_core.store.layout import Unit
from negfacediff_core.store.records import committed, pending
from negfacediff_core.store.shards import read_file


@pytest.fixture(scope="module")
def built(tiny_build, tmp_path_factory):
    """The tiny build, whole; tests only read it."""
    store = tmp_path_factory.mktemp("built")
    return make(tiny_build, store, pictures=True), store


def test_every_sample_has_its_row_in_every_stage(built):
    specs, _ = built
    for name in ("samples", "aligned", "embeddings"):
        identity = read_column(specs[name], "identity", 5, 3)
        replicate = read_column(specs[name], "replicate", 5, 3)
        np.testing.assert_array_equal(identity, np.arange(5)[:, None] + np.zeros((1, 3), int))
        np.testing.assert_array_equal(replicate, np.zeros((5, 1), int) + np.arange(3))
    assert set(read_column(specs["samples"], "status", 5, 3).ravel()) == {"ok"}


def test_images_without_a_face_are_flagged_and_masked(built):
    specs, _ = built
    aligned, judged = (read_column(specs[name], "status", 5, 3) for name in ("aligned", "embeddings"))
    assert set(aligned.ravel()) == {"ok", "no_face"}, "the tiny detector should find faces in some images"
    assert (judged[aligned == "ok"] == "ok").all()
    assert (judged[aligned == "no_face"] == "skipped").all()
    crops = read_array(specs["aligned"], "image", 5, 3)
    embeddings = read_array(specs["embeddings"], "embedding", 5, 3)
    assert not crops[aligned == "no_face"].any()
    assert not embeddings[aligned == "no_face"].any()
    norms = np.linalg.norm(embeddings, axis=-1)
    assert (norms[aligned == "ok"] > 0).all()
    np.testing.assert_allclose(read_column(specs["embeddings"], "norm", 5, 3), norms, rtol=1e-6)


def test_the_report_has_what_the_page_shows(built):
    specs, _ = built
    spec = specs["evaluation"]
    report = json.loads(read_file(spec, Unit(0, 0), "report.json"))
    assert set(SETTINGS) <= set(report)
    needed = {figure.key for figure in FIGURES if not figure.optional} - {"images_per_second"}
    assert needed <= set(report)
    assert (report["rule"], report["w"], report["identities"], report["images"]) == ("far", 0.5, 5, 15)
    detected = read_column(specs["aligned"], "status", 5, 3) == "ok"
    assert report["detected_fraction"] == pytest.approx(detected.mean())
    low, high = report["fdr_interval"]
    assert low <= high
    cosines = stored_negatives(specs["negatives"], np.arange(5)).cosine
    assert report["negative_cosine"] == pytest.approx(cosines.mean())
    assert report["negative_cosine_range"] == [cosines.min(), cosines.max()]
    for picture in ("histogram.png", "contact_sheet.png"):
        assert read_file(spec, Unit(0, 0), picture).startswith(b"\x89PNG")
    assert score_panel(spec, "far").genuine.size == report["genuine_count"]
    panel = sheet_panel(spec, "far", 3, 9)
    assert panel.images.shape == (3, 3, 32, 32, 3)
    np.testing.assert_array_equal(panel.detected, detected[:3])


def test_negatives_are_other_identities_of_the_pool(built):
    specs, _ = built
    identities = np.arange(1024)
    negatives = stored_negatives(specs["negatives"], identities).index[:, 0]
    assert ((negatives >= 0) & (negatives < 5) & (negatives != identities)).all()
    contexts = contexts_of(specs["contexts"], identities)
    cosines = contexts[:5] @ contexts[:5].T
    np.testing.assert_array_equal(negatives[:5], cosines.argmin(axis=1))


def test_a_build_interrupted_and_in_another_order_gives_the_same_bytes(built, tiny_build, tmp_path):
    _, store = built
    specs = make(tiny_build, tmp_path, stages=("contexts", "negatives"))
    for unit in pending(specs["samples"])[::2]:
        run_unit(specs["samples"], unit, EXECUTION)
    run_unit(specs["aligned"], committed(specs["samples"])[0], EXECUTION)
    with pytest.raises(StoreError, match=r"aligned 00000-001: unit .* of .*samples.* is not committed"):
        run_unit(specs["aligned"], Unit(0, 1), EXECUTION)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("done/*.json")}
    assert len(before) > 4
    make(tiny_build, tmp_path, reverse=True, pictures=True)
    assert results(tmp_path) == results(store)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_a_committed_unit_is_not_computed_again(built, monkeypatch):
    specs, _ = built
    monkeypatch.setattr(SamplingEngine, "sample", None)
    record = run_unit(specs["samples"], Unit(0, 0), EXECUTION)
    assert record.rows == 4


def test_a_dataset_grows_along_both_axes_and_nothing_moves(built, tiny_build, tmp_path):
    _, store = built
    shutil.copytree(store, tmp_path, dirs_exist_ok=True)
    before = {name: value for name, value in results(tmp_path).items() if not name.endswith("zarr.json")}
    grown = changed(tiny_build, identities=7, images=5, block_identities=3)
    specs = planned(grown, tmp_path)
    assert specs["negatives"].config["pool"] == 5, "the pool stays that of the first build of this name"
    assert specs["samples"].grid.block_identities == 2, "a store keeps its first blocks"
    assert len(pending(specs["samples"])) == 4 * 3 - 3 * 2
    make(grown, tmp_path, stages=("contexts", "negatives", "samples"))
    after = results(tmp_path)
    moved = [name for name in before if after[name] != before[name]]
    assert not moved


def test_two_builds_share_what_they_have_in_common(built, tiny_build, tmp_path):
    specs, _ = built
    plain = changed(tiny_build, name="plain", negatives__rule="none", samples__w=0)
    others = {spec.name: spec for spec in plan_build(plain, str(tmp_path))}
    assert others["contexts"].fingerprint == specs["contexts"].fingerprint
    for name in ("negatives", "samples", "aligned", "embeddings", "evaluation"):
        assert others[name].fingerprint != specs[name].fingerprint


@pytest.mark.parametrize("rule", ["none", "null", "rand"])
def test_other_rules_give_other_images_of_the_same_noise(rule, built, tiny_build, tmp_path):
    specs, _ = built
    other = changed(tiny_build, negatives__rule=rule, samples__w=0 if rule == "none" else 0.5)
    others = make(other, tmp_path, stages=("contexts", "negatives"))
    run_unit(others["samples"], Unit(0, 0), EXECUTION)
    mine, far = (read_array(each["samples"], "image", 2, 2) for each in (others, specs))
    assert (mine != far).any()
    assert np.abs(mine.astype(int) - far).mean() < np.abs(mine.astype(int) - mine[::-1]).mean()


@pytest.mark.parametrize(("rule", "contexts"), [("none", 1), ("null", 2), ("rand", 3)])
def test_a_build_of_every_rule_ends_with_the_evaluations_that_its_images_took(
    rule, contexts, tiny_build, tmp_path
):
    settings = {"samples__w": 0 if rule == "none" else 0.5, "negatives__count": max(1, contexts - 1)}
    specs = make(changed(tiny_build, negatives__rule=rule, **settings), tmp_path)
    report = json.loads(read_file(specs["evaluation"], Unit(0, 0), "report.json"))
    assert report["network_evaluations"] == contexts * specs["samples"].config["steps"]


@pytest.mark.parametrize("rule", ["none", "null"])
def test_rules_that_name_nobody_take_a_last_block_of_one_identity(rule, tiny_build, tmp_path, monkeypatch):
    monkeypatch.setattr("negfacediff_core.stages.contexts.BLOCK", 4)
    contexts = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    np.savez(tmp_path / "contexts.npz", contexts=contexts)
    file = {"contexts__source": "file", "contexts__file": str(tmp_path / "contexts.npz")}
    build = changed(tiny_build, negatives__rule=rule, samples__w=0, **file)
    specs = make(build, tmp_path, stages=("contexts", "negatives"))
    assert list(specs["negatives"].grid.identities_of(Unit(1, 0))) == [4]
    assert stored_negatives(specs["negatives"], np.arange(5)).index.tolist() == [[-1]] * 5


def test_contexts_from_a_file_end_where_it_ends(tiny_build, tmp_path):
    contexts = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    np.savez(tmp_path / "contexts.npz", contexts=contexts)
    settings = {"source": "file", "file": str(tmp_path / "contexts.npz")}
    build = changed(tiny_build, contexts=settings)
    specs = make(build, tmp_path / "store", stages=("contexts", "negatives", "samples"))
    assert list(specs["samples"].grid.identities_of(Unit(2, 0))) == [4]
    assert read_array(specs["samples"], "image", 5, 3).any(axis=(2, 3, 4)).all()
    unit = contexts / np.linalg.norm(contexts, axis=1, keepdims=True)
    np.testing.assert_allclose(contexts_of(specs["contexts"], np.arange(5)), unit, atol=1e-6)
    with pytest.raises(ContextsError, match="6 identities were asked for but only 5 contexts"):
        plan_build(changed(tiny_build, contexts=settings, identities=6), str(tmp_path / "store"))


def test_an_image_that_is_not_finite_is_a_failed_row_all_the_way(tiny_build, tmp_path, monkeypatch):
    sample = SamplingEngine.sample

    def spoil(self, *arguments):
        images, clipped = sample(self, *arguments)
        clipped[1] = np.nan
        return Samples(images, clipped)

    monkeypatch.setattr(SamplingEngine, "sample", spoil)
    specs = planned(tiny_build, tmp_path)
    for name in ("contexts", "negatives", "samples", "aligned", "embeddings"):
        record = run_unit(specs[name], Unit(0, 0), EXECUTION)
        if name == "samples":
            assert (record.ok, record.failed) == (3, 1)
    statuses = [
        read_column(specs[name], "status", 2, 2)[0, 1] for name in ("samples", "aligned", "embeddings")
    ]
    assert statuses == ["failed", "failed", "skipped"]
    assert not read_array(specs["samples"], "image", 2, 2)[0, 1].any()
    assert "not finite" in read_column(specs["samples"], "error", 2, 2)[0, 1]


def test_an_unexpected_error_names_its_unit(tiny_build, tmp_path, monkeypatch):
    specs = make(tiny_build, tmp_path, stages=("contexts", "negatives"))

    def fail(self, *arguments):
        raise RuntimeError("the device fell over")

    monkeypatch.setattr(SamplingEngine, "sample", fail)
    with pytest.raises(BuildError, match="samples 00001-000: RuntimeError: the device fell over"):
        run_unit(specs["samples"], Unit(1, 0), EXECUTION)
    assert Unit(1, 0) in pending(specs["samples"])


def test_specs_travel_between_processes(built):
    specs, _ = built
    for spec in specs.values():
        again = pickle.loads(pickle.dumps(spec))
        assert (again, again.directory) == (spec, spec.directory)


def test_the_main_face_is_large_and_central():
    boxes = np.array([[0, 0, 20, 20], [50, 50, 66, 66], [85, 85, 128, 128]], np.float32)
    faces = Faces(boxes, np.array([0.9, 0.8, 0.7], np.float32), np.zeros((3, 5, 2), np.float32))
    assert main_face(faces, 116, 116) == 1
    assert main_face(Faces(*(part[[0, 2]] for part in faces)), 116, 116) == 1

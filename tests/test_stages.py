import hashlib
import json
import os
import pickle
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from pydantic import BaseModel

from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.diffusion.engine import SamplerSettings, Samples, SamplingEngine
from negfacediff_core.errors import BuildError, ConfigError, ContextsError, StoreError, WeightsError
from negfacediff_core.evaluation.figures import FIGURES, SETTINGS
from negfacediff_core.faces.detect import Faces
from negfacediff_core.stages import STAGES, pending_units, plan_build, run_unit
from negfacediff_core.stages.aligned import main_face
from negfacediff_core.stages.contexts import contexts_of
from negfacediff_core.stages.evaluation import score_panel, sheet_panel
from negfacediff_core.stages.samples import negatives_of
from negfacediff_core.store.extents import read_array, read_column
from negfacediff_core.store.layout import Unit
from negfacediff_core.store.records import committed
from negfacediff_core.store.runs import write_run
from negfacediff_core.store.shards import prepare, read_file

EXECUTION = ExecutionConfig(device="cpu")


def changed(build, **changes):
    """A build with other values, given as `section__field=value` or `field=value`."""
    values = build.model_dump()
    for path, value in changes.items():
        *sections, field = path.split("__")
        place = values
        for section in sections:
            place = place[section]
        place[field] = value
    return BuildConfig.model_validate(values)


def planned(build, store):
    """Plan a build and make its directories and run record, as the flow does."""
    specs = plan_build(build, str(store))
    for spec in specs:
        prepare(spec)
    stages = {
        spec.name: {
            "fingerprint": spec.fingerprint,
            "identities": spec.grid.identities,
            "replicates": spec.grid.replicates,
        }
        for spec in specs
    }
    write_run(str(store), build.name, {"stages": stages})
    return {spec.name: spec for spec in specs}


def make(build, store, stages=tuple(STAGES), reverse=False):
    specs = planned(build, store)
    for name in stages:
        for unit in sorted(pending_units(specs[name]), reverse=reverse):
            run_unit(specs[name], unit, EXECUTION)
    return specs


def results(store):
    """Hash of every file that holds results; completion records hold times."""
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(store).rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.parent.name != "done"
    }


@pytest.fixture(scope="module")
def built(tiny_build, tmp_path_factory):
    """The tiny build, whole; tests only read it."""
    store = tmp_path_factory.mktemp("built")
    return make(tiny_build, store), store


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
    for picture in ("histogram.png", "contact_sheet.png"):
        assert read_file(spec, Unit(0, 0), picture).startswith(b"\x89PNG")
    assert score_panel(spec, "far").genuine.size == report["genuine_count"]
    panel = sheet_panel(spec, "far", 3, 9)
    assert panel.images.shape == (3, 3, 32, 32, 3)
    np.testing.assert_array_equal(panel.detected, detected[:3])


def test_negatives_are_other_identities_of_the_pool(built):
    specs, _ = built
    identities = np.arange(1024)
    negatives = negatives_of(specs["negatives"], identities)
    assert ((negatives >= 0) & (negatives < 5) & (negatives != identities)).all()
    contexts = contexts_of(specs["contexts"], identities)
    cosines = contexts[:5] @ contexts[:5].T
    np.testing.assert_array_equal(negatives[:5], cosines.argmin(axis=1))


def test_a_build_interrupted_and_in_another_order_gives_the_same_bytes(built, tiny_build, tmp_path):
    _, store = built
    specs = make(tiny_build, tmp_path, stages=("contexts", "negatives"))
    for unit in pending_units(specs["samples"])[::2]:
        run_unit(specs["samples"], unit, EXECUTION)
    run_unit(specs["aligned"], committed(specs["samples"])[0], EXECUTION)
    with pytest.raises(StoreError, match=r"aligned 00000-001: unit .* of .*samples.* is not committed"):
        run_unit(specs["aligned"], Unit(0, 1), EXECUTION)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("done/*.json")}
    assert len(before) > 4
    make(tiny_build, tmp_path, reverse=True)
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
    assert len(pending_units(specs["samples"])) == 4 * 3 - 3 * 2
    make(grown, tmp_path, stages=("contexts", "negatives", "samples"))
    after = results(tmp_path)
    moved = [name for name in before if after[name] != before[name]]
    assert moved == ["runs/tiny.json"]


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


@pytest.mark.parametrize("rule", ["none", "null"])
def test_rules_that_name_nobody_take_a_last_block_of_one_identity(rule, tiny_build, tmp_path, monkeypatch):
    monkeypatch.setattr("negfacediff_core.stages.contexts.BLOCK", 4)
    contexts = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    np.savez(tmp_path / "contexts.npz", contexts=contexts)
    file = {"contexts__source": "file", "contexts__file": str(tmp_path / "contexts.npz")}
    build = changed(tiny_build, negatives__rule=rule, samples__w=0, **file)
    specs = make(build, tmp_path, stages=("contexts", "negatives"))
    assert list(specs["negatives"].grid.identities_of(Unit(1, 0))) == [4]
    assert negatives_of(specs["negatives"], np.arange(5)).tolist() == [-1] * 5


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
    assert Unit(1, 0) in pending_units(specs["samples"])


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


# --- bad input: an error before anything is written


def refused(build, store, error, match):
    with pytest.raises(error, match=match):
        plan_build(build, str(store))
    assert not Path(store).exists(), "nothing may be written before the inputs are good"


@pytest.mark.parametrize(
    "field", ["samples__generator", "aligned__detector", "embeddings__judge", "contexts__file"]
)
def test_missing_weights_are_named(field, tiny_build, tmp_path):
    changes = {field: "packs/nothing-here"}
    if field.startswith("contexts"):
        changes["contexts__source"] = "file"
    refused(changed(tiny_build, **changes), tmp_path / "store", WeightsError, "packs/nothing-here")


def test_corrupt_weights_are_named(tiny_build, tiny_pack, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_pack, broken)
    checkpoint = broken / "generator" / "checkpoints" / "ema_averaged_model.ckpt"
    for file in (checkpoint, broken / "faces" / "detector.onnx", broken / "judge" / "judge.onnx"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    store = tmp_path / "store"
    for field, part, name in (
        ("samples__generator", "generator", "ema_averaged_model"),
        ("aligned__detector", "faces", "detector"),
        ("embeddings__judge", "judge", "judge"),
    ):
        refused(changed(tiny_build, **{field: str(broken / part)}), store, WeightsError, name)


def test_the_judge_must_not_be_the_generators_own_recogniser(tiny_build, tiny_pack, tmp_path):
    generator = tmp_path / "generator"
    shutil.copytree(tiny_pack / "generator", generator)
    config = generator / ".hydra" / "config.yaml"
    content = yaml.safe_load(config.read_text())
    judge = (tiny_pack / "judge" / "judge.onnx").read_bytes()
    content["constants"]["conditioner_sha256"] = hashlib.sha256(judge).hexdigest()
    config.write_text(yaml.safe_dump(content))
    build = changed(tiny_build, samples__generator=str(generator))
    refused(build, tmp_path / "store", ConfigError, "would judge its own work")


def test_settings_that_do_not_fit_the_weights_are_refused(tiny_build, tmp_path):
    store = tmp_path / "store"
    refused(
        changed(tiny_build, samples__steps=51), store, ConfigError, r"samples\.steps is 51.* 50 timesteps"
    )
    # DPM-Solver++ goes between timesteps, of which there is one fewer.
    whole = changed(tiny_build, samples__sampler="dpm_solver", samples__steps=50)
    refused(whole, store, ConfigError, r"samples\.steps is 50.* dpm_solver takes 49")
    assert plan_build(changed(tiny_build, samples__steps=50), str(tmp_path / "other"))
    refused(changed(tiny_build, negatives__pool=1), store, ConfigError, r"negatives\.pool is 1")


def test_a_store_that_cannot_be_written_is_refused(tiny_build, tmp_path):
    (tmp_path / "store").write_text("a file stands here")
    with pytest.raises(StoreError, match="a file stands where a folder is needed"):
        plan_build(tiny_build, str(tmp_path / "store"))


def test_weights_that_change_under_a_build_are_refused(tiny_build, tiny_pack, tmp_path):
    pack = tmp_path / "pack"
    shutil.copytree(tiny_pack, pack)
    build = changed(tiny_build, samples__generator=str(pack / "generator"), samples__seed=1)
    specs = make(build, tmp_path / "store", stages=("contexts", "negatives"))
    config = pack / "generator" / ".hydra" / "config.yaml"
    config.write_text(config.read_text() + "\n# another\n")
    os.utime(config, ns=(1, 1))
    spec = specs["samples"]
    from negfacediff_core.stages import models, samples

    models._generator.cache_clear()
    samples._cached_engine.cache_clear()
    with pytest.raises(WeightsError, match=r"samples 00000-000: .* has changed since this build was planned"):
        run_unit(spec, Unit(0, 0), EXECUTION)


# --- fingerprints: what changes the result moves the place, nothing else does

# By field: another value, the first stage that must move (None: nothing may), and what else must be set for
# the field to matter at all.
FIELDS = {
    "name": ("other", None, {}),
    "identities": (6, "evaluation", {"negatives__pool": 5}),
    "images": (4, "evaluation", {}),
    "block_identities": (3, None, {}),
    "block_images": (3, None, {}),
    "contexts__source": ("fitted", "contexts", {"contexts__file": "FILE"}),
    "contexts__file": ("OTHER", "contexts", {"contexts__source": "file", "contexts__file": "FILE"}),
    "contexts__seed": (1, "contexts", {}),
    "negatives__rule": ("close", "negatives", {}),
    "negatives__pool": (4, "negatives", {}),
    "negatives__rand": ("ring", "negatives", {"negatives__rule": "rand"}),
    "negatives__mid": ("paper", "negatives", {"negatives__rule": "mid"}),
    "negatives__seed": (1, "negatives", {"negatives__rule": "rand"}),
    "samples__generator": ("OTHER", "samples", {}),
    "samples__sampler": ("dpm_solver", "samples", {}),
    "samples__steps": (3, "samples", {}),
    "samples__eta": (0.5, "samples", {}),
    "samples__w": (1.0, "samples", {}),
    "samples__weight": ("adaptive", "samples", {}),
    "samples__ddim_alpha": ("paper", "samples", {}),
    "samples__final_noise": ("paper", "samples", {"samples__sampler": "ddpm"}),
    "samples__precision": ("bf16", "samples", {}),
    "samples__seed": (1, "samples", {}),
    "aligned__detector": ("OTHER", "aligned", {}),
    "aligned__detector_size": (64, "aligned", {}),
    "aligned__threshold": (0.6, "aligned", {}),
    "aligned__template": ("legacy", "aligned", {}),
    "embeddings__judge": ("OTHER", "embeddings", {}),
    "embeddings__flip": (True, "embeddings", {}),
    "evaluation__protocol": ("paper", "evaluation", {}),
    "evaluation__bootstrap": (11, "evaluation", {}),
    "evaluation__seed": (1, "evaluation", {}),
}


def all_fields(model, prefix=""):
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from all_fields(field.annotation, f"{prefix}{name}__")
        else:
            yield prefix + name


def test_the_table_of_fields_is_complete():
    assert set(FIELDS) == set(all_fields(BuildConfig))
    sampled = {name.removeprefix("samples__") for name in FIELDS if name.startswith("samples__")}
    assert {field.name for field in fields(SamplerSettings)} <= sampled


@pytest.fixture(scope="module")
def others(tiny_pack, tmp_path_factory):
    """Other weights and files: the same kinds, other bytes."""
    folder = tmp_path_factory.mktemp("others")
    shutil.copytree(tiny_pack, folder / "pack")
    config = folder / "pack" / "generator" / ".hydra" / "config.yaml"
    config.write_text(config.read_text() + "\n# another\n")
    for file in (folder / "pack" / "faces" / "detector.onnx", folder / "pack" / "judge" / "judge.onnx"):
        # An unknown field of the protocol buffer: another file, the same network.
        file.write_bytes(file.read_bytes() + bytes([0xF8, 0x3F, 1]))
    rng = np.random.default_rng(0)
    for name in ("FILE", "OTHER"):
        np.savez(folder / f"{name}.npz", contexts=rng.standard_normal((9, 16)).astype(np.float32))
    return folder


@pytest.mark.parametrize("field", FIELDS)
def test_only_what_changes_the_result_moves_its_place(field, tiny_build, others, tmp_path):
    value, first, setting = FIELDS[field]
    places = {"samples__generator": "generator", "aligned__detector": "faces", "embeddings__judge": "judge"}

    def real(key, value):
        if value in ("FILE", "OTHER"):
            return str(others / "pack" / places[key] if key in places else others / f"{value}.npz")
        return value

    before = {key: real(key, each) for key, each in setting.items()}
    if field == "contexts__source":
        before["contexts__source"] = "file"
    base = changed(tiny_build, **before)
    other = changed(base, **{field: real(field, value)})
    pairs = zip(plan_build(base, str(tmp_path)), plan_build(other, str(tmp_path)), strict=True)
    moved = [old.name for old, new in pairs if old.fingerprint != new.fingerprint]
    names = list(STAGES)
    assert moved == ([] if first is None else names[names.index(first) :])


def test_how_a_build_runs_is_no_part_of_it():
    assert not set(ExecutionConfig.model_fields) & set(BuildConfig.model_fields)


@pytest.mark.parametrize(
    "changes",
    [
        {"samples__sampler": "ddpm", "samples__steps": 7},
        {"samples__sampler": "ddpm", "samples__eta": 0.5},
        {"negatives__seed": 5, "negatives__rand": "ring"},
        {"negatives__rule": "null", "negatives__pool": 4},
    ],
)
def test_settings_without_effect_move_nothing(changes, tiny_build, tmp_path):
    kept = {key: value for key, value in changes.items() if key in ("samples__sampler", "negatives__rule")}
    without = plan_build(changed(tiny_build, **kept), str(tmp_path))
    together = plan_build(changed(tiny_build, **changes), str(tmp_path))
    assert [spec.fingerprint for spec in without] == [spec.fingerprint for spec in together]

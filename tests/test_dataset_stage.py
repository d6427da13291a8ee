"""The figures of a built dataset: what its stages store, what the band leaves out, what the report holds."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from face_networks import save_linear, save_recogniser
from stage_builds import changed, make, planned
from stored_files import results

from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.errors import ConfigError, WeightsError
from negfacediff_core.evaluation.coverage import effective_dimensions
from negfacediff_core.evaluation.figures import FIGURES, GROUPS
from negfacediff_core.evaluation.uniqueness import centres_of, strays
from negfacediff_core.evaluation.within import thumbnails, within_identities
from negfacediff_core.faces import packs
from negfacediff_core.faces.embed import load_embedder
from negfacediff_core.faces.pose import head_pose
from negfacediff_core.faces.quality import load_quality
from negfacediff_core.stages.aligned import LANDMARKS
from negfacediff_core.stages.build import plan_build, run_unit
from negfacediff_core.stages.contexts import contexts_of
from negfacediff_core.stages.dataset_figures import DATASET_COLUMNS, RANGES, dataset_figures
from negfacediff_core.stages.evaluation import sheet_panel
from negfacediff_core.stages.models import PROJECT
from negfacediff_core.store.extents import read_array, read_column
from negfacediff_core.store.layout import Unit, read_spec
from negfacediff_core.store.repair import failed_units
from negfacediff_core.store.shards import read_file, read_rows
from negfacediff_core.store.verify import check_units, survey

IDENTITIES, IMAGES = 5, 3


@pytest.fixture(scope="module")
def networks(tiny_pack, tmp_path_factory):
    """Paths of a recogniser, a quality network and attribute networks."""
    folder = tmp_path_factory.mktemp("networks")
    save_recogniser(folder / "recogniser", tiny_pack)
    save_linear(folder / "quality.onnx", 1, seed=1)
    save_linear(folder / "attributes.onnx", 3, seed=2)
    save_linear(folder / "genderage.onnx", 3, size=96, seed=3)
    return folder


@pytest.fixture(scope="module")
def full_build(tiny_build, networks):
    """The tiny build with every network."""
    paths = {"recogniser": "recogniser", "quality": "quality.onnx", "attributes": "attributes.onnx"}
    given = {f"embeddings__{field}": str(networks / name) for field, name in paths.items()}
    return changed(tiny_build, **given)


@pytest.fixture(scope="module")
def built(full_build, tiny_store, tmp_path_factory):
    """That build, whole, of the tiny build's images; tests only read it."""
    return make(full_build, shutil.copytree(tiny_store, tmp_path_factory.mktemp("built") / "store"))


@pytest.fixture(scope="module")
def store(built, tmp_path_factory):
    """A copy of its store, for builds of the same images."""
    return shutil.copytree(built["samples"].store, tmp_path_factory.mktemp("copy"), dirs_exist_ok=True)


def column(specs, name, stage="embeddings"):
    return read_column(specs[stage], name, IDENTITIES, IMAGES)


def report_of(specs):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(read_file(specs["evaluation"], Unit(0, 0), "report.json"), parse_constant=refuse)


def similarity(specs):
    """Cosine of each image with a face to its own and to all contexts: `(N,)`, `(N, I)`, and whose it is."""
    recogniser = load_embedder(specs["embeddings"].weights["recogniser"].path)
    ok = column(specs, "status", "aligned") == "ok"
    crops = read_array(specs["aligned"], "image", IDENTITIES, IMAGES)[ok]
    vectors = recogniser.embed(crops).astype(float)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ contexts_of(specs["contexts"], np.arange(IDENTITIES)).T
    identity = np.nonzero(ok)[0]
    return cosines[np.arange(len(identity)), identity], cosines, identity


def test_units_on_a_gpu_are_those_of_the_cpu_and_their_records_name_it(
    full_build, built, tmp_path, monkeypatch
):
    """What is to run on a GPU is opened on the CPU here: the device changes nothing else."""
    asked = []

    def opened(weights, device, options=None, real=packs.open_session):
        asked.append(device)
        return real(weights, "cpu", options)

    monkeypatch.setattr(packs, "open_session", opened)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"GeForce at {device}")
    store = shutil.copytree(built["samples"].store, tmp_path / "store")
    for name in ("aligned", "embeddings"):
        shutil.rmtree(store / name)
    specs = planned(full_build, store)
    asked.clear()  # plans load networks on the CPU
    for name in ("aligned", "embeddings"):
        for unit in specs[name].grid.units():
            record = run_unit(specs[name], unit, ExecutionConfig(device="cpu", faces_device="cuda:1"))
            assert record.device == "GeForce at cuda:1"
        assert results(specs[name].directory) == results(built[name].directory) != {}
    assert set(asked) == {"cuda:1"}


def test_each_image_is_compared_with_the_context_of_its_identity(built):
    own, cosines, identity = similarity(built)
    stored, ok = column(built, "context_cosine"), column(built, "status", "aligned") == "ok"
    np.testing.assert_allclose(stored[ok], own, atol=1e-5)
    assert np.isnan(stored[~ok]).all() and not ok.all()
    report = report_of(built)
    assert report["context_similarity"] == pytest.approx(own.mean(), abs=1e-5)
    assert report["rank1"] == pytest.approx((cosines.argmax(axis=1) == identity).mean())
    histogram = report["distributions"]["context_cosine"]
    assert (histogram["low"], histogram["high"], sum(histogram["counts"])) == (-1, 1, len(own))


def test_quality_and_attributes_are_those_of_the_networks(built, networks):
    ok = column(built, "status") == "ok"
    crops = read_array(built["aligned"], "image", IDENTITIES, IMAGES)[ok]
    expected = load_quality(networks / "quality.onnx").score(crops)[:, 0]
    np.testing.assert_allclose(column(built, "quality")[ok], expected, atol=1e-5)
    report, attribute = report_of(built), column(built, "attribute")
    assert report["quality"] == pytest.approx(expected.mean(), abs=1e-5)
    assert np.isnan(attribute[~ok].astype(float)).all()
    counts = np.bincount(attribute[ok].astype(int), minlength=3)
    assert report["attributes"] == {str(n): count for n, count in enumerate(counts)}
    assert "age" not in report


def test_without_networks_quality_is_the_norm_and_the_rest_is_not_claimed(tiny_build, store):
    specs = make(tiny_build, store)
    report, ok = report_of(specs), column(specs, "status") == "ok"
    assert report["quality"] == pytest.approx(column(specs, "norm")[ok].mean(), rel=1e-5)
    missing = {"rank1", "context_similarity", "out_of_band_fraction", "attributes", "evenness", "age"}
    assert not missing & report.keys()
    assert "context_cosine" not in report["distributions"]
    assert [array.name for array in specs["embeddings"].arrays] == ["embedding"]


def test_genderage_sees_the_image_and_tells_years(tiny_build, networks, store):
    build = changed(tiny_build, embeddings__attributes=str(networks / "genderage.onnx"))
    specs = make(build, store)
    report, ok = report_of(specs), column(specs, "status") == "ok"
    assert set(report["attributes"]) == {"female", "male"} and sum(report["attributes"].values()) == ok.sum()
    assert report["age"] == pytest.approx(column(specs, "age")[ok].mean(), rel=1e-5)
    assert sum(report["distributions"]["age"]["counts"]) == ok.sum()
    assert specs["embeddings"].inputs["samples"] == specs["samples"].fingerprint


def test_rows_of_identities_are_those_of_their_images(built):
    rows = read_rows(built["evaluation"], Unit(0, 0)).to_pydict()
    assert {name for name, _ in DATASET_COLUMNS} <= set(rows)
    ok = column(built, "status") == "ok"
    vectors = read_array(built["embeddings"], "embedding", IDENTITIES, IMAGES).astype(float)
    vectors[ok] /= np.linalg.norm(vectors[ok], axis=-1, keepdims=True)
    assert rows["images"] == ok.sum(axis=1).tolist()
    assert (ok.sum(axis=1) > 1).any()
    for i, shown in enumerate(ok):
        if shown.sum() < 2:
            assert np.isnan(rows["centre_least"][i]) and rows["strays"][i] == 0
            continue
        rest = vectors[i].sum(0) - vectors[i, shown]
        own = (vectors[i, shown] * rest).sum(1) / np.linalg.norm(rest, axis=1)
        assert rows["centre_least"][i] == pytest.approx(own.min(), abs=1e-6)
    sums = vectors.sum(axis=1)
    there = np.flatnonzero(sums.any(axis=1))
    centres = sums[there] / np.linalg.norm(sums[there], axis=1, keepdims=True)
    cosines = centres @ centres.T - 3 * np.eye(len(there))
    assert [rows["nearest"][i] for i in there] == there[cosines.argmax(axis=1)].tolist()
    np.testing.assert_allclose([rows["nearest_cosine"][i] for i in there], cosines.max(axis=1))
    cosine = column(built, "context_cosine")
    expected = [cosine[i, shown].mean() if shown.any() else np.nan for i, shown in enumerate(ok)]
    np.testing.assert_allclose(rows["context_cosine"], expected, atol=1e-6)


def test_the_report_holds_every_figure_of_datasets_in_json(built):
    report = report_of(built)
    wanted = {figure.key for figure in FIGURES if figure.group in ("Identities", "Contexts", "Images")}
    assert wanted - report.keys() == {"age", "out_of_band_fraction"}
    assert all(figure.group in GROUPS for figure in FIGURES)
    assert set(report["distributions"]) <= set(RANGES)
    # so few impostors that no threshold has an FMR of 0.1%
    assert report["match_cosine"] is None and report["unique_identities"] is None


def test_figures_of_blocks_are_those_of_the_whole(built):
    report, ok = report_of(built), column(built, "status") == "ok"
    embeddings = read_array(built["embeddings"], "embedding", IDENTITIES, IMAGES)
    crops = read_array(built["aligned"], "image", IDENTITIES, IMAGES)
    whole = within_identities(embeddings, ok, thumbnails(crops))
    assert report["embedding_diversity"] == pytest.approx(1 - np.nanmean(whole.consistency))
    assert report["angular_spread"] == pytest.approx(np.nanmean(whole.spread))
    assert report["pixel_diversity"] == pytest.approx(np.nanmean(whole.pixel_difference))
    pairs = ok.sum(axis=1) * (ok.sum(axis=1) - 1) / 2
    assert report["near_duplicate_fraction"] == pytest.approx(whole.near_duplicates.sum() / pairs.sum())
    vectors = embeddings[ok] / np.linalg.norm(embeddings[ok].astype(float), axis=1, keepdims=True)
    astray = strays(vectors, np.nonzero(ok)[0], whole.own[ok], *centres_of(whole.total))
    assert report["stray_fraction"] == pytest.approx(astray.mean())
    contexts = contexts_of(built["contexts"], np.arange(IDENTITIES))
    assert report["context_dimensions"] == pytest.approx(effective_dimensions(contexts))
    points = np.stack([column(built, name, "aligned") for name in LANDMARKS], axis=-1)
    yaw = head_pose(points.reshape(IDENTITIES, IMAGES, 5, 2)).yaw[ok]
    assert report["yaw_deviation"] == pytest.approx(yaw.std())
    assert report["detection_score"] == pytest.approx(np.nanmean(column(built, "score", "aligned")))
    faces = column(built, "faces", "aligned")
    assert report["several_faces_fraction"] == pytest.approx((faces > 1).sum() / (faces > 0).sum())


def test_a_cosine_of_ones_own_sets_the_threshold(built):
    spec = built["evaluation"]
    strict, loose = (
        dataset_figures(replace(spec, config={**spec.config, "match_cosine": cosine}), None).figures
        for cosine in (0.9999, 0.0001)
    )
    assert (strict["match_cosine"], loose["match_cosine"]) == (0.9999, 0.0001)
    assert strict["unique_identities"] > loose["unique_identities"] >= 1
    assert loose["capacity"] >= 1


@pytest.fixture(scope="module")
def banded(full_build, built, store):
    """The build with a band that keeps some images and not others."""
    cosine = column(built, "context_cosine")
    middle = float(np.nanmedian(cosine))
    build = changed(full_build, name="banded", embeddings__band_low=-1.0, embeddings__band_high=middle)
    return make(build, store), store, middle


def test_images_outside_the_band_are_no_part_of_the_dataset(built, banded):
    specs, _, middle = banded
    status, cosine = column(specs, "status"), column(specs, "context_cosine")
    seen = column(specs, "status", "aligned") == "ok"
    np.testing.assert_array_equal(status[seen] == "out_of_band", cosine[seen] > middle)
    assert set(status[seen]) == {"ok", "out_of_band"} and set(status[~seen]) == {"skipped"}
    before, after = report_of(built), report_of(specs)
    assert after["out_of_band_fraction"] == pytest.approx((status == "out_of_band").mean())
    assert after["genuine_count"] < before["genuine_count"]
    assert after["context_similarity"] < before["context_similarity"]
    assert after["distributions"]["context_cosine"] == before["distributions"]["context_cosine"]
    rows = read_rows(specs["evaluation"], Unit(0, 0)).to_pydict()
    assert rows["images"] == (status == "ok").sum(axis=1).tolist()
    assert after["kept_images"] == (status == "ok").sum() < before["kept_images"]
    assert after["kept_fraction"] == pytest.approx((status == "ok").mean())
    panel = sheet_panel(specs["evaluation"], "banded", IDENTITIES, IMAGES)
    np.testing.assert_array_equal(panel.taken_out, status == "out_of_band")


def test_images_outside_the_band_have_not_failed(banded):
    _, store, _ = banded
    assert failed_units(str(store), "banded") == {}
    assert list(check_units(survey(str(store), run="banded").units)) == []


def test_a_band_is_part_of_what_makes_a_dataset_and_no_band_is_none(full_build, banded, tmp_path):
    specs, _, middle = banded
    whole = changed(full_build, embeddings__band_low=-1.0, embeddings__band_high=1.0)
    by_name = {spec.name: spec for spec in plan_build(whole, str(tmp_path))}
    assert "band_low" not in by_name["embeddings"].config
    assert specs["embeddings"].config["band_high"] == middle
    stored = read_spec(specs["embeddings"].store, "embeddings", specs["embeddings"].fingerprint)
    assert replace(stored, grid=specs["embeddings"].grid) == specs["embeddings"]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"band_low": 0.2}, "a band needs `recogniser`"),
        ({"band_low": 0.5, "band_high": 0.1, "recogniser": "x"}, "no image is in that band"),
    ],
)
def test_bands_that_make_no_sense_are_refused(section, said):
    with pytest.raises(ValueError, match=said):
        BuildConfig.model_validate({"embeddings": section})


def test_a_recogniser_that_is_none_of_the_generators_is_refused(tiny_build, tiny_pack, networks, tmp_path):
    def refuse(error, said, **fields):
        given = {f"embeddings__{name}": str(path) for name, path in fields.items()}
        with pytest.raises(error, match=said):
            plan_build(changed(tiny_build, **given), str(tmp_path))

    refuse(ConfigError, "are both .*give another judge", recogniser=tiny_pack / "judge")
    refuse(WeightsError, "of width 20 .* contexts have width 16", recogniser=PROJECT / "packs/demo/faces")
    refuse(WeightsError, r"embeddings\.quality: .*gives 3 numbers", quality=networks / "attributes.onnx")
    refuse(WeightsError, r"embeddings\.attributes: .*gives 1 numbers", attributes=networks / "quality.onnx")
    refuse(WeightsError, r"embeddings\.recogniser: there is nothing", recogniser=tmp_path / "nowhere")
    demo = changed(
        tiny_build,
        samples__generator=str(PROJECT / "packs/demo/generator"),
        embeddings__recogniser=str(networks / "recogniser"),
    )
    with pytest.raises(ConfigError, match="trained with another recogniser"):
        plan_build(demo, str(tmp_path))

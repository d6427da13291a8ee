"""The stage `scores`: bands of a stored dataset, made in any order, and what the evaluation makes of them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from stage_builds import EXECUTION, changed, finish, make, planned

from flows.build import meter_of
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import StoreError
from negfacediff_core.evaluation import bands
from negfacediff_core.evaluation.bootstrap import FIGURES
from negfacediff_core.evaluation.scores import compare
from negfacediff_core.stages import scores
from negfacediff_core.stages.build import STAGES, plan_build, run_unit
from negfacediff_core.stages.evaluation import RATES, THRESHOLDS, difference_intervals, score_panel
from negfacediff_core.stages.models import scores_device_of
from negfacediff_core.stages.scores import read_judged, stored_comparisons
from negfacediff_core.stages.sizes import size_of
from negfacediff_core.store.layout import Unit
from negfacediff_core.store.records import committed, pending
from negfacediff_core.store.repair import forget_units
from negfacediff_core.store.runs import stages_of_run
from negfacediff_core.store.shards import prepare, read_file
from negfacediff_core.store.verify import check_units, survey

SCORES = tuple(name for name in STAGES if name != "evaluation")


@pytest.fixture
def banded(monkeypatch):
    """Score even the tiny build in bands, of one block of two identities each."""
    monkeypatch.setattr(scores, "EXACT_IMAGES", 4)
    monkeypatch.setattr(bands, "BAND_IMAGES", 1)


@pytest.fixture
def store(tiny_store, tmp_path):
    """A store with the tiny build, of which builds in it take what is made already."""
    return shutil.copytree(tiny_store, tmp_path / "store")


def report_of(spec):
    return json.loads(read_file(spec, Unit(0, 0), "report.json"))


def findings(store):
    found = survey(str(store))
    return [*found.findings, *check_units(found.units)]


def files_of(spec, store):
    folder = store / spec.path / "bands"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_bands_add_up_to_what_one_comparison_of_all_gives(tiny_build, store, banded):
    specs = make(tiny_build, store)
    assert len(committed(specs["scores"])) == 3
    embeddings, valid = read_judged(specs["embeddings"], (5, 3), np.arange(5))
    whole = compare(embeddings, valid)
    for counted, single in zip(stored_comparisons(specs["scores"]), whole, strict=True):
        assert counted.size == single.size > 0 and counted.resolution == 2 / bands.BINS
        assert counted.mean == pytest.approx(single.mean, abs=1e-12)
        listed, binned = np.repeat(single.levels, single.counts), np.repeat(counted.levels, counted.counts)
        np.testing.assert_allclose(binned, listed, atol=2 / bands.BINS + 1e-6)
    panel = score_panel(specs["evaluation"], "tiny")
    assert (panel.impostor.size, panel.genuine.size) == tuple(kind.size for kind in reversed(whole))
    report = report_of(specs["evaluation"])
    assert report["impostor_count"] == whole.impostor.size and report["resolution"] > 0


def test_the_order_of_bands_changes_no_byte(tiny_build, tiny_store, tmp_path, banded):
    for name in ("one", "two"):
        shutil.copytree(tiny_store, tmp_path / name)
    one = make(tiny_build, tmp_path / "one")
    two = planned(tiny_build, tmp_path / "two")
    for unit in sorted(pending(two["scores"]), reverse=True):
        run_unit(two["scores"], unit, EXECUTION)
    make(tiny_build, tmp_path / "two")
    assert files_of(one["scores"], tmp_path / "one") == files_of(two["scores"], tmp_path / "two")
    assert report_of(one["evaluation"]) == report_of(two["evaluation"])


def test_bands_over_an_executor_go_on_and_are_those_of_one_process(tiny_build, tiny_store, tmp_path, banded):
    for name in ("one", "many"):
        shutil.copytree(tiny_store, tmp_path / name)
    one = make(tiny_build, tmp_path / "one", stages=SCORES)["scores"]
    many = planned(tiny_build, tmp_path / "many")["scores"]
    # what an interrupted run has left
    run_unit(many, pending(many)[1], EXECUTION)
    first = files_of(many, tmp_path / "many")
    assert len(first) == 1 and len(pending(many)) == len(pending(one)) + 2
    finish(tiny_build, tmp_path / "many", ExecutionConfig(workers=3, device="cpu"))
    assert files_of(many, tmp_path / "many") == files_of(one, tmp_path / "one")
    assert first.items() <= files_of(many, tmp_path / "many").items()


def test_small_sets_and_the_paper_protocol_need_no_band(tiny_build, tmp_path, monkeypatch):
    small = planned(tiny_build, tmp_path)["scores"]
    assert small.grid.units() == [] and stored_comparisons(small) is None
    monkeypatch.setattr(scores, "EXACT_IMAGES", 4)
    paper = planned(changed(tiny_build, evaluation__protocol="paper"), tmp_path)["scores"]
    full = planned(tiny_build, tmp_path)["scores"]
    assert paper.fingerprint == small.fingerprint != full.fingerprint and full.grid.units()


def test_bands_are_of_the_extent_and_of_whole_blocks(tiny_build, tmp_path, banded):
    first, grown = (
        {spec.name: spec for spec in plan_build(changed(tiny_build, identities=count), str(tmp_path))}[
            "scores"
        ]
        for count in (5, 7)
    )
    assert first.fingerprint != grown.fingerprint
    assert [list(first.grid.identities_of(unit)) for unit in first.grid.units()] == [[0, 1], [2, 3], [4]]
    assert grown.grid.block_identities == 2


def test_a_lost_image_makes_all_bands_pending(tiny_build, store, banded):
    specs = make(tiny_build, store)
    lost = forget_units(str(store), {specs["embeddings"].path: {Unit(2, 0)}})
    assert lost[specs["scores"].path] == {Unit(0, 0), Unit(1, 0), Unit(2, 0)}
    assert lost[specs["evaluation"].path] == {Unit(0, 0)}


def test_a_store_with_bands_verifies_and_a_damaged_band_is_found(tiny_build, store, banded):
    specs = make(tiny_build, store, SCORES)
    assert findings(store) == []
    path = store / specs["scores"].path / "bands" / "00001-000.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match="not what was committed"):
        stored_comparisons(specs["scores"])
    assert [finding.unit for finding in findings(store)] == [Unit(1, 0)]


def test_parts_of_bands_add_up_to_whole_bands_and_are_read_one_by_one(tiny_build, store, banded, monkeypatch):
    whole = stored_comparisons(make(tiny_build, store, SCORES)["scores"])
    monkeypatch.setattr(bands, "PARTNERS", 1)
    parts = make(tiny_build, store, SCORES)["scores"]
    assert committed(parts) == [Unit(band, part) for band in range(3) for part in range(2)]
    steps, decode, add = [], scores._decode, bands._sum
    monkeypatch.setattr(scores, "_decode", lambda content: steps.append("read") or decode(content))
    monkeypatch.setattr(bands, "_sum", lambda one, other: steps.append("add") or add(one, other))
    for kind, single in zip(stored_comparisons(parts), whole, strict=True):
        np.testing.assert_array_equal(kind.counts, single.counts)
        np.testing.assert_array_equal(kind.levels, single.levels)
        assert (kind.mean, kind.std) == pytest.approx((single.mean, single.std))
    assert steps == ["read", *["read", "add"] * 5]
    assert findings(store) == []


def test_bands_of_older_stores_are_whole(tiny_build, store, banded):
    """Before bands were compared in parts, a unit was a band."""
    now = make(tiny_build, store, SCORES)["scores"]
    extent = {name: now.config[name] for name in ("identities", "images")}
    older = replace(now, config=extent)
    prepare(older)
    for unit in pending(older):
        run_unit(older, unit, EXECUTION)
    for kind, single in zip(stored_comparisons(older), stored_comparisons(now), strict=True):
        np.testing.assert_array_equal(kind.counts, single.counts)


@pytest.mark.parametrize("parts", [None, 1, 2, 3, 4])
def test_the_parts_of_a_stage_cover_all_pairs_however_it_was_cut(tiny_build, tmp_path, banded, parts):
    now = planned(changed(tiny_build, identities=15), tmp_path)["scores"]
    config = {name: now.config[name] for name in ("identities", "images")}
    cut = replace(now, config=config | ({"parts": parts} if parts else {}))
    pairs = [
        frozenset((band, other))
        for band in range(8)
        for part in range(parts or 1)
        for other in scores.partners_of(cut, Unit(band, part))
    ]
    assert len(pairs) == len(set(pairs)) == 8 * 9 // 2


def test_parts_are_counted_as_parts_and_not_as_identities(tiny_build, tmp_path, banded):
    spec = planned(changed(tiny_build, identities=15), tmp_path)["scores"]
    bands_of_two, parts = spec.grid.blocks
    meter = meter_of(spec)
    assert (bands_of_two, parts) == (8, 3)
    assert (meter.noun, meter.total, meter.position) == ("parts", 24, 0)
    size = size_of(spec)
    assert size.units == 24 and size.bytes > 24 * 700_000 + 8 * 2_200_000


def test_a_part_of_half_a_million_images_takes_seconds_and_parts_cover_all(tiny_build, tmp_path):
    build = changed(tiny_build, identities=10_000, images=50, block_identities=8, block_images=50)
    spec = {one.name: one for one in plan_build(build, str(tmp_path))}["scores"]
    count, parts = spec.grid.blocks
    images = 50 * spec.grid.block_identities
    assert parts == bands.parts_of(count) and bands.PARTNERS * parts >= count // 2 + 1
    # at 21.5 ns a pair, as measured (benchmarks/README.md)
    assert 21.5e-9 * bands.PARTNERS * images**2 < 12


def test_a_band_that_is_missing_is_named(tiny_build, store, banded):
    specs = planned(tiny_build, store)
    run_unit(specs["scores"], Unit(0, 0), EXECUTION)
    with pytest.raises(StoreError, match=r"00001-000.*not committed"):
        stored_comparisons(specs["scores"])


def test_the_report_has_operating_points_and_intervals(tiny_store):
    report = report_of(stages_of_run(str(tiny_store), "tiny")["evaluation"])
    assert [point["fmr_at_most"] for point in report["at_fmr"]] == list(RATES)
    found = {point.pop("fmr_at_most"): point for point in report["at_fmr"]}
    nothing = {"threshold": None, "fmr": None, "fnmr": None}
    # 25 pairs tell no rate below 4% from 0
    assert report["impostor_count"] == 25
    assert [rate for rate in RATES if found[rate] == nothing] == [0.01, 1e-3, 1e-4, 1e-5, 1e-6]
    assert found[0.1]["fmr"] <= 0.1 and found[0.0]["fmr"] == 0
    assert found[0.0]["fnmr"] == report["zero_fmr"]
    assert [point["threshold"] for point in report["at_threshold"]] == list(THRESHOLDS)
    for name in FIGURES:
        low, high = report[f"{name}_interval"]
        assert 0 <= low <= high


@pytest.mark.parametrize("protocol", ["full", "paper"])
def test_differences_of_runs_are_paired(tiny_build, store, protocol, monkeypatch):
    # of five identities 5% of the pairs may be none
    monkeypatch.setattr("negfacediff_core.evaluation.scores.PAPER_IMPOSTOR_SHARE", 0.6)
    build = changed(tiny_build, evaluation__protocol=protocol)
    far, none = (
        make(changed(build, negatives__rule=rule, samples__w=weight), store)["evaluation"]
        for rule, weight in (("far", 2.0), ("none", 0.0))
    )
    same = difference_intervals(far, far)
    assert set(same) == set(FIGURES) and all(limits == (0, 0) for limits in same.values())
    there, back = difference_intervals(far, none), difference_intervals(none, far)
    for name, (low, high) in there.items():
        assert low <= high and back[name] == pytest.approx((-high, -low))
    other = replace(none, config={**none.config, "seed": 5})
    with pytest.raises(StoreError, match="same protocol, identities"):
        difference_intervals(far, other)


@pytest.mark.parametrize("gpus, device", [(0, "cpu"), (1, "cuda")])
def test_a_worker_without_gpu_scores_on_its_cpu_what_was_sampled_on_a_gpu(gpus, device, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(gpus))
    assert scores_device_of("cuda") == scores_device_of("auto") == device
    assert scores_device_of("cpu") == "cpu"

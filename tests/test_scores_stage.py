"""The stage `scores`: bands of a stored dataset, made in any order, and what the evaluation makes of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from stage_builds import EXECUTION, changed, make, planned

from negfacediff_core.errors import StoreError
from negfacediff_core.evaluation import bands
from negfacediff_core.evaluation.bootstrap import FIGURES
from negfacediff_core.evaluation.scores import compare
from negfacediff_core.stages import plan_build, run_unit, scores
from negfacediff_core.stages.evaluation import RATES, THRESHOLDS, difference_intervals, score_panel
from negfacediff_core.stages.scores import read_judged, stored_comparisons
from negfacediff_core.store.layout import Unit
from negfacediff_core.store.records import committed, pending
from negfacediff_core.store.repair import forget_units
from negfacediff_core.store.shards import read_file
from negfacediff_core.store.verify import check_units, survey

UPSTREAM = ("contexts", "negatives", "samples", "aligned", "embeddings")


@pytest.fixture
def banded(monkeypatch):
    """Score even the tiny build in bands, of one block of two identities each."""
    monkeypatch.setattr(scores, "EXACT_IMAGES", 4)
    monkeypatch.setattr(bands, "BAND_IMAGES", 1)


def report_of(spec):
    return json.loads(read_file(spec, Unit(0, 0), "report.json"))


def findings(store):
    found = survey(str(store))
    return [*found.findings, *check_units(found.units)]


def files_of(spec, store):
    folder = store / spec.path / "bands"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_bands_add_up_to_what_one_comparison_of_all_gives(tiny_build, tmp_path, banded):
    specs = make(tiny_build, tmp_path)
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


def test_the_order_of_bands_changes_no_byte(tiny_build, tmp_path, banded):
    one = make(tiny_build, tmp_path / "one")
    two = make(tiny_build, tmp_path / "two", UPSTREAM)
    for unit in sorted(pending(two["scores"]), reverse=True):
        run_unit(two["scores"], unit, EXECUTION)
    run_unit(two["evaluation"], Unit(0, 0), EXECUTION)
    assert files_of(one["scores"], tmp_path / "one") == files_of(two["scores"], tmp_path / "two")
    assert report_of(one["evaluation"]) == report_of(two["evaluation"])


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


def test_a_lost_image_makes_all_bands_pending(tiny_build, tmp_path, banded):
    specs = make(tiny_build, tmp_path)
    lost = forget_units(str(tmp_path), {specs["embeddings"].path: {Unit(2, 0)}})
    assert lost[specs["scores"].path] == {Unit(0, 0), Unit(1, 0), Unit(2, 0)}
    assert lost[specs["evaluation"].path] == {Unit(0, 0)}


def test_a_store_with_bands_verifies_and_a_damaged_band_is_found(tiny_build, tmp_path, banded):
    specs = make(tiny_build, tmp_path)
    assert findings(tmp_path) == []
    path = tmp_path / specs["scores"].path / "bands" / "00001-000.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match="not what was committed"):
        stored_comparisons(specs["scores"])
    assert [finding.unit for finding in findings(tmp_path)] == [Unit(1, 0)]


def test_a_band_that_is_missing_is_named(tiny_build, tmp_path, banded):
    specs = make(tiny_build, tmp_path, UPSTREAM)
    run_unit(specs["scores"], Unit(0, 0), EXECUTION)
    with pytest.raises(StoreError, match=r"00001-000.*not committed"):
        stored_comparisons(specs["scores"])


def test_the_report_has_operating_points_and_intervals(tiny_build, tmp_path):
    spec = make(tiny_build, tmp_path)["evaluation"]
    report = report_of(spec)
    assert [point["fmr_at_most"] for point in report["at_fmr"]] == list(RATES)
    assert all(point["fmr"] <= point["fmr_at_most"] for point in report["at_fmr"])
    found = {point["fmr_at_most"]: point["fnmr"] for point in report["at_fmr"]}
    assert (found[0.01], found[1e-3], found[0.0]) == tuple(
        report[name] for name in ("fmr100", "fmr1000", "zero_fmr")
    )
    assert [point["threshold"] for point in report["at_threshold"]] == list(THRESHOLDS)
    for name in FIGURES:
        low, high = report[f"{name}_interval"]
        assert 0 <= low <= high


def test_differences_of_runs_are_paired(tiny_build, tmp_path):
    far, none = (
        make(changed(tiny_build, negatives__rule=rule, samples__w=weight), tmp_path)["evaluation"]
        for rule, weight in (("far", 2.0), ("none", 0.0))
    )
    same = difference_intervals(far, far)
    assert set(same) == set(FIGURES) and all(limits == (0, 0) for limits in same.values())
    there, back = difference_intervals(far, none), difference_intervals(none, far)
    for name, (low, high) in there.items():
        assert low <= high and back[name] == pytest.approx((-high, -low))
    other = replace(none, config={**none.config, "seed": 5})
    with pytest.raises(StoreError, match="same identities"):
        difference_intervals(far, other)

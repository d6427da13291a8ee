"""A dataset grows along either axis: what is finished stays, the rest is what one build would have made."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_stage import commit, make_spec
from stage_builds import changed, finish, make, planned
from stored_files import results

from negfacediff_core.config import ExecutionConfig
from negfacediff_core.diffusion.engine import SamplingEngine
from negfacediff_core.errors import ContextsError, StoreError
from negfacediff_core.stages import contexts as contexts_stage
from negfacediff_core.stages.build import plan_build
from negfacediff_core.stages.contexts import contexts_of
from negfacediff_core.stages.negatives import stored_negatives
from negfacediff_core.store import shards
from negfacediff_core.store.layout import Grid
from negfacediff_core.store.records import pending
from negfacediff_core.store.status import status

# --- the store


sizes = st.tuples(st.integers(1, 6), st.integers(1, 6))


@settings(max_examples=12)
@given(extents=st.lists(sizes, min_size=1, max_size=4), blocks=st.tuples(*[st.integers(1, 4)] * 2))
@example(extents=[(3, 2), (3, 5), (6, 5)], blocks=(4, 4))
@example(extents=[(5, 5), (1, 1), (6, 6)], blocks=(2, 3))
def test_any_growth_makes_each_unit_once_and_ends_as_one_build(extents, blocks, tmp_path_factory):
    store = tmp_path_factory.mktemp("growth")
    largest = tuple(map(max, zip(*extents, strict=True)))
    made = Counter()
    for extent in [*extents, largest]:
        spec = make_spec(store / "grown", grid=Grid(*extent, *blocks, limit=7))
        shards.prepare(spec)
        for unit in pending(spec):
            made[unit] += 1
            commit(spec, unit)
        for unit in spec.grid.units():
            shards.read_arrays(spec, unit)
    at_once = make_spec(store / "at once", grid=Grid(*largest, *blocks, limit=7))
    shards.prepare(at_once)
    for unit in pending(at_once):
        commit(at_once, unit)
    assert made == Counter(at_once.grid.units())
    assert results(store / "grown") == results(store / "at once")
    shutil.rmtree(store)


# --- whole builds


def assert_grown_is(grown, at_once):
    """All that one build makes is there, byte for byte; the rest are the evaluations of smaller datasets."""
    found, wanted = results(grown), results(at_once)
    assert [path for path in wanted if found.get(path) != wanted[path]] == []
    assert {path.split("/")[0] for path in found.keys() - wanted.keys()} <= {"evaluation"}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of contexts that those of samples do not divide."""
    monkeypatch.setattr(contexts_stage, "BLOCK", 3)


@pytest.fixture
def sampled(monkeypatch):
    """How often each (identity, replicate) was sampled."""
    counts = Counter()
    sample = SamplingEngine.sample

    def counted(self, contexts, negatives, weights, identities, replicates, seed):
        counts.update(zip(identities.tolist(), replicates.tolist(), strict=True))
        return sample(self, contexts, negatives, weights, identities, replicates, seed)

    monkeypatch.setattr(SamplingEngine, "sample", counted)
    return counts


def finished(store):
    """Records and the files that they speak of, with when they were written."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in Path(store).rglob("done/*.json")}


def test_growth_along_both_axes_equals_a_build_at_the_final_size(tiny_build, tmp_path, sampled):
    steps = [(3, 2), (5, 2), (5, 3), (6, 3)]
    seen = {}
    for identities, images in steps:
        specs = make(changed(tiny_build, identities=identities, images=images), tmp_path / "grown")
        assert {path: seen[path] for path in seen} == {
            path: finished(tmp_path / "grown")[path] for path in seen
        }
        seen = finished(tmp_path / "grown")
        assert specs["negatives"].config["pool"] == 3
    assert set(sampled.values()) == {1}, "an image was sampled twice"
    assert len(sampled) == 6 * 4, "blocks of 2 x 2 cover 6 x 4"

    final = changed(tiny_build, identities=6, images=3, negatives__pool=3)
    make(final, tmp_path / "at once")
    assert_grown_is(tmp_path / "grown", tmp_path / "at once")


def test_ids_contexts_and_negatives_stay_and_new_identities_pick_from_the_pool(tiny_build, tmp_path):
    build = changed(tiny_build, identities=4, negatives__count=2, negatives__weights="rank")
    before = make(build, tmp_path, stages=("contexts", "negatives"))
    first = np.arange(4)
    contexts = contexts_of(before["contexts"], first)
    negatives = stored_negatives(before["negatives"], first)
    after = make(changed(build, identities=9), tmp_path, stages=("contexts", "negatives"))
    assert after["samples"].fingerprint == before["samples"].fingerprint
    np.testing.assert_array_equal(contexts_of(after["contexts"], first), contexts)
    kept = stored_negatives(after["negatives"], first)
    for name in ("index", "cosine", "weight"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(negatives, name))
    added = stored_negatives(after["negatives"], np.arange(4, 9))
    assert added.index.shape == (5, 2) and (added.index < 4).all()


def test_a_pool_that_is_asked_for_moves_negatives_and_no_context(tiny_build, tmp_path):
    before = make(tiny_build, tmp_path)
    moved = planned(changed(tiny_build, identities=7, negatives__pool=7), tmp_path)
    assert moved["contexts"].fingerprint == before["contexts"].fingerprint
    assert moved["negatives"].fingerprint != before["negatives"].fingerprint
    assert moved["negatives"].config["pool"] == 7
    assert planned(changed(tiny_build, identities=8), tmp_path)["negatives"].config["pool"] == 7
    back = planned(changed(tiny_build, negatives__pool=5), tmp_path)
    assert {name: pending(spec) for name, spec in back.items()} == {name: [] for name in back}


def test_another_name_has_a_pool_of_its_own(tiny_build, tmp_path):
    make(tiny_build, tmp_path, stages=("contexts", "negatives"))
    other = planned(changed(tiny_build, name="other", identities=8), tmp_path)
    assert other["negatives"].config["pool"] == 8


def test_a_pool_that_is_not_known_any_more_is_asked_for(tiny_build, tmp_path):
    specs = make(tiny_build, tmp_path, stages=("contexts", "negatives"))
    shutil.rmtree(tmp_path / specs["negatives"].path)
    grown = changed(tiny_build, identities=7)
    with pytest.raises(StoreError, match=r"is missing, which tells the pool .* set negatives.pool to"):
        plan_build(grown, str(tmp_path))
    again = planned(changed(grown, negatives__pool=5), tmp_path)
    assert again["negatives"].fingerprint == specs["negatives"].fingerprint


def test_fewer_are_a_part_of_what_is_there(tiny_build, tmp_path, sampled):
    whole = make(tiny_build, tmp_path)
    kept, images = results(tmp_path), sum(sampled.values())
    part = make(changed(tiny_build, identities=3, images=1), tmp_path)
    assert sum(sampled.values()) == images
    assert [part[name].fingerprint for name in ("samples", "embeddings")] == [
        whole[name].fingerprint for name in ("samples", "embeddings")
    ]
    now = results(tmp_path)
    assert {path: now[path] for path in kept} == kept
    again = planned(tiny_build, tmp_path)
    assert all(pending(spec) == [] for spec in again.values())


@pytest.mark.parametrize("blocks", [(2, 3), (5, 2), (7, 4)])
def test_a_store_keeps_its_blocks_whatever_a_later_build_asks_for(blocks, tiny_build, tmp_path):
    first = changed(tiny_build, block_identities=blocks[0], block_images=blocks[1])
    stages = ("contexts", "negatives", "samples")
    make(changed(first, identities=3), tmp_path / "grown", stages)
    specs = make(changed(tiny_build, identities=8, block_identities=3), tmp_path / "grown", stages)
    assert (specs["samples"].grid.block_identities, specs["samples"].grid.block_replicates) == blocks
    assert specs["aligned"].grid == specs["samples"].grid, "stages that run unit by unit have the same units"
    make(changed(first, identities=8, negatives__pool=3), tmp_path / "at once", stages)
    assert_grown_is(tmp_path / "grown", tmp_path / "at once")


def test_a_file_is_used_to_its_last_context_and_no_further(tiny_build, tmp_path):
    known = np.random.default_rng(0).standard_normal((7, 16)).astype(np.float32)
    np.savez(tmp_path / "known.npz", contexts=known)
    build = changed(tiny_build, contexts__source="file", contexts__file=str(tmp_path / "known.npz"), images=1)
    make(changed(build, identities=3), tmp_path / "grown")
    make(changed(build, identities=7), tmp_path / "grown")
    with pytest.raises(ContextsError, match="8"):
        plan_build(changed(build, identities=8), str(tmp_path / "grown"))
    make(changed(build, identities=7, negatives__pool=3), tmp_path / "at once")
    assert_grown_is(tmp_path / "grown", tmp_path / "at once")


@pytest.mark.parametrize("joint", [{"contexts__source": "packed"}, {"contexts__max_cosine": 0.9}])
def test_contexts_made_together_are_grown_into_and_not_past(joint, tiny_build, tmp_path):
    build = changed(tiny_build, contexts__count=7, **joint)
    stages = ("contexts", "negatives", "samples")
    make(changed(build, identities=3), tmp_path / "grown", stages)
    make(changed(build, identities=7), tmp_path / "grown", stages)
    with pytest.raises(ContextsError, match=r"8 identities are needed .* but 7 contexts are made together"):
        plan_build(changed(build, identities=8), str(tmp_path / "grown"))
    make(changed(build, identities=7, negatives__pool=3), tmp_path / "at once", stages)
    assert_grown_is(tmp_path / "grown", tmp_path / "at once")


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["threads", "dask"])
def test_a_dataset_may_grow_with_another_executor(executor, tiny_build, tmp_path):
    grown = changed(tiny_build, identities=6, images=3)
    make(changed(tiny_build, identities=4), tmp_path / "grown", pictures=True)
    specs = finish(grown, tmp_path / "grown", ExecutionConfig(executor=executor, workers=3, device="cpu"))
    assert all(pending(spec) == [] for spec in specs.values())
    assert all(stage.pending == 0 for stage in status(str(tmp_path / "grown")))
    make(changed(grown, negatives__pool=4), tmp_path / "at once", pictures=True)
    assert_grown_is(tmp_path / "grown", tmp_path / "at once")

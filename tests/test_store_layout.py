"""Where things lie in a store: specs, fingerprints, paths, units."""

import json
import pickle
from dataclasses import replace

import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from small_stage import commit, content_of, make_spec

from negfacediff_core.errors import StoreError
from negfacediff_core.store import layout, records, runs, shards
from negfacediff_core.store.layout import Grid, Unit, Weight


def test_a_spec_survives_pickling_and_its_own_stage_json(tmp_path):
    spec = make_spec(tmp_path)
    shards.prepare(spec)
    assert pickle.loads(pickle.dumps(spec)) == spec
    again = layout.read_spec(str(tmp_path), "samples", spec.fingerprint)
    assert replace(again, grid=spec.grid) == spec


def test_a_store_keeps_its_first_blocks(tmp_path):
    spec = make_spec(tmp_path)
    shards.prepare(spec)
    other = replace(spec, grid=replace(spec.grid, block_identities=2))
    assert layout.adopt(other).grid == spec.grid
    with pytest.raises(StoreError, match="other block sizes"):
        shards.prepare(other)


def test_stage_json_of_another_code_or_schema_is_refused(tmp_path):
    spec = make_spec(tmp_path)
    shards.prepare(spec)
    with pytest.raises(StoreError, match="other arrays or columns"):
        layout.adopt(replace(spec, columns=spec.columns[:2]))
    path = tmp_path / spec.path / "stage.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "config": {"w": 0.7}}))
    with pytest.raises(StoreError, match="damaged"):
        layout.adopt(spec)
    path.write_text(json.dumps({**content, "schema": 2}))
    with pytest.raises(StoreError, match="schema version 2, but this version reads up to 1"):
        layout.adopt(spec)


def test_a_store_of_an_older_schema_keeps_its_places_and_is_read_through_the_table(tmp_path, monkeypatch):
    spec = make_spec(tmp_path)
    shards.prepare(spec)
    record = commit(spec, Unit(0, 0))
    places = {"samples": {"fingerprint": spec.fingerprint, "identities": 6, "replicates": 4}}
    runs.write_run(str(tmp_path), "old", {"stages": places})
    stage = tmp_path / spec.path / "stage.json"
    stage.write_text(stage.read_text().replace('"per_replicate": true', '"has_replicates": true'))

    def upgrade(content):
        renamed = {"has_replicates": "per_replicate"}
        return {renamed.get(name, name): value for name, value in content.items()}

    for module in (layout, records, runs):
        monkeypatch.setattr(module, "SCHEMA_VERSION", 2)
    monkeypatch.setattr(layout, "READERS", {1: upgrade, 2: dict})
    spec = make_spec(tmp_path)  # nothing is kept of what was hashed before
    assert layout.adopt(spec) == spec
    assert shards.read_rows(spec, Unit(0, 0)).equals(content_of(spec, Unit(0, 0))[1])
    assert records.read_record(spec, Unit(0, 0)) == record
    assert runs.read_run(str(tmp_path), "old")["stages"] == places
    commit(spec, Unit(1, 0))
    assert [one.unit for one in records.records(spec)] == [Unit(0, 0), Unit(1, 0)]
    assert json.loads((tmp_path / spec.path / layout.record_path(Unit(1, 0))).read_text())["schema"] == 2


def test_a_schema_that_is_no_longer_read_is_refused_with_the_command_that_helps(tmp_path, monkeypatch):
    spec = make_spec(tmp_path)
    shards.prepare(spec)
    monkeypatch.setattr(layout, "SCHEMA_VERSION", 3)
    monkeypatch.setattr(layout, "READERS", {2: dict, 3: dict})
    with pytest.raises(
        StoreError, match=r"version 1, but this version reads 2 to 3; .*negfacediff build PRESET"
    ):
        layout.adopt(spec)


def test_shards_have_the_path_that_zarr_gives_them(tmp_path):
    spec = make_spec(tmp_path, replicates=8)
    shards.prepare(spec)
    group = zarr.open_group(str(tmp_path / spec.path / "arrays.zarr"), mode="r")
    for array, position in zip(spec.arrays, [(1, 1, 0, 0, 0), (1, 1, 0)], strict=True):
        key = group[array.name].metadata.encode_chunk_key(position)
        assert layout.array_path(spec, array, Unit(1, 1)) == f"arrays.zarr/{array.name}/{key}"


def test_paths_and_extents_do_not_move_a_stage_but_content_does(tmp_path):
    spec = make_spec(tmp_path)
    assert make_spec(tmp_path / "elsewhere", identities=99).fingerprint == spec.fingerprint
    moved_weights = {"generator": Weight("/elsewhere", {"unet": "ab"})}
    assert replace(spec, weights=moved_weights).fingerprint == spec.fingerprint
    others = [
        replace(spec, weights={"generator": Weight("/somewhere", {"unet": "cd"})}),
        replace(spec, config={"w": 0.50001}),
        replace(spec, version=2),
        replace(spec, name="aligned"),
        replace(spec, inputs={"contexts": "1" * 16}),
    ]
    assert len({other.fingerprint for other in [spec, *others]}) == 6


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_fingerprints_do_not_depend_on_the_order_of_keys(content):
    backwards = dict(reversed(content.items()))
    assert layout.fingerprint(content) == layout.fingerprint(backwards)


@given(
    extent=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    blocks=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    more=st.tuples(st.integers(0, 20), st.integers(0, 20)),
)
def test_units_cover_every_sample_once_and_growth_renames_none(extent, blocks, more):
    grid = Grid(*extent, *blocks)
    cells = [
        (i, r) for unit in grid.units() for i in grid.identities_of(unit) for r in grid.replicates_of(unit)
    ]
    assert len(cells) == len(set(cells))
    assert {(i, r) for i in range(extent[0]) for r in range(extent[1])} <= set(cells)
    grown = Grid(extent[0] + more[0], extent[1] + more[1], *blocks)
    assert set(grid.units()) <= set(grown.units())
    for unit in grid.units():
        assert grown.identities_of(unit) == grid.identities_of(unit)
        assert Unit.parse(unit.name) == unit

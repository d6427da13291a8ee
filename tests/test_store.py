"""Units are committed whole, read back whole, and never rewritten; damage is named."""

from dataclasses import replace

import numpy as np
import pytest
from small_stage import commit, content_of, make_spec

from negfacediff_core.errors import StoreError
from negfacediff_core.store import arrays as zarr_arrays
from negfacediff_core.store import layout, records, shards, tables
from negfacediff_core.store.layout import ArraySpec, Grid, Unit


@pytest.mark.parametrize("place", ["local", "memory"])
def test_committed_units_read_back(place, tmp_path):
    spec = make_spec(tmp_path / "store" if place == "local" else f"memory://{tmp_path.name}/store")
    shards.prepare(spec)
    assert records.pending(spec) == [Unit(0, 0), Unit(1, 0)]
    record = commit(spec, Unit(1, 0))
    assert (record.rows, record.ok, record.failed) == (16, 15, 1)
    assert set(record.seconds) == {"sample", "write"}
    assert records.pending(spec) == [Unit(0, 0)]
    arrays, rows = content_of(spec, Unit(1, 0))
    read = shards.read_arrays(spec, Unit(1, 0))
    np.testing.assert_array_equal(read["image"], arrays["image"])
    np.testing.assert_array_equal(read["embedding"], arrays["embedding"])
    assert shards.read_rows(spec, Unit(1, 0)).equals(rows)
    assert records.records(spec) == [record]


def test_what_is_not_committed_is_an_error_not_black_pixels(tmp_path):
    spec = make_spec(tmp_path)
    shards.prepare(spec)
    with pytest.raises(StoreError, match=r"unit 00001-000 of .* is not committed"):
        shards.read_arrays(spec, Unit(1, 0))
    commit(spec, Unit(0, 0))
    (tmp_path / spec.path / layout.array_path(spec, spec.arrays[0], Unit(0, 0))).unlink()
    with pytest.raises(StoreError, match="missing"):
        shards.read_arrays(spec, Unit(0, 0))


@pytest.mark.parametrize("path", ["shard", "part", "record"])
def test_damage_is_found_and_named(path, tmp_path):
    spec = make_spec(tmp_path)
    shards.prepare(spec)
    unit = Unit(0, 0)
    commit(spec, unit)
    relative = {
        "shard": layout.array_path(spec, spec.arrays[0], unit),
        "part": layout.part_path(unit),
        "record": layout.record_path(unit),
    }[path]
    file = tmp_path / spec.path / relative
    file.write_bytes(file.read_bytes()[:-9])
    read = shards.read_rows if path == "part" else shards.read_arrays
    with pytest.raises(StoreError, match=relative):
        read(spec, unit)


def test_an_all_zero_unit_is_written_too(tmp_path):
    spec = make_spec(tmp_path)
    shards.prepare(spec)
    arrays, rows = content_of(spec, Unit(0, 0))
    black = {name: np.zeros_like(values) for name, values in arrays.items()}
    shards.commit(spec, Unit(0, 0), arrays=black, rows=rows, started=0.0, seconds={}, device="cpu")
    assert not shards.read_arrays(spec, Unit(0, 0))["image"].any()


def test_a_committed_unit_is_never_rewritten(tmp_path):
    spec = make_spec(tmp_path)
    shards.prepare(spec)
    first = commit(spec, Unit(0, 0))
    arrays, rows = content_of(spec, Unit(0, 0))
    other = {name: values + 1 for name, values in arrays.items()}
    second = shards.commit(spec, Unit(0, 0), arrays=other, rows=rows, started=0.0, seconds={}, device="cpu")
    assert second == first
    np.testing.assert_array_equal(shards.read_arrays(spec, Unit(0, 0))["image"], arrays["image"])


def test_growth_along_both_axes_leaves_committed_units_alone(tmp_path):
    spec = make_spec(tmp_path, identities=4, replicates=4)
    shards.prepare(spec)
    commit(spec, Unit(0, 0))
    folder = tmp_path / spec.path
    before = {path: path.read_bytes() for path in folder.rglob("*") if "00000-000" in path.name}
    before |= {path: path.read_bytes() for path in folder.glob("arrays.zarr/*/c.*")}
    grown = replace(spec, grid=replace(spec.grid, identities=9, replicates=5))
    assert grown.fingerprint == spec.fingerprint
    shards.prepare(grown)
    assert records.pending(grown) == [unit for unit in grown.grid.units() if unit != Unit(0, 0)]
    for unit in records.pending(grown):
        commit(grown, unit)
    shards.prepare(spec)  # a smaller extent shrinks nothing
    for unit in grown.grid.units():
        np.testing.assert_array_equal(
            shards.read_arrays(grown, unit)["image"], content_of(grown, unit)[0]["image"]
        )
    assert all(path.read_bytes() == data for path, data in before.items())


def test_the_last_block_ends_at_the_limit(tmp_path):
    spec = make_spec(tmp_path, identities=6, limit=6)
    shards.prepare(spec)
    assert list(spec.grid.identities_of(Unit(1, 0))) == [4, 5]
    commit(spec, Unit(1, 0))
    assert shards.read_arrays(spec, Unit(1, 0))["image"].shape == (2, 4, 5, 5, 3)


def test_a_part_of_a_shard_is_refused(tmp_path):
    spec = make_spec(tmp_path)
    shards.prepare(spec)
    arrays, rows = content_of(spec, Unit(0, 0))
    short = {**arrays, "image": arrays["image"][:, :2]}
    with pytest.raises(StoreError, match=r"takes the whole image as \(4, 4, 5, 5, 3\)"):
        zarr_arrays.encode_unit(spec, Unit(0, 0), short)
    with pytest.raises(StoreError, match=r"holds \['image', 'embedding'\]"):
        zarr_arrays.encode_unit(spec, Unit(0, 0), {"image": arrays["image"]})
    with pytest.raises(StoreError, match="columns"):
        tables.encode_part(spec, rows.drop_columns(["error"]))


def test_temporary_files_are_not_listed(tmp_path):
    spec = make_spec(tmp_path)
    shards.prepare(spec)
    commit(spec, Unit(0, 0))
    (tmp_path / spec.path / "done" / ".00001-000.json.abc.tmp").write_text("{")
    assert records.pending(spec) == [Unit(1, 0)]


def test_a_stage_of_identities_has_no_replicate_axis(tmp_path):
    spec = make_spec(
        tmp_path, name="contexts", arrays=(ArraySpec("context", "f4", (7,)),), per_replicate=False
    )
    spec = replace(spec, grid=Grid(6, 1, 4, 1))
    shards.prepare(spec)
    contexts = np.arange(28, dtype=np.float32).reshape(4, 7)
    rows = tables.rows_of(spec, {name: [] for name, _ in spec.columns})
    shards.commit(
        spec, Unit(1, 0), arrays={"context": contexts}, rows=rows, started=0.0, seconds={}, device=""
    )
    np.testing.assert_array_equal(shards.read_arrays(spec, Unit(1, 0))["context"], contexts)

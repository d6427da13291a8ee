import json
import pickle
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from negfacediff_core.errors import StoreError
from negfacediff_core.store import arrays as zarr_arrays
from negfacediff_core.store import layout, records, runs, shards, status, tables
from negfacediff_core.store.layout import ArraySpec, Grid, StageSpec, Unit, Weight
from negfacediff_core.store.location import locate


def make_spec(store, identities=6, replicates=4, limit=None, **changes):
    spec = StageSpec(
        store=str(store),
        name="samples",
        version=1,
        config={"w": 0.5},
        inputs={"contexts": "0" * 16},
        grid=Grid(identities, replicates, block_identities=4, block_replicates=4, limit=limit),
        weights={"generator": Weight("/somewhere", {"unet": "ab"})},
        arrays=(ArraySpec("image", "u1", (5, 5, 3)), ArraySpec("embedding", "f4", (7,))),
        columns=(("identity", "int64"), ("replicate", "int64"), ("status", "string"), ("error", "string")),
    )
    return replace(spec, **changes)


def content_of(spec, unit):
    """What a deterministic stage would make of a unit; the first image is black and failed."""
    rng = np.random.default_rng([unit.identity_block, unit.replicate_block])
    identities, replicates = spec.grid.identities_of(unit), spec.grid.replicates_of(unit)
    images = rng.integers(0, 256, (len(identities), len(replicates), 5, 5, 3), np.uint8)
    images[0, 0] = 0
    embeddings = rng.standard_normal((len(identities), len(replicates), 7)).astype(np.float32)
    cells = [(i, r) for i in identities for r in replicates]
    rows = tables.rows_of(
        spec,
        {
            "identity": [i for i, _ in cells],
            "replicate": [r for _, r in cells],
            "status": ["failed"] + ["ok"] * (len(cells) - 1),
            "error": ["it is black"] + [None] * (len(cells) - 1),
        },
    )
    return {"image": images, "embedding": embeddings}, rows


def commit(spec, unit):
    arrays, rows = content_of(spec, unit)
    return shards.commit(
        spec, unit, arrays=arrays, rows=rows, started=time.time(), seconds={"sample": 1.0}, device="cpu"
    )


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


def test_a_spec_survives_pickling_and_its_own_stage_json(tmp_path):
    spec = make_spec(tmp_path)
    shards.prepare(spec)
    assert pickle.loads(pickle.dumps(spec)) == spec
    again = layout.read_spec(str(tmp_path), "samples", spec.fingerprint)
    assert replace(again, grid=spec.grid) == spec


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
        zarr_arrays.write_unit(spec, Unit(0, 0), short)
    with pytest.raises(StoreError, match=r"holds \['image', 'embedding'\]"):
        zarr_arrays.write_unit(spec, Unit(0, 0), {"image": arrays["image"]})
    with pytest.raises(StoreError, match="columns"):
        tables.write_part(spec, Unit(0, 0), rows.drop_columns(["error"]))


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


def test_places_that_cannot_be_written_say_so(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="a file stands where a folder is needed"):
        locate(str(tmp_path / "file")).check_writable()
    with pytest.raises(StoreError, match=r"cannot read .*nothing.json: it is missing"):
        locate(str(tmp_path)).read_bytes("nothing.json")
    with pytest.raises(StoreError, match=r"cannot open nowhere://x"):
        locate("nowhere://x")


@pytest.mark.parametrize(
    "number, reason", [(28, "disk is full"), (30, "read-only"), (5, "Input/output error")]
)
def test_a_failing_disk_is_explained_and_leaves_nothing(number, reason, tmp_path, monkeypatch):
    place = locate(str(tmp_path))
    place.write_atomic("file", b"old")

    def fail(handle):
        raise OSError(number, "Input/output error")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(StoreError, match=reason):
        place.write_atomic("file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert place.read_bytes("file") == b"old"


def test_a_full_disk_under_zarr_is_explained(tmp_path, monkeypatch):
    spec = make_spec(tmp_path)
    shards.prepare(spec)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zarr.storage._local._put", fail)
    with pytest.raises(StoreError, match="disk is full"):
        commit(spec, Unit(0, 0))
    assert records.pending(spec) == spec.grid.units()


def test_a_lock_has_one_holder(tmp_path):
    order = []
    place = locate(str(tmp_path))

    def second():
        with place.lock("stage"):
            order.append("second")

    with place.lock("stage"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_temporary_files_are_not_listed(tmp_path):
    spec = make_spec(tmp_path)
    shards.prepare(spec)
    commit(spec, Unit(0, 0))
    (tmp_path / spec.path / "done" / ".00001-000.json.abc.tmp").write_text("{")
    assert records.pending(spec) == [Unit(1, 0)]


def test_shards_have_the_path_that_zarr_gives_them(tmp_path):
    spec = make_spec(tmp_path, replicates=8)
    shards.prepare(spec)
    group = zarr.open_group(str(tmp_path / spec.path / "arrays.zarr"), mode="r")
    for array, position in zip(spec.arrays, [(1, 1, 0, 0, 0), (1, 1, 0)], strict=True):
        key = group[array.name].metadata.encode_chunk_key(position)
        assert layout.array_path(spec, array, Unit(1, 1)) == f"arrays.zarr/{array.name}/{key}"


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


def test_status_comes_from_disk_alone(tmp_path):
    spec = make_spec(tmp_path, inputs={})
    aligned = make_spec(tmp_path, name="aligned", inputs={"samples": spec.fingerprint})
    for each in (spec, aligned):
        shards.prepare(each)
    place = {"identities": 6, "replicates": 4}
    stages = {each.name: {"fingerprint": each.fingerprint, **place} for each in (aligned, spec)}
    runs.write_run(str(tmp_path), "first", {"stages": stages})
    commit(spec, Unit(0, 0))
    made, waiting = status.status(str(tmp_path))
    assert (made.stage, made.done, made.pending, made.rows, made.failed) == ("samples", 1, 1, 16, 1)
    assert made.runs == ("first",) and made.rate > 0
    assert made.seconds_left == pytest.approx(16 / made.rate)
    assert (waiting.stage, waiting.done, waiting.pending, waiting.rate) == ("aligned", 0, 2, None)
    assert status.status(str(tmp_path / "nothing here")) == []


def test_status_passes_over_what_is_no_part_of_a_store(tmp_path):
    (tmp_path / "readme.txt").write_text("notes")
    (tmp_path / "photos" / "2024").mkdir(parents=True)
    assert status.status(str(tmp_path)) == []
    assert status.status(str(tmp_path / "readme.txt")) == []
    spec = make_spec(tmp_path, inputs={})
    shards.prepare(spec)
    commit(spec, Unit(0, 0))
    done = tmp_path / spec.path / "done"
    for stray in (
        "foo.json",
        "a-b.json",
        "0-0.json",
        "00000-000.json.bak",
        "00001-000",
        "00000-000 (1).json",
    ):
        (done / stray).write_text("{}")
    assert records.committed(spec) == [Unit(0, 0)]
    assert [stage.done for stage in status.status(str(tmp_path))] == [1]


def test_status_of_a_store_whose_stage_was_deleted(tmp_path):
    spec = make_spec(tmp_path, inputs={})
    shards.prepare(spec)
    place = {"identities": 6, "replicates": 4}
    stages = {
        "samples": {"fingerprint": spec.fingerprint, **place},
        "aligned": {"fingerprint": "f" * 16, **place},
    }
    runs.write_run(str(tmp_path), "first", {"stages": stages})
    (only,) = status.status(str(tmp_path))
    assert (only.stage, only.pending, only.runs) == ("samples", 2, ("first",))


PLACE = {"fingerprint": "f" * 16, "identities": 6, "replicates": 4}


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"stages": ["samples"]},
        {"stages": {"samples": "f" * 16}},
        {"stages": {"samples": {**PLACE, "fingerprint": None}}},
        {"stages": {"samples": {**PLACE, "replicates": "4"}}},
        {"stages": {"samples": {"fingerprint": "f" * 16}}},
    ],
)
def test_a_damaged_run_is_named(content, tmp_path):
    runs.write_run(str(tmp_path), "x", {"stages": {"samples": PLACE}})
    assert runs.read_run(str(tmp_path), "x")["stages"] == {"samples": PLACE}
    (tmp_path / "runs" / "my notes.json").write_text("[]")
    assert list(runs.read_runs(str(tmp_path))) == ["x"]
    (tmp_path / "runs" / "x.json").write_text(json.dumps({"schema": 1, **content}))
    for read in (lambda: runs.read_run(str(tmp_path), "x"), lambda: status.status(str(tmp_path))):
        with pytest.raises(StoreError, match=r"runs/x\.json is damaged"):
            read()


def test_the_rate_counts_parallel_work_once_and_pauses_not_at_all(tmp_path):
    spec = make_spec(tmp_path)
    shards.prepare(spec)
    record = commit(spec, Unit(0, 0))
    spans = [(0, 10), (0, 10), (5, 12), (1000, 1004)]
    done = [replace(record, started=float(a), finished=float(b)) for a, b in spans]
    assert status.rate(done) == pytest.approx(4 * 16 / 16)
    assert status.rate([]) is None


def test_runs_are_named_safely(tmp_path):
    assert runs.read_run(str(tmp_path), "demo") is None
    runs.write_run(str(tmp_path), "demo", {"stages": {}})
    assert runs.read_runs(str(tmp_path))["demo"]["name"] == "demo"
    with pytest.raises(StoreError, match="cannot name a run"):
        runs.write_run(str(tmp_path), "../demo", {"stages": {}})


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

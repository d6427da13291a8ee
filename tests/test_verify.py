"""Every damage is found, named by unit, and mended by making pending what it has spoilt, and nothing else."""

import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_stage import commit, content_of, make_spec

from negfacediff_core.errors import DamagedError, StoreError
from negfacediff_core.store import arrays as zarr_arrays
from negfacediff_core.store import faults, layout, records, shards, tables
from negfacediff_core.store.layout import Grid, Unit, array_path, part_path, record_path
from negfacediff_core.store.location import locate
from negfacediff_core.store.repair import failed_units, forget_units, repair
from negfacediff_core.store.runs import write_run
from negfacediff_core.store.status import unfinished
from negfacediff_core.store.verify import Kind, check_units, survey

FIRST = Unit(0, 0)
FAR = Unit(1, 1)


def make_all(specs):
    """Commit every unit of stages."""
    for spec in specs:
        shards.prepare(spec)
        for unit in spec.grid.units():
            make(spec, unit)


def made_stages(place):
    """A store of 6 x 8 samples, aligned crops in the same units, and an evaluation in one; all committed."""
    store = str(place)
    samples = make_spec(store, replicates=8, inputs={})
    aligned = make_spec(store, replicates=8, name="aligned", inputs={"samples": samples.fingerprint})
    evaluation = make_spec(
        store,
        name="evaluation",
        arrays=(),
        columns=(("identity", "int64"),),
        inputs={"samples": samples.fingerprint, "aligned": aligned.fingerprint},
        per_replicate=False,
    )
    evaluation = replace(evaluation, grid=Grid(6, 1, 6, 1))
    specs = {spec.name: spec for spec in (samples, aligned, evaluation)}
    make_all(specs.values())
    bind(store, "first", specs)
    return specs


def make(spec, unit):
    if spec.arrays:
        return commit(spec, unit)
    rows = tables.rows_of(spec, {"identity": spec.grid.identities_of(unit)})
    files = {"report.json": b"{}"}
    return shards.commit(spec, unit, arrays={}, rows=rows, started=0.0, seconds={}, device="cpu", files=files)


def bind(store, run, specs):
    places = {
        name: {
            "fingerprint": spec.fingerprint,
            "identities": spec.grid.identities,
            "replicates": spec.grid.replicates,
        }
        for name, spec in specs.items()
    }
    write_run(store, run, {"stages": places, "seconds": 1.0})


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    place = tmp_path_factory.mktemp("pristine")
    made_stages(place)
    return place


@pytest.fixture
def stages(pristine, tmp_path):
    """The stages of `made_stages` in a store of their own."""
    shutil.copytree(pristine, tmp_path / "store")
    names = {
        path.parent.parent.name: path.parent.name for path in (tmp_path / "store").glob("*/*/stage.json")
    }
    extents = {"samples": (6, 8), "aligned": (6, 8), "evaluation": (6, 1)}
    specs = {}
    for name, extent in extents.items():
        spec = layout.read_spec(str(tmp_path / "store"), name, names[name])
        grid = replace(spec.grid, identities=extent[0], replicates=extent[1])
        specs[name] = replace(spec, grid=grid)
    return specs


def findings(store, **options):
    found = survey(store, **options)
    return [*found.findings, *check_units(found.units)]


def overwrite(spec, path, change):
    spec.location.write_atomic(path, change(spec.location.read_bytes(path)))


def test_a_whole_store_has_no_findings_and_all_its_bytes_are_checked(stages):
    spec = stages["samples"]
    told = []
    found = survey(spec.store)
    assert found.findings == [] and len(found.units) == 4 + 4 + 1
    assert list(check_units(found.units, progress=lambda *now: told.append(now))) == []
    done, total = told[-1]
    assert done == total > 0 and [now[0] for now in told] == sorted(now[0] for now in told)


def shard_of(spec, unit):
    return array_path(spec, spec.arrays[0], unit)


def part_of(spec, unit):
    return part_path(unit)


def record_of(spec, unit):
    return record_path(unit)


DAMAGE = {
    "a flipped bit of a shard": (shard_of, lambda data: bytes([data[0] ^ 1]) + data[1:], "not what was"),
    "a truncated part": (
        lambda spec, unit: part_path(unit),
        lambda data: data[:-1],
        "not what was committed",
    ),
    "a longer part": (
        lambda spec, unit: part_path(unit),
        lambda data: data + b"\0",
        "not what was committed",
    ),
    "a record that is no JSON": (record_of, lambda data: data[:40], "record is damaged"),
    "a record that says something else": (
        record_of,
        lambda data: data.replace(b'"device": "cpu"', b'"device": "gpu"'),
        "record is damaged",
    ),
}


@pytest.mark.parametrize("case", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_by_unit_and_repair_makes_pending_what_was_made_from_it(case, stages):
    path_of, change, problem = case
    spec = stages["samples"]
    path = path_of(spec, FAR)
    overwrite(spec, path, change)
    (found,) = findings(spec.store)
    assert (found.kind, found.path, found.unit) == (Kind.UNIT, f"{spec.path}/{path}", FAR)
    assert problem in found.problem
    done = repair(spec.store, [found])
    assert done.damaged == {spec.path: {FAR}} and not done.left and not done.files
    assert done.derived == {stages["aligned"].path: {FAR}, stages["evaluation"].path: {FIRST}}
    assert [records.pending(one) for one in stages.values()] == [[FAR], [FAR], [FIRST]]
    assert unfinished(spec.store) == {"first": 3}
    for one in stages.values():
        for unit in records.pending(one):
            make(one, unit)
    assert findings(spec.store) == [] and unfinished(spec.store) == {}


def test_no_bit_of_a_record_changes_unseen(tmp_path):
    spec = make_spec(tmp_path)
    shards.prepare(spec)
    record = commit(spec, FIRST)
    path = tmp_path / spec.path / record_path(FIRST)
    whole = path.read_bytes()
    seen = 0
    for spot in range(len(whole)):
        path.write_bytes(whole[:spot] + bytes([whole[spot] ^ 1 << spot % 7]) + whole[spot + 1 :])
        try:
            assert records.read_record(spec, FIRST) == record
        except DamagedError:
            seen += 1
    assert seen > 0.9 * len(whole)


def test_the_repair_that_a_message_offers_can_be_pasted_into_a_shell(tmp_path):
    store = tmp_path / "a store; $(touch canary)"
    spec = make_spec(store)
    shards.prepare(spec)
    commit(spec, FIRST)
    command = f"negfacediff verify '{store}' --repair"
    overwrite(spec, part_path(FIRST), lambda data: data[:-1])
    with pytest.raises(StoreError, match=re.escape(command)):
        shards.read_rows(spec, FIRST)
    overwrite(spec, record_path(FIRST), lambda data: data.replace(b"cpu", b"gpu"))
    with pytest.raises(DamagedError, match=re.escape(command)):
        records.read_record(spec, FIRST)


def test_rows_with_other_columns_than_the_stages_are_damaged(tmp_path):
    """A reader that is told the columns would make up those that are missing, and convert others."""
    spec = make_spec(tmp_path)
    rows = content_of(spec, FIRST)[1]
    assert tables.parse_part(spec, tables.encode_part(spec, rows)).equals(rows)
    others = {
        "fewer": rows.drop_columns("error"),
        "more": rows.append_column("w", rows.column("identity")),
        "another type": rows.cast(rows.schema.set(0, pa.field("identity", pa.int32()))),
    }
    for changed in others.values():
        part = pa.BufferOutputStream()
        pq.write_table(changed, part)
        with pytest.raises(DamagedError, match="a part is Parquet with the columns identity, replicate"):
            tables.parse_part(spec, part.getvalue().to_pybytes())


def test_a_missing_shard_and_a_further_file_are_found(stages):
    samples, evaluation = stages["samples"], stages["evaluation"]
    samples.location.remove(shard_of(samples, FIRST))
    overwrite(evaluation, "report.json", lambda data: b"[]")
    found = findings(samples.store)
    assert [(one.path.split("/")[-1], one.problem) for one in found] == [
        ("report.json", "it is not what was committed"),
        ("c.0.0.0.0.0", "it is missing"),
    ]


def test_what_is_made_again_from_a_damaged_unit_of_one_run_leaves_other_units_alone(stages):
    aligned = stages["aligned"]
    derived = forget_units(aligned.store, {aligned.path: {FIRST}})
    assert derived == {stages["evaluation"].path: {FIRST}}
    assert records.pending(stages["samples"]) == []
    assert records.pending(aligned) == [FIRST]


def test_what_was_compared_with_a_gallery_was_made_from_all_of_it(stages):
    """A gallery's images are numbered as identities are, but are not those of the run."""
    samples, aligned = stages["samples"], stages["aligned"]
    gallery = make_spec(samples.store, identities=12, replicates=1, name="gallery", inputs={})
    read = {"aligned": aligned.fingerprint, "gallery": gallery.fingerprint}
    neighbours = make_spec(samples.store, replicates=8, name="neighbours", inputs=read)
    leakage = make_spec(
        samples.store,
        name="leakage",
        arrays=(),
        columns=(("identity", "int64"),),
        inputs={"gallery": gallery.fingerprint, "neighbours": neighbours.fingerprint},
        per_replicate=False,
    )
    leakage = replace(leakage, grid=Grid(6, 1, 6, 1))
    gate = {spec.name: spec for spec in (gallery, neighbours, leakage)}
    make_all(gate.values())
    bind(samples.store, "first.leakage", gate)
    # images 8 to 11: the run has six identities
    derived = forget_units(samples.store, {gallery.path: {Unit(2, 0)}})
    assert derived == {neighbours.path: set(neighbours.grid.units()), leakage.path: {Unit(0, 0)}}
    assert records.committed(gallery) == [Unit(0, 0), Unit(1, 0)]
    assert unfinished(samples.store) == {"first.leakage": 1 + 4 + 1}

    for spec in (gallery, neighbours, leakage):
        for unit in records.pending(spec):
            make(spec, unit)
    derived = forget_units(samples.store, {neighbours.path: {FIRST}})
    assert derived == {leakage.path: {Unit(0, 0)}}


def test_units_of_another_size_are_made_from_those_that_they_overlap(tmp_path):
    source = replace(make_spec(tmp_path, inputs={}), grid=Grid(12, 8, 4, 4))
    reader = make_spec(tmp_path, name="aligned", inputs={"samples": source.fingerprint})
    reader = replace(reader, grid=Grid(12, 8, 6, 8))
    for spec in (source, reader):
        shards.prepare(spec)
        for unit in spec.grid.units():
            commit(spec, unit)
    derived = forget_units(str(tmp_path), {source.path: {Unit(1, 1)}})  # identities 4 to 7
    assert derived == {reader.path: {Unit(0, 0), Unit(1, 0)}}
    for unit in reader.grid.units():
        commit(reader, unit)
    assert forget_units(str(tmp_path), {source.path: {Unit(2, 0)}}) == {reader.path: {Unit(1, 0)}}


def test_a_repair_that_is_killed_anywhere_can_be_repeated(pristine, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    for point in range(4):
        store = str(shutil.copytree(pristine, tmp_path / str(point)))
        stages = {spec.name: spec for spec in (unit.spec for unit in survey(store).units)}
        overwrite(stages["samples"], part_path(FIRST), lambda data: data[:-1])
        steps = []

        def die(step, steps=steps, point=point):
            if step.startswith("remove") and len(steps) == point:
                raise Killed
            steps.append(step)

        found = findings(store)
        monkeypatch.setattr(faults, "hook", die)
        if point < 3:
            with pytest.raises(Killed):
                repair(store, found)
            monkeypatch.setattr(faults, "hook", None)
            # what is left must not be believed: the damage is still there to be found
            assert [one.unit for one in findings(store)] == [FIRST]
            found = findings(store)
        repair(store, found)
        monkeypatch.setattr(faults, "hook", None)
        assert findings(store) == [] and unfinished(store) == {"first": 3}
        assert FIRST not in records.committed(stages["samples"]) + records.committed(stages["aligned"])
        assert records.committed(stages["evaluation"]) == []


@pytest.mark.parametrize(
    "name, change",
    [
        ("image/zarr.json", lambda data: data[:50]),
        ("image/zarr.json", lambda data: data.replace(b'"blosc"', b'"gzip"')),
        ("embedding/zarr.json", lambda data: data.replace(b'"little"', b'"big"', 1)),
        ("image/zarr.json", lambda data: data.replace(b"8,", b"4,", 1)),
        ("zarr.json", lambda data: b""),
    ],
)
def test_damaged_metadata_of_arrays_are_found_and_written_again(name, change, stages):
    spec = stages["samples"]
    path = f"arrays.zarr/{name}"
    before = spec.location.read_bytes(path)
    overwrite(spec, path, change)
    assert spec.location.read_bytes(path) != before
    found = findings(spec.store)
    assert [(one.kind, one.path) for one in found] == [(Kind.ARRAYS, f"{spec.path}/{path}")]
    done = repair(spec.store, found)
    assert done.files == [f"{spec.path}/{path}"] and not done.damaged and not done.left
    assert spec.location.read_bytes(path) == before
    assert findings(spec.store) == []


def test_metadata_that_are_mended_are_never_missing(stages, monkeypatch):
    """Killed at any step of the repair, they are the old ones or the new ones."""

    class Killed(BaseException):
        pass

    spec = stages["samples"]
    path = "arrays.zarr/image/zarr.json"
    before = spec.location.read_bytes(path)
    for point in ("write", "half", "rename", "renamed"):
        overwrite(spec, path, lambda data: data[:50])
        found = findings(spec.store)
        steps = []

        def die(step, point=point, steps=steps):
            steps.append(step)
            if step == f"{point} {path}":
                raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(faults, "hook", die)
            repair(spec.store, found)
        assert not any(step.startswith("remove") for step in steps)
        assert spec.location.read_bytes(path) == (before if point == "renamed" else before[:50])
    assert findings(spec.store) == []


def test_what_cannot_be_read_of_a_stage_is_named_and_the_rest_is_checked(stages):
    samples, aligned, evaluation = stages.values()
    metadata = Path(samples.directory) / "arrays.zarr" / "image" / "zarr.json"
    before = metadata.read_bytes()
    metadata.unlink()
    metadata.mkdir()
    overwrite(samples, "arrays.zarr/embedding/zarr.json", lambda data: data[:50])
    overwrite(aligned, part_path(FAR), lambda data: data[:-1])
    overwrite(evaluation, record_path(FIRST), lambda data: data[:50])
    found = {one.path: one for one in findings(samples.store)}
    assert {path: one.kind for path, one in found.items()} == {
        f"{samples.path}/arrays.zarr/image/zarr.json": Kind.UNREADABLE,
        f"{samples.path}/arrays.zarr/embedding/zarr.json": Kind.ARRAYS,
        f"{aligned.path}/{part_path(FAR)}": Kind.UNIT,
        f"{evaluation.path}/{record_path(FIRST)}": Kind.UNIT,
    }
    unreadable = found[f"{samples.path}/arrays.zarr/image/zarr.json"]
    assert "a folder stands where a file is needed" in unreadable.problem
    done = repair(samples.store, found.values())
    assert {one.path for one in done.left} == {path for path in found if path.endswith("zarr.json")}
    assert done.damaged == {aligned.path: {FAR}, evaluation.path: {FIRST}}
    metadata.rmdir()
    metadata.write_bytes(before)
    assert repair(samples.store, findings(samples.store)).files == [
        f"{samples.path}/arrays.zarr/embedding/zarr.json"
    ]


def test_a_stage_that_cannot_be_listed_is_named_and_the_rest_is_checked(stages, monkeypatch):
    samples, aligned = stages["samples"], stages["aligned"]
    overwrite(aligned, part_path(FAR), lambda data: data[:-1])
    walk = type(samples.location).walk

    def failing(self, path):
        if self.url == samples.directory:
            raise StoreError(f"cannot list {self.url}: the disk fails.")
        return walk(self, path)

    monkeypatch.setattr(type(samples.location), "walk", failing)
    found = findings(samples.store)
    assert [(one.kind, one.path) for one in found] == [
        (Kind.UNREADABLE, samples.path),
        (Kind.UNIT, f"{aligned.path}/{part_path(FAR)}"),
    ]


# Python's own reader takes the second, and then fails where it is written again.
DEEP = {"arrays": b"[" * 100_000, "values": b'{"a":' * 900 + b"1" + b"}" * 900}


@pytest.mark.parametrize("deep", DEEP.values(), ids=DEEP)
@pytest.mark.parametrize("path", ["stage.json", record_path(FIRST), "arrays.zarr/image/zarr.json", "run"])
def test_json_that_is_nested_too_deep_is_damage(path, deep, stages):
    spec = stages["samples"]
    place = spec.location
    if path == "run":
        place, path = locate(spec.store), "runs/first.json"
    content = place.read_bytes(path)
    for nested in (deep, content[: content.rindex(b"}")] + b', "more": ' + deep + b"}"):
        place.write_atomic(path, nested)
        found = findings(spec.store)
        assert [one.path.rsplit("/", 1)[1] for one in found] == [path.rsplit("/", 1)[-1]]
        assert found[0].kind is not Kind.UNREADABLE


def test_a_unit_beyond_the_arrays_is_found(stages):
    spec = stages["samples"]
    beyond = Unit(5, 0)
    content = json.loads(spec.location.read_bytes(record_path(FIRST)))
    layout.write_json(spec.location, record_path(beyond), {**content, "unit": beyond.name})
    kinds = {one.kind for one in findings(spec.store)}
    assert kinds == {Kind.ARRAYS, Kind.UNIT}
    assert zarr_arrays.damaged_metadata(spec, [FAR]) == {}


def test_rows_are_the_samples_of_the_unit_each_once(tmp_path):
    spec = make_spec(tmp_path, inputs={})
    shards.prepare(spec)
    commit(spec, Unit(0, 0))
    commit(spec, Unit(1, 0))
    record = json.loads(spec.location.read_bytes(record_path(FIRST)))
    other = spec.location.read_bytes(part_path(Unit(1, 0)))
    spec.location.write_atomic(part_path(FIRST), other)
    record["sha256"][part_path(FIRST)] = json.loads(spec.location.read_bytes(record_path(Unit(1, 0))))[
        "sha256"
    ][part_path(Unit(1, 0))]
    del record["checksum"]
    layout.write_json(spec.location, record_path(FIRST), record)
    (found,) = findings(str(tmp_path))
    assert found.unit == FIRST and "are not the unit's 16 samples, each once" in found.problem
    commit_again = {**record, "sha256": {shard_of(spec, FIRST): record["sha256"][shard_of(spec, FIRST)]}}
    layout.write_json(spec.location, record_path(FIRST), commit_again)
    assert {one.problem for one in findings(str(tmp_path))} == {"the record does not name it"}


def test_a_damaged_stage_json_goes_first_and_comes_back_with_the_next_build(stages):
    samples, aligned = stages["samples"], stages["aligned"]
    before = aligned.location.read_bytes("stage.json")
    overwrite(aligned, "stage.json", lambda data: data.replace(b"0.5", b"0.6"))
    overwrite(samples, part_path(FIRST), lambda data: data[:-1])
    found = findings(samples.store)
    assert [(one.kind, one.unit) for one in found] == [(Kind.STAGE, None), (Kind.UNIT, FIRST)]
    done = repair(samples.store, found)
    assert done.files == [f"{aligned.path}/stage.json"]
    assert not done.damaged, "while nobody knows what was made from it, the unit must stay"
    assert [one.unit for one in done.left] == [FIRST]
    assert "first" in unfinished(samples.store)
    assert [(one.kind, one.unit) for one in findings(samples.store)] == [
        (Kind.STAGE, None),
        (Kind.UNIT, FIRST),
    ]
    shards.prepare(aligned)
    assert aligned.location.read_bytes("stage.json") == before
    assert repair(samples.store, findings(samples.store)).derived[aligned.path] == {FIRST}


def test_a_stage_of_a_newer_schema_and_what_cannot_be_read_are_never_mended(stages, monkeypatch):
    samples, aligned = stages["samples"], stages["aligned"]
    overwrite(aligned, "stage.json", lambda data: data.replace(b'"schema": 1', b'"schema": 7'))
    found = findings(samples.store)
    assert {one.kind for one in found} == {Kind.UNREADABLE} and "schema version 7" in found[0].problem
    assert repair(samples.store, found).left == found
    assert aligned.location.exists("stage.json")
    overwrite(aligned, "stage.json", lambda data: data.replace(b'"schema": 7', b'"schema": 1'))

    shard = shard_of(samples, FIRST)
    read = type(samples.location).read_bytes

    def failing(self, path):
        if path == shard and self.url == samples.location.url:
            raise StoreError(f"cannot read {path}: the network is down.")
        return read(self, path)

    monkeypatch.setattr(type(samples.location), "read_bytes", failing)
    found = findings(samples.store)
    assert [(one.kind, one.path) for one in found] == [(Kind.UNREADABLE, f"{samples.path}/{shard}")]
    assert repair(samples.store, found).left == found
    assert records.pending(samples) == []


def test_runs_and_inputs_must_be_there(stages):
    samples, aligned = stages["samples"], stages["aligned"]
    shutil.rmtree(samples.directory)
    found = findings(samples.store)
    assert [(one.kind, one.problem) for one in found] == [
        (Kind.STAGE, "it is missing, but the run first names it")
    ]
    (aligned.location.at("../../runs").root / "first.json").write_text("{")
    problems = {one.path: one.problem for one in findings(samples.store)}
    assert problems.pop("runs/first.json") == "it is damaged"
    assert len(problems) == 1 and "names it" in problems[f"{samples.path}/stage.json"]


def test_what_killed_writers_left_is_found_once_it_is_old(stages):
    spec = stages["samples"]
    left = [
        f"{spec.directory}/done/.00009-000.json.0123.tmp",
        f"{spec.store}/runs/.first.json.0123.tmp",
    ]
    for path in left:
        Path(path).write_text("{")
    assert findings(spec.store) == []
    for path in left:
        os.utime(path, (time.time() - 7200,) * 2)
    found = findings(spec.store)
    assert {one.kind for one in found} == {Kind.TEMPORARY}
    assert sorted(f"{spec.store}/{one.path}" for one in found) == sorted(left)


def test_a_sample_is_drawn_by_the_seed_and_a_run_keeps_to_its_stages_and_extent(stages):
    spec = stages["samples"]

    def drawn(**options):
        return [(one.spec.name, one.unit) for one in survey(spec.store, **options).units]

    every = drawn()
    some = drawn(share=0.5)
    assert len(some) == round(len(every) / 2) and set(some) < set(every)
    assert some == drawn(share=0.5) and any(drawn(share=0.5, seed=seed) != some for seed in range(1, 5))
    assert len(drawn(share=1e-9)) == 1
    small = replace(spec, grid=replace(spec.grid, identities=3, replicates=5))
    bind(spec.store, "small", {"samples": small})
    assert drawn(run="small") == [("samples", Unit(0, 0)), ("samples", Unit(0, 1))]
    overwrite(stages["aligned"], "stage.json", lambda data: b"{")
    assert findings(spec.store, run="small") == []
    with pytest.raises(StoreError, match=r"no run large in .*; runs there: first, small"):
        survey(spec.store, run="large")


def test_failed_rows_are_counted_and_rows_without_a_face_are_not(stages):
    spec = stages["samples"]
    failed = failed_units(spec.store, "first")
    assert failed[spec.path] == dict.fromkeys(spec.grid.units(), 1)
    plain = make_spec(spec.store, inputs={}, config={"w": 0.1}, arrays=())
    shards.prepare(plain)
    cells = [(i, r) for i in range(4) for r in range(4)]
    columns = {
        "identity": [i for i, _ in cells],
        "replicate": [r for _, r in cells],
        "status": ["no_face"] * 3 + ["skipped"] + ["ok"] * 12,
        "error": [None] * 16,
    }
    rows = tables.rows_of(plain, columns)
    record = shards.commit(plain, FIRST, arrays={}, rows=rows, started=0.0, seconds={}, device="")
    assert record.failed == 4
    bind(spec.store, "plain", {"samples": plain})
    assert failed_units(spec.store, "plain") == {}


def test_who_stops_at_the_first_damage_waits_for_no_other_unit(stages, monkeypatch):
    spec = stages["aligned"]  # the first in the order of paths
    overwrite(spec, part_path(FIRST), lambda data: data[:-1])
    found = survey(spec.store)
    read, taken = type(spec.location).read_bytes, []

    def slow(self, path):
        taken.append(path)
        time.sleep(0.001)
        return read(self, path)

    monkeypatch.setattr(type(spec.location), "read_bytes", slow)
    walk = check_units(found.units * 200, workers=2)
    assert next(walk).unit == FIRST
    walk.close()
    assert len(taken) < 200


def test_a_unit_committed_during_the_walk_is_not_damaged(tmp_path, monkeypatch):
    spec = make_spec(str(tmp_path), replicates=8, inputs={})
    shards.prepare(spec)
    bind(str(tmp_path), "first", {spec.name: spec})
    make(spec, FIRST)
    place = type(spec.location)
    walk = place.walk

    def walk_beside_a_writer(self, path):
        """Arrays are listed before the writer's commit, records after it."""
        before = walk(self, path)
        if path == "" and not records.has_record(spec, FAR):
            make(spec, FAR)
            after = walk(self, path)
            return [entry for entry in after if entry in before or entry.path.startswith("done/")]
        return before

    monkeypatch.setattr(place, "walk", walk_beside_a_writer)
    found = survey(str(tmp_path))
    assert FAR in {stored.unit for stored in found.units}
    assert [*found.findings, *check_units(found.units)] == []

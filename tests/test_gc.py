"""What no run needs is found and removed in an order that can be cut short; all else is left alone."""

import fcntl
import os
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import fsspec
import pytest
from small_stage import commit, make_spec
from stored_files import results

from negfacediff_core.errors import StoreError
from negfacediff_core.store import faults, gc, records, shards
from negfacediff_core.store.gc import find_rubbish, remove
from negfacediff_core.store.layout import Unit, array_path, part_path
from negfacediff_core.store.runs import write_run
from negfacediff_core.store.status import stages
from negfacediff_core.store.verify import check_units, survey


def filled(store, **changes):
    spec = make_spec(store, **{"inputs": {}, **changes})
    shards.prepare(spec)
    for unit in spec.grid.units():
        commit(spec, unit)
    return spec


def bind(store, run, *specs):
    extent = {"identities": 6, "replicates": 4}
    places = {spec.name: {"fingerprint": spec.fingerprint, **extent} for spec in specs}
    write_run(str(store), run, {"stages": places})


def age(folder):
    """Make everything look as if nobody had touched it for two hours."""
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (time.time() - 7200,) * 2)


def age_place(url):
    """Do what `age` does, in a folder or in memory."""
    if not url.startswith("memory:"):
        return age(Path(url))
    for file in fsspec.filesystem("memory").store.values():
        file.created -= timedelta(hours=2)


@pytest.fixture
def store(tmp_path):
    """Samples that a run needs only as the input of its crops, and others that none needs."""
    samples = filled(tmp_path)
    bind(tmp_path, "kept", filled(tmp_path, name="aligned", inputs={"samples": samples.fingerprint}))
    filled(tmp_path, config={"w": 0.9})
    age(tmp_path)
    return tmp_path


def files(store):
    return {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_a_stage_that_no_run_needs_is_found_and_removed_and_nothing_else(store):
    before = files(store)
    (only,) = find_rubbish(str(store))
    unneeded = make_spec(store, inputs={}, config={"w": 0.9})
    assert only.path == unneeded.path
    lost = {path for path in before if unneeded.fingerprint in path.parts}
    assert (only.files, only.size) == (len(lost), sum(len(before[path]) for path in lost))
    assert files(store) == before, "finding removes nothing"
    assert remove(str(store), only)
    assert files(store) == {path: data for path, data in before.items() if path not in lost}
    assert not Path(unneeded.directory).exists()
    assert find_rubbish(str(store)) == []


def test_what_was_touched_in_the_last_hour_is_passed_over(store):
    unneeded = make_spec(store, inputs={}, config={"w": 0.9})
    shards.prepare(unneeded)  # a build that has yet to write its run record
    assert find_rubbish(str(store)) == []


@pytest.mark.parametrize("place", ["folder", "memory"])
def test_what_was_prepared_a_moment_ago_is_in_use_although_no_run_names_it(place, tmp_path):
    """On an object store too, where a stage that stands already is not written again otherwise."""
    url = str(tmp_path) if place == "folder" else f"memory://{tmp_path.name}/store"
    bind(url, "kept", filled(url))
    unneeded = filled(url, config={"w": 0.9})
    age_place(url)
    before = unneeded.location.walk("")
    (only,) = find_rubbish(url)
    shards.prepare(unneeded)  # a build begins, but has yet to write its run record
    assert not remove(url, only)
    assert find_rubbish(url) == []
    assert {entry.path for entry in unneeded.location.walk("")} == {entry.path for entry in before}
    age_place(url)
    assert remove(url, only)
    assert unneeded.location.walk("") == []


def test_what_is_done_while_gc_waits_for_the_lock_counts(store, monkeypatch):
    """Need and age are looked at with the lock in hand, not before."""
    (only,) = find_rubbish(str(store))
    unneeded = make_spec(store, inputs={}, config={"w": 0.9})
    flock = fcntl.flock

    def named(handle, operation):
        bind(store, "new", unneeded)
        flock(handle, operation)

    def touched(handle, operation):
        unneeded.location.touch(shards.PREPARED)
        flock(handle, operation)

    for meanwhile in (touched, named):
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", meanwhile)
            assert not remove(str(store), only)
        age(store)
    assert list(check_units(survey(str(store)).units)) == []
    (store / "runs" / "new.json").unlink()
    assert remove(str(store), only)


def test_a_build_that_waits_while_its_stage_is_removed_makes_it_anew(store, monkeypatch):
    """The lock that it waits for goes with the stage; the next must wait for the one that it then has."""
    (only,) = find_rubbish(str(store))
    unneeded = make_spec(store, inputs={}, config={"w": 0.9})
    flock, waits, removed = fcntl.flock, threading.Event(), threading.Event()

    def noting(handle, operation):
        if threading.current_thread() is build:
            waits.set()
        flock(handle, operation)

    def begin(step):
        if step == "remove done":  # the first step of the removal, under the lock
            build.start()
            assert waits.wait(60)
            assert not removed.is_set()

    def work():
        shards.prepare(unneeded)
        assert removed.is_set()
        for unit in unneeded.grid.units():
            commit(unneeded, unit)

    build = threading.Thread(target=work)
    monkeypatch.setattr(fcntl, "flock", noting)
    monkeypatch.setattr(faults, "hook", begin)
    place = type(unneeded.location)
    take_away = place.remove

    def note_the_last(self, path):
        take_away(self, path)
        if path == "":
            removed.set()

    monkeypatch.setattr(place, "remove", note_the_last)
    assert remove(str(store), only)
    build.join(60)
    assert records.pending(unneeded) == []
    bind(store, "new", unneeded)
    found = survey(str(store))
    assert [*found.findings, *check_units(found.units)] == []


def test_a_lock_alone_keeps_nothing(store):
    unneeded = make_spec(store, inputs={}, config={"w": 0.9})
    with unneeded.location.lock("stage"), unneeded.location.lock("commit-7"):
        pass
    (only,) = find_rubbish(str(store))
    assert remove(str(store), only)


def test_a_stage_that_has_become_needed_meanwhile_stays(store):
    (only,) = find_rubbish(str(store))
    bind(store, "new", make_spec(store, inputs={}, config={"w": 0.9}))
    assert not remove(str(store), only)
    assert list(check_units(survey(str(store)).units)) == []


def test_a_removal_that_is_killed_leaves_nothing_half_believed(store, monkeypatch):
    class Killed(BaseException):
        pass

    (only,) = find_rubbish(str(store))
    unneeded = make_spec(store, inputs={}, config={"w": 0.9})
    for name in ("arrays.zarr", "rows", "stage.json"):

        def die(step, last=f"remove {name}"):
            if step == last:
                raise Killed

        monkeypatch.setattr(faults, "hook", die)
        with pytest.raises(Killed):
            remove(str(store), only)
        monkeypatch.setattr(faults, "hook", None)
        assert records.committed(unneeded) == []
        assert unneeded.path in {spec.path for spec in stages(str(store))}
        age(store)
        (only,) = find_rubbish(str(store))
    assert remove(str(store), only)
    assert find_rubbish(str(store)) == []


def test_leftovers_of_finished_stages_and_of_killed_writers_are_found(store):
    aligned = next(spec for spec in stages(str(store)) if spec.name == "aligned")
    larger = replace(aligned, grid=replace(aligned.grid, identities=12, replicates=4))
    shards.prepare(larger)
    beyond = Unit(2, 0)
    commit(larger, beyond)
    records.forget(larger, beyond)
    temporary = store / "runs" / ".kept.json.0123.tmp"
    temporary.write_text("{")
    (Path(aligned.directory) / "rows" / "notes.parquet").write_text("mine")
    (Path(aligned.directory) / "report.html").write_text("<html>")
    needed = files(store)
    age(store)
    found = {one.path: one for one in find_rubbish(str(store))}
    paths = [part_path(beyond), *(array_path(aligned, array, beyond) for array in aligned.arrays)]
    expected = {f"{aligned.path}/{path}" for path in paths} | {"runs/.kept.json.0123.tmp"}
    assert expected < found.keys()
    left = {path for path, one in found.items() if "/" in path and path not in expected}
    assert left == {make_spec(store, inputs={}, config={"w": 0.9}).path}
    commit(larger, beyond)  # a build has made the unit meanwhile
    assert not remove(str(store), found[f"{aligned.path}/{part_path(beyond)}"])
    records.forget(larger, beyond)
    assert not remove(str(store), found[f"{aligned.path}/{part_path(beyond)}"]), "it was just written again"
    age(store)
    assert all(remove(str(store), found[path]) for path in expected)
    gone = {store / path for path in expected}
    assert {path for path in needed if not path.exists()} - gone == set()
    assert not any(path.exists() for path in gone)


def test_a_stage_that_a_run_is_still_filling_keeps_its_leftovers(store):
    aligned = next(spec for spec in stages(str(store)) if spec.name == "aligned")
    records.forget(aligned, Unit(1, 0))
    age(store)
    assert [one.why for one in find_rubbish(str(store))] == ["no run needs this stage"]


def test_other_folders_and_stores_without_runs_are_refused(tmp_path, store):
    photos = tmp_path / "photos"
    (photos / "samples" / ("0" * 16)).mkdir(parents=True)
    (photos / "samples" / ("0" * 16) / "c.0.0").write_text("mine")
    with pytest.raises(StoreError, match="There is no store at"):
        find_rubbish(str(photos))
    (store / "runs" / "kept.json").unlink()
    with pytest.raises(StoreError, match="nothing tells what is needed"):
        find_rubbish(str(store))


def test_nothing_goes_while_a_run_record_or_a_needed_stage_cannot_be_read(store):
    record = store / "runs" / "kept.json"
    whole = record.read_bytes()
    record.write_bytes(whole[:20])
    with pytest.raises(StoreError, match=r"kept\.json is damaged"):
        find_rubbish(str(store))
    record.write_bytes(whole)
    aligned = next(spec for spec in stages(str(store)) if spec.name == "aligned")
    (Path(aligned.directory) / "stage.json").write_text("{")
    with pytest.raises(StoreError, match=r"stage\.json is damaged"):
        find_rubbish(str(store))


def test_an_object_store_is_cleaned_in_the_same_way(tmp_path, monkeypatch):
    url = f"memory://{tmp_path.name}/store"
    kept, other = filled(url), filled(url, config={"w": 0.9})
    bind(url, "kept", kept)
    assert find_rubbish(url) == []
    monkeypatch.setattr(gc, "ABANDONED", -1.0)
    (only,) = find_rubbish(url)
    assert only.path == other.path
    assert remove(url, only)
    assert [spec.path for spec in stages(url)] == [kept.path]
    assert other.location.walk("") == []
    assert records.pending(kept) == []


def test_a_store_whose_name_is_a_pattern_loses_what_is_its_own(tmp_path, monkeypatch):
    """`run[1]` and `run*` match `run1`, which is another store."""
    stores = [f"memory://{tmp_path.name}/{name}" for name in ("run1", "run[1]", "run*")]
    for url in stores:
        bind(url, "kept", filled(url))
        filled(url, config={"w": 0.9})
    whole = [results(url) for url in stores]
    monkeypatch.setattr(gc, "ABANDONED", -1.0)
    for place in (1, 2):
        (only,) = find_rubbish(stores[place])
        assert remove(stores[place], only)
        assert find_rubbish(stores[place]) == []
        assert results(stores[0]) == whole[0]
    assert [len(results(url)) < len(before) for url, before in zip(stores, whole, strict=True)] == [
        False,
        True,
        True,
    ]


def test_a_stage_that_is_prepared_while_gc_looks_is_passed_over(store, monkeypatch):
    other = make_spec(store, inputs={}, config={"w": 0.1})
    place = type(other.location)
    for verb in ("walk", "names"):
        look = getattr(place, verb)

        def looking(self, path, look=look):
            found = look(self, path)
            shards.prepare(other)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(place, verb, looking)
            (only,) = find_rubbish(str(store))
        assert only.path == make_spec(store, inputs={}, config={"w": 0.9}).path
        other.location.remove("")


@pytest.mark.parametrize("level", ["stage", "directory"])
def test_what_lies_behind_a_link_is_named_and_passed_over(level, store, tmp_path_factory):
    """Other stores may use what lies there."""
    unneeded = make_spec(store, inputs={}, config={"w": 0.9})
    folder = Path(unneeded.directory) if level == "directory" else store / "samples"
    elsewhere = tmp_path_factory.mktemp("disk") / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    age(elsewhere)
    before = files(elsewhere)
    named = []
    assert find_rubbish(str(store), named.append) == find_rubbish(str(store)) == []
    assert named == [str(folder.relative_to(store))]
    assert files(elsewhere) == before

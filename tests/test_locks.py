"""Locks of a folder that is removed, cleaned or unmounted while others wait for them or hold them."""

import fcntl
import shutil
import threading
from pathlib import Path

import pytest
from small_stage import commit, make_spec

from negfacediff_core.errors import PlaceError, StoreError
from negfacediff_core.store import faults, records, shards
from negfacediff_core.store.layout import Unit
from negfacediff_core.store.location import locate

LOCK = ".stage.lock"
UNIT = Unit(0, 0)


def test_who_waited_for_a_lock_that_was_removed_holds_the_one_that_others_wait_for(tmp_path, monkeypatch):
    place, flock = locate(str(tmp_path)), fcntl.flock
    waits, holds, ends = threading.Event(), threading.Event(), threading.Event()

    def noting(handle, operation):
        waits.set()
        flock(handle, operation)

    def wait():
        with place.lock("stage"):
            holds.set()
            assert ends.wait(60)

    waiting = threading.Thread(target=wait)
    with place.lock("stage"):
        monkeypatch.setattr(fcntl, "flock", noting)
        waiting.start()
        assert waits.wait(60)
        (tmp_path / LOCK).unlink()
    assert holds.wait(60)
    with (tmp_path / LOCK).open() as file, pytest.raises(BlockingIOError):
        flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    ends.set()
    waiting.join(60)
    with (tmp_path / LOCK).open() as file:
        flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lock_makes_no_place_that_has_gone(tmp_path):
    place = locate(str(tmp_path / "store" / "stage"))
    with pytest.raises(PlaceError, match=r"/store/stage has gone; if a disk was unmounted"):
        place.lock("stage").__enter__()
    assert list(tmp_path.iterdir()) == []
    with place.lock("stage", make=True) as lock:
        lock.check()
        assert [path.name for path in (tmp_path / "store" / "stage").iterdir()] == [LOCK]


def test_a_lock_follows_no_link(tmp_path):
    (tmp_path / "mine.txt").write_text("what somebody wrote")
    (tmp_path / LOCK).symlink_to("mine.txt")
    with pytest.raises(StoreError, match=r"cannot lock .*\.stage\.lock"):
        locate(str(tmp_path)).lock("stage").__enter__()
    assert (tmp_path / "mine.txt").read_text() == "what somebody wrote"


def test_a_lock_that_was_removed_while_it_was_held_is_lost(tmp_path):
    place = locate(str(tmp_path / "store"))
    with place.lock("stage", make=True) as lock:
        (tmp_path / "store" / LOCK).unlink()
        with pytest.raises(StoreError, match=r"\.stage\.lock was lost while it was held"):
            lock.check()
        shutil.rmtree(tmp_path / "store")
        with pytest.raises(PlaceError, match="has gone"):
            lock.check()


def test_no_record_is_written_without_the_lock(tmp_path, monkeypatch):
    spec = make_spec(tmp_path)
    shards.prepare(spec)

    def lose(step):
        if step == f"renamed rows/part-{UNIT.name}.parquet":
            for path in Path(spec.directory).glob(".commit-*.lock"):
                path.unlink()

    monkeypatch.setattr(faults, "hook", lose)
    with pytest.raises(StoreError, match=r"commit-0\.lock was lost while it was held"):
        commit(spec, UNIT)
    assert records.committed(spec) == []
    monkeypatch.setattr(faults, "hook", None)
    commit(spec, UNIT)
    assert records.committed(spec) == [UNIT]


@pytest.mark.parametrize("what", ["store", "stage"])
def test_an_input_that_has_gone_stops_the_build_and_is_not_made_anew(what, tmp_path):
    """No unit of the stage could be made: it is the place that has failed, not a unit."""
    store = tmp_path / "store"
    samples = make_spec(store, inputs={})
    aligned = make_spec(store, name="aligned", inputs={"samples": samples.fingerprint})
    for spec in (samples, aligned):
        shards.prepare(spec)
    assert aligned.input("samples").path == samples.path
    gone = store if what == "store" else Path(samples.directory)
    gone.rename(tmp_path / "elsewhere")
    with pytest.raises(PlaceError, match=rf"{samples.path} has gone; if a disk was unmounted"):
        aligned.input("samples")
    with pytest.raises(PlaceError, match="has gone"):
        shards.commit_lock(samples, UNIT).__enter__()
    assert not gone.exists()
    (tmp_path / "elsewhere").rename(gone)
    (Path(samples.directory) / "stage.json").write_text("{")
    with pytest.raises(StoreError, match=r"stage\.json is damaged") as damage:
        aligned.input("samples")
    assert not isinstance(damage.value, PlaceError)

"""Disks that fill, forbid, vanish, lie, and clocks that jump: a clear error, no record, and one can go on."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from noted_units import Direct, promises, results
from small_stage import commit, content_of, make_spec

from flows import build as flow
from flows.build import finish
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import BuildError, PlaceError, StoreError
from negfacediff_core.store import faults, records, shards
from negfacediff_core.store.layout import Unit
from negfacediff_core.store.location import LocalLocation, locate
from negfacediff_core.store.status import rate
from tasks import chunks
from tasks.executors import open_pool

UNIT = Unit(0, 0)
# Steps of the commit of a unit: four files, of which each is begun, half written, whole, and then named.
STEPS = 16
# What happens to a disk, how the error reads, and whether it concerns every unit.
TROUBLES = {
    errno.ENOSPC: ("the disk is full", PlaceError),
    errno.EDQUOT: ("the disk quota is used up", PlaceError),
    errno.EROFS: ("the file system is read-only", PlaceError),
    errno.EACCES: ("permission is denied", PlaceError),
    errno.EIO: ("Input/output error", StoreError),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The small stage, made on a disk without troubles."""
    spec = make_spec(tmp_path_factory.mktemp("whole"))
    shards.prepare(spec)
    for unit in spec.grid.units():
        commit(spec, unit)
    return spec


def fail_at(step: int, number: int):
    """A hook that raises the error `number` of the operating system at a step and at all after it."""
    taken = 0

    def observe(_):
        nonlocal taken
        taken += 1
        if taken > step:
            raise OSError(number, os.strerror(number))

    return observe


@pytest.mark.parametrize("number", TROUBLES, ids=errno.errorcode.get)
def test_a_disk_that_fails_at_any_step_leaves_no_record_and_one_can_go_on(
    number, whole, tmp_path, monkeypatch
):
    words, kind = TROUBLES[number]
    spec = make_spec(tmp_path)
    shards.prepare(spec)
    for step in range(STEPS - 1):
        monkeypatch.setattr(faults, "hook", fail_at(step, number))
        with pytest.raises(StoreError, match=words) as failure:
            commit(spec, UNIT)
        monkeypatch.setattr(faults, "hook", None)
        assert type(failure.value) is kind
        assert str(tmp_path) in str(failure.value)
        assert records.committed(spec) == []
        assert not list(tmp_path.rglob("*.tmp")), "a file that could not be written lies there"
    for unit in spec.grid.units():
        commit(spec, unit)
    assert results(tmp_path) == results(Path(whole.store))
    assert promises([spec]) == promises([whole])


def test_a_stage_that_cannot_be_prepared_can_be_later(tmp_path, monkeypatch, whole):
    spec = make_spec(tmp_path)
    for step in range(16):
        monkeypatch.setattr(faults, "hook", fail_at(step, errno.ENOSPC))
        with pytest.raises(PlaceError, match="disk is full"):
            shards.prepare(spec)
        monkeypatch.setattr(faults, "hook", None)
        shutil.rmtree(tmp_path / "samples")
    shards.prepare(spec)
    for unit in spec.grid.units():
        commit(spec, unit)
    assert results(tmp_path) == results(Path(whole.store))


def test_a_small_file_system_fills_and_is_enlarged(tmp_path):
    """A real one: units are committed until it is full; when there is room again the rest follows."""
    script = """
import sys, subprocess
from small_stage import commit, make_spec
from negfacediff_core.errors import PlaceError
from negfacediff_core.store import records, shards

store = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", store], check=True)
spec = make_spec(store, identities=400)
shards.prepare(spec)
try:
    for unit in records.pending(spec):
        commit(spec, unit)
except PlaceError as error:
    assert "disk is full" in str(error), error
done = records.committed(spec)
assert 0 < len(done) < 100
subprocess.run(["mount", "-o", "remount,size=100m", store], check=True)
for unit in records.pending(spec):
    commit(spec, unit)
assert len(records.committed(spec)) == 100
for unit in spec.grid.units():
    shards.read_arrays(spec, unit)
    shards.read_rows(spec, unit)
print(len(done))
"""
    # a name space of its own: nobody else sees the mount, and it goes with the process
    inside = ["unshare", "--mount", "--map-root-user", "--propagation", "private"]
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            [*inside, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True
        ).returncode
    ):
        pytest.skip("this machine lets nobody mount a file system")
    done = subprocess.run(
        [*inside, sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def build(spec, run_unit, monkeypatch) -> None:
    """Finish a stage as a build does, with two threads."""
    monkeypatch.setattr(chunks, "run_unit", run_unit)
    monkeypatch.setattr(flow, "run_chunk", Direct)
    execution = ExecutionConfig(workers=2, device="cpu")
    with open_pool(execution) as pool:
        crew = chunks.Crew(pool, execution, lambda stage: None, lambda stage, rows: None, threading.Event())
        finish([spec], crew)


def test_a_full_disk_stops_a_build_before_it_makes_units_in_vain(tmp_path, monkeypatch):
    spec = make_spec(tmp_path, identities=400)
    shards.prepare(spec)
    made = []

    def run_unit(spec, unit, execution):
        made.append(unit)
        return commit(spec, unit)

    monkeypatch.setattr(faults, "hook", fail_at(5 * STEPS + 2, errno.ENOSPC))
    with pytest.raises(BuildError, match=r"The build stopped\. cannot write .* the disk is full; free space"):
        build(spec, run_unit, monkeypatch)
    assert len(made) < 20
    assert len(records.committed(spec)) <= 5
    monkeypatch.setattr(faults, "hook", None)
    before = set(records.committed(spec))
    made.clear()
    build(spec, run_unit, monkeypatch)
    assert len(made) == 100 - len(before)
    assert not before & set(made)


def test_a_log_that_cannot_be_written_hides_no_failure_and_stops_no_other(tmp_path, monkeypatch):
    spec = make_spec(tmp_path, identities=40)
    shards.prepare(spec)
    (tmp_path / spec.path / "logs").write_text("a file where the folder of the logs would be")

    def run_unit(spec, unit, execution):
        if unit == Unit(3, 0):
            raise ValueError("the real cause")
        return commit(spec, unit)

    with pytest.raises(BuildError, match=r"1 unit is .*the real cause \(log none: cannot write .*logs"):
        build(spec, run_unit, monkeypatch)
    assert records.pending(spec) == [Unit(3, 0)]


@pytest.mark.parametrize("what", ["store", "stage"])
def test_a_store_that_vanishes_is_not_made_anew_by_a_commit(what, tmp_path, monkeypatch):
    store = tmp_path / "store"
    spec = make_spec(store)
    shards.prepare(spec)
    commit(spec, UNIT)
    gone = store if what == "store" else Path(spec.directory)
    gone.rename(tmp_path / "elsewhere")

    with pytest.raises(PlaceError, match="has gone; if a disk was unmounted, mount it"):
        commit(spec, Unit(1, 0))
    assert not gone.exists()
    with pytest.raises(BuildError, match=r"The build stopped\. .* has gone"):
        build(spec, lambda spec, unit, execution: commit(spec, unit), monkeypatch)
    assert not gone.exists()

    (tmp_path / "elsewhere").rename(gone)
    commit(spec, Unit(1, 0))
    assert records.pending(spec) == []


@pytest.mark.parametrize("what", ["store", "stage"])
def test_a_store_that_vanishes_within_a_commit_is_not_made_anew(what, tmp_path, monkeypatch, whole):
    store = tmp_path / "store"
    spec = make_spec(store)
    shards.prepare(spec)
    gone = store if what == "store" else Path(spec.directory)
    elsewhere = tmp_path / "elsewhere"

    def move_at(step):
        left = [step]

        def observe(_):
            if not left[0]:
                gone.rename(elsewhere)
            left[0] -= 1

        return observe

    for step in range(STEPS):
        monkeypatch.setattr(faults, "hook", move_at(step))
        with pytest.raises(PlaceError, match="has gone; if a disk was unmounted, mount it"):
            commit(spec, UNIT)
        monkeypatch.setattr(faults, "hook", None)
        assert not gone.exists()
        elsewhere.rename(gone)
        # at the last step the record has its name already
        assert records.committed(spec) == ([UNIT] if step == STEPS - 1 else [])
    for unit in spec.grid.units():
        commit(spec, unit)
    assert promises([spec]) == promises([whole])


def test_only_what_makes_a_place_makes_it(tmp_path):
    place = locate(str(tmp_path / "a" / "store"))
    for write in (lambda: place.write_atomic("folder/file", b""), lambda: place.touch("file")):
        with pytest.raises(PlaceError, match="has gone"):
            write()
        assert not (tmp_path / "a").exists()
    place.check_writable()
    place.write_atomic("folder/file", b"")
    assert place.names("folder") == ["file"]


def test_what_reads_back_otherwise_is_not_recorded(tmp_path, monkeypatch):
    spec = make_spec(tmp_path)
    shards.prepare(spec)
    read = LocalLocation.read_bytes

    def flipped(self, path):
        data = read(self, path)
        return bytes([data[0] ^ 1]) + data[1:] if path.startswith("rows/") else data

    monkeypatch.setattr(LocalLocation, "read_bytes", flipped)
    with pytest.raises(StoreError, match=r"rows/part-00000-000\.parquet does not hold what was just written"):
        commit(spec, UNIT)
    assert records.committed(spec) == []


def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    if os.access(tmp_path, os.W_OK) and os.geteuid() == 0:
        (tmp_path / "store").write_text("root may write everywhere; nobody may write into a file")
    else:
        (tmp_path / "store").mkdir(mode=0o500)
    with pytest.raises(StoreError, match=rf"cannot \w+ {tmp_path}/store.*(permission|a file stands)"):
        locate(str(tmp_path / "store")).check_writable()


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0])
def test_records_and_rates_survive_a_clock_that_is_set(jump, tmp_path, monkeypatch):
    spec = make_spec(tmp_path)
    shards.prepare(spec)
    started = time.time()
    arrays, rows = content_of(spec, UNIT)
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + jump)
    record = shards.commit(spec, UNIT, arrays=arrays, rows=rows, started=started, seconds={}, device="cpu")
    assert record.finished >= record.started
    assert record.seconds["write"] < 60
    commit(spec, Unit(1, 0))
    assert records.pending(spec) == []
    speed = rate(records.records(spec))
    assert speed is None or (np.isfinite(speed) and speed > 0)

"""Stores on S3: what a folder promises holds there too, over a link that is slow, refuses, drops and lies."""

import hashlib
import multiprocessing
import random
import signal
import threading
import time
from collections import Counter

import fsspec
import numpy as np
import pytest
import s3_server
from remote_processes import build_in_process, build_small, make_in_process
from small_stage import commit, content_of, make_spec
from stage_builds import changed, make
from stored_files import results

from negfacediff_core.errors import PlaceError, StoreError
from negfacediff_core.store import faults, leases, records, shards
from negfacediff_core.store.layout import Unit, array_path
from negfacediff_core.store.location import locate
from negfacediff_core.store.status import status

# Modules are imported once, in the fork server, which has no thread that a fork could cut in two.
PROCESSES = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def server():
    with s3_server.connected() as server:
        yield server


@pytest.fixture
def store(server, request):
    """The address of an empty store; nothing goes wrong on the way to it until a test says so."""
    server.trouble()
    yield f"s3://bucket/{hashlib.sha256(request.node.name.encode()).hexdigest()[:8]}/store"
    server.trouble()


@pytest.fixture
def impatient(monkeypatch):
    """A client that does not send a request again that was answered with an error."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    client = fsspec.get_filesystem_class("s3")
    client.clear_instance_cache()
    yield
    client.clear_instance_cache()


@pytest.fixture
def short_lease(monkeypatch):
    monkeypatch.setattr(leases, "LEASE", 0.6)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What the small stage leaves in a folder."""
    folder = tmp_path_factory.mktemp("local")
    build_small(make_spec(folder))
    return results(str(folder))


def assert_whole(spec):
    """Whatever has a record can be read, and is what was committed."""
    for unit in records.committed(spec):
        arrays, rows = content_of(spec, unit)
        read = shards.read_arrays(spec, unit)
        assert all(np.array_equal(read[name], arrays[name]) for name in arrays)
        assert shards.read_rows(spec, unit).equals(rows)


# --- without trouble


def test_a_stage_on_s3_is_that_of_a_folder_byte_for_byte(store, uninterrupted, tmp_path):
    spec = make_spec(store)
    assert records.pending(spec) == spec.grid.units()
    build_small(spec)
    assert results(store) == uninterrupted
    assert_whole(spec)
    assert records.pending(spec) == []
    local = make_spec(tmp_path)
    build_small(local)
    assert [one.sha256 for one in records.records(spec)] == [one.sha256 for one in records.records(local)]
    [stage] = status(store)
    assert (stage.done, stage.rows, stage.failed) == (2, 32, 2)


def test_a_place_on_s3_answers_as_a_folder_does(store, tmp_path):
    for place in (locate(store), locate(str(tmp_path))):
        assert (place.names(""), place.names("none"), place.exists("none")) == ([], [], False)
        place.write_atomic("folder/file", b"old")
        place.write_atomic("folder/file", b"new")
        assert place.read_bytes("folder/file") == b"new"
        assert place.exists("folder/file")
        assert place.names("folder/file") == []
        with place.lock("stage"):
            assert (place.names(""), place.names("folder")) == (["folder"], ["file"])
        with pytest.raises(StoreError, match=r"cannot read .*/none: .*it is missing"):
            place.read_bytes("none")
        place.check_writable()
        assert place.names("") == ["folder"]


def test_a_bucket_that_is_not_there_is_named(store):
    with pytest.raises(StoreError, match=r"cannot write s3://no-bucket/.*, and make the bucket"):
        locate("s3://no-bucket/store").check_writable()


def test_a_build_on_s3_interrupted_over_a_flaky_link_is_that_of_a_folder(
    store, server, tiny_build, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    build = changed(tiny_build, identities=3, images=2)
    left = [30]

    def die(step):
        left[0] -= step.startswith("write")
        if left[0] < 0:
            raise Killed

    monkeypatch.setattr(faults, "hook", die)
    with pytest.raises(Killed):
        make(build, store)
    monkeypatch.setattr(faults, "hook", None)
    before = {spec.fingerprint: spec.done for spec in status(store)}
    assert sum(before.values()) > 0

    server.trouble(rate=0.01, seed=5)
    make(build, store)
    assert set(server.counts()) > {"none"}, "the link was not flaky"
    server.trouble()
    local = tmp_path / "local"
    make(build, local)
    assert results(store) == results(str(local))
    assert {stage.pending for stage in status(store)} == {0}

    files, root = fsspec.core.url_to_fs(store)
    everything = b"".join(files.cat(files.find(root)).values())
    assert s3_server.SECRET.encode() not in everything and s3_server.KEY.encode() not in everything


# --- trouble on the way


@pytest.mark.parametrize("seed", [0, *[pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 9)]])
def test_a_slow_and_flaky_link_changes_no_byte(seed, store, server, uninterrupted):
    server.trouble(rate=0.15, latency=0.05, seed=seed)
    build_small(make_spec(store))
    spoiled = sum(server.counts().values()) - server.counts()["none"]
    server.trouble()
    assert spoiled > 1
    assert results(store) == uninterrupted
    assert_whole(make_spec(store))


def test_no_record_stands_without_its_data_however_often_commits_fail(
    store, server, uninterrupted, impatient, short_lease
):
    """A release that fails as well leaves a lock, which runs out."""
    spec = make_spec(store)
    shards.prepare(spec)
    failures = 0
    for attempt in range(40):
        server.trouble(rate=0.25, seed=attempt + 1, kinds=["error", "slow_down"], only="PUT")
        try:
            for unit in records.pending(spec):
                commit(spec, unit)
        except StoreError:
            failures += 1
        server.trouble()
        assert_whole(spec)
        if not records.pending(spec):
            break
    assert failures > 2
    assert results(store) == uninterrupted


def test_lasting_trouble_ends_in_one_sentence_and_leaves_no_record(store, server, uninterrupted, impatient):
    spec = make_spec(store)
    shards.prepare(spec)
    server.trouble(rate=1, kinds=["error"], only="PUT")
    begun = time.monotonic()
    with pytest.raises(
        StoreError, match=r"cannot \w+ s3://bucket/.*; check the address, the cred.* stays\.$"
    ) as error:
        commit(spec, Unit(0, 0))
    assert time.monotonic() - begun < 20
    assert "\n" not in str(error.value)
    server.trouble()
    assert records.pending(spec) == spec.grid.units()
    build_small(spec)
    assert results(store) == uninterrupted


def test_a_store_that_denies_writing_stops_the_build(store, server):
    spec = make_spec(store)
    shards.prepare(spec)
    server.trouble(rate=1, kinds=["denied"], only="PUT")
    with pytest.raises(PlaceError, match=r"PermissionError: .*; allow reading and writing there"):
        commit(spec, Unit(0, 0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["error", "refused"])
def test_requests_are_sent_again_a_bounded_number_of_times(kind, store, server):
    place = locate(store)
    place.write_atomic("file", bytes(5000))
    server.trouble(rate=1, kinds=[kind])
    begun = time.monotonic()
    with pytest.raises(StoreError, match="cannot read"):
        place.read_bytes("file")
    assert time.monotonic() - begun < 300
    # Three rounds of three, nested, of five attempts, each with the connection's own second try.
    assert 1 < sum(server.counts().values()) <= 100


def test_what_was_damaged_on_s3_is_found(store):
    spec = make_spec(store)
    build_small(spec)
    path = array_path(spec, spec.arrays[0], Unit(0, 0))
    spec.location.write_atomic(path, spec.location.read_bytes(path)[:-9])
    with pytest.raises(StoreError, match="image"):
        shards.read_arrays(spec, Unit(0, 0))


def test_an_address_that_is_a_pattern_removes_nothing_of_another(store):
    """`run[1]` and `run*` match `run1`, which is another place."""
    places = [locate(f"{store}/{name}") for name in ("run1", "run[1]", "run*")]
    for place in places:
        for path in ("file", "folder/a", "folder/b/c", "folder[1]/d"):
            place.write_atomic(path, path.encode())
    before = [entry.path for entry in places[0].walk("")]
    for place in places[1:]:
        assert [entry.path for entry in place.walk("")] == before
        assert place.exists("folder/b/c") and not place.exists("folder/[ab]")
        assert place.names("folder") == ["a", "b"]
        place.remove("fil[e]")
        place.remove("folder")
        assert [entry.path for entry in place.walk("")] == ["file", "folder[1]/d"]
        place.remove("file")
        place.remove("")
        assert place.walk("") == []
    assert [entry.path for entry in places[0].walk("")] == before


# --- processes that die or meet


def start(server, store, identities=6, kill_at=-1):
    PROCESSES.set_forkserver_preload(["remote_processes", "s3fs"])
    steps = PROCESSES.Queue()
    arguments = (store, s3_server.environment(server), identities, kill_at, steps)
    process = PROCESSES.Process(target=build_in_process, args=arguments)
    process.start()
    return process, steps


# Steps of the small stage, before and after each put: 4 puts prepare it, then come 4 for each of 2 units, the
# last of which is the record.
PREPARING, COMMITTING, STEPS = 8, 8, 24
REST = [pytest.param(step, marks=pytest.mark.slow) for step in range(STEPS) if step not in (14, 15)]


@pytest.mark.parametrize("kill_at", [14, 15, *REST])
def test_killed_at_any_write_a_rerun_equals_an_uninterrupted_run(
    kill_at, server, store, uninterrupted, short_lease
):
    process, _ = start(server, store, kill_at=kill_at)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    spec = make_spec(store)
    done = records.records(spec)
    # the put of a record, and nothing before, makes a unit done
    assert len(done) == max(0, kill_at + 1 - PREPARING) // COMMITTING
    assert_whole(spec)
    build_small(spec)
    assert results(store) == uninterrupted
    assert [one for one in records.records(spec) if one in done] == done, "a committed unit was made again"


@pytest.mark.slow
def test_killed_at_random_times_a_rerun_equals_an_uninterrupted_run(
    server, store, uninterrupted, short_lease
):
    server.trouble(latency=0.02)
    random.seed(11)
    for _ in range(12):
        process, _ = start(server, store)
        process.join(random.uniform(0.5, 2.5))
        process.kill()
        process.join()
        if records.committed(make_spec(store)):
            assert_whole(make_spec(store))
    build_small(make_spec(store))
    assert results(store) == uninterrupted


@pytest.mark.slow
def test_a_whole_build_on_s3_is_killed_resumed_and_grown(server, store, tiny_build, tmp_path, short_lease):
    small = changed(tiny_build, identities=3, images=2, negatives__pool=3)
    grown = changed(small, identities=5, images=3)
    PROCESSES.set_forkserver_preload(["remote_processes", "s3fs"])
    random.seed(5)
    killed = 0
    for _ in range(12):
        process = PROCESSES.Process(
            target=make_in_process, args=(store, s3_server.environment(server), small)
        )
        process.start()
        process.join(random.uniform(2, 8))
        if process.exitcode == 0:
            break
        process.kill()
        process.join()
        killed += 1
    assert killed > 0
    local = str(tmp_path / "local")
    for build in (small, grown):
        make(build, store)
        make(build, local)
        assert results(store) == results(local)


def test_two_builds_at_once_of_different_extents_share_the_work(server, store, tmp_path):
    server.trouble(latency=0.02)
    larger = make_spec(store, identities=12)
    both = [start(server, store, identities) for identities in (12, 6)]
    taken = [step for process, steps in both for step in steps.get(timeout=60)]
    for process, _ in both:
        process.join(60)
        assert process.exitcode == 0
    server.trouble()
    written = Counter(step for step in taken if step.startswith("write done/"))
    assert written == Counter(f"write done/{unit.name}.json" for unit in larger.grid.units())
    assert_whole(larger)
    build_small(make_spec(tmp_path, identities=12))
    assert results(store) == results(str(tmp_path))


# --- locks

LOCK = ".stage.lock"


def test_a_lock_on_s3_has_one_holder_as_long_as_it_lives(store, short_lease):
    order = []

    def wait():
        with locate(store).lock("stage"):
            order.append("second")

    with locate(store).lock("stage"):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(3 * leases.LEASE)  # it is renewed
        order.append("first")
    waiting.join(20)
    assert order == ["first", "second"]
    assert not locate(store).exists(LOCK)


def test_the_lock_of_a_dead_holder_is_taken_over(store, short_lease):
    place = locate(store)
    place.write_atomic(LOCK, b"somebody who died")
    begun = time.monotonic()
    with place.lock("stage"):
        assert time.monotonic() - begun >= leases.LEASE
        assert place.read_bytes(LOCK) != b"somebody who died"
    assert not place.exists(LOCK)


def test_the_empty_file_of_a_lock_that_was_copied_from_a_folder_is_nobodys(store):
    place = locate(store)
    place.write_atomic(LOCK, b"")
    begun = time.monotonic()
    with place.lock("stage") as lock:
        lock.check()
    assert time.monotonic() - begun < leases.LEASE / 2
    assert not place.exists(LOCK)


def test_who_lost_a_lock_leaves_that_of_the_next_holder_alone(store):
    place = locate(store)
    with place.lock("stage") as lock:
        lock.check()
        place.write_atomic(LOCK, b"the next holder")
        for _ in range(2):
            with pytest.raises(StoreError, match=r"the lock s3://.*/\.stage\.lock was lost"):
                lock.check()
    assert place.read_bytes(LOCK) == b"the next holder"
    place.remove(LOCK)
    with place.lock("stage"):
        place.write_atomic(LOCK, b"the next holder")  # unnoticed until the release
    assert place.read_bytes(LOCK) == b"the next holder"


def test_who_lost_the_lock_of_a_unit_commits_nothing_over_the_next_holder(store, monkeypatch):
    spec = make_spec(store)
    shards.prepare(spec)
    theirs = []

    def take_over(step):
        """The holder seems dead when all but the record is written; another makes the unit meanwhile."""
        if step == "renamed rows/part-00000-000.parquet":
            monkeypatch.setattr(faults, "hook", None)
            spec.location.remove(".commit-0.lock")
            theirs.append(commit(spec, Unit(0, 0)))

    monkeypatch.setattr(faults, "hook", take_over)
    with pytest.raises(StoreError, match=r"commit-0\.lock was lost while it was held"):
        commit(spec, Unit(0, 0))
    assert records.records(spec) == theirs
    assert_whole(spec)
    assert commit(spec, Unit(0, 0)) == theirs[0]


def test_a_renewal_whose_answer_never_came_loses_no_lock(store, server, impatient):
    place = locate(store)
    with place.lock("stage") as lock:
        server.trouble(rate=1, kinds=["lost"], only="PUT")
        with pytest.raises(StoreError, match="cannot lock"):
            lock.check()
        assert server.counts()["lost"] > 0
        server.trouble()
        lock.check()
    assert not place.exists(LOCK)


def test_a_lock_is_held_although_the_answer_to_its_put_was_lost(store, server):
    seed = next(seed for seed in range(99) if _draws(seed, 0.5, 3) == [True, False, False])
    server.trouble(rate=0.5, seed=seed, kinds=["lost"], only="PUT")
    begun = time.monotonic()
    with locate(store).lock("stage"):
        assert server.counts()["lost"] == 1
    assert time.monotonic() - begun < leases.LEASE / 2


def _draws(seed, rate, count):
    """Which of the first requests a server spoils, with a single kind of trouble."""
    source = random.Random(seed)
    draws = []
    for _ in range(count):
        draws.append(source.random() < rate)
        if draws[-1]:
            source.choice(["lost"])
    return draws


# --- secrets


@pytest.mark.parametrize(
    "address",
    [
        "s3://AKIA123:pass/word@bucket/faces",
        "https://user:pass/word@host/faces",
        "s3://bucket/faces?X-Amz-Signature=pass/word",
    ],
)
def test_an_address_with_a_secret_is_refused_without_repeating_it(address):
    with pytest.raises(
        StoreError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    ) as error:
        locate(address)
    assert "pass" not in str(error.value) and "faces" in str(error.value)


def test_an_error_of_the_client_that_repeats_a_secret_is_cleared_of_it(monkeypatch, server, store):
    place = locate(store)

    def fail(path):
        raise OSError("cannot reach http://user:pass/word@host:9000/bucket")

    monkeypatch.setattr(place._files, "cat_file", fail)
    with pytest.raises(StoreError, match=r"cannot reach http://host:9000/bucket") as error:
        place.read_bytes("file")
    assert "pass" not in str(error.value)

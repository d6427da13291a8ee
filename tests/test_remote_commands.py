"""verify, repair, resume, retry-failed, gc and logs on S3, over a link that is slow and spoils requests."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest
import s3_server
from noted_units import Direct
from small_stage import commit
from stage_builds import EXECUTION, changed, planned
from stored_files import results
from test_gc import bind, filled
from test_store_commands import build, run

from flows import build as flow
from flows import cli, resume
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.diffusion.engine import SamplingEngine
from negfacediff_core.store import gc, records
from negfacediff_core.store.layout import Unit, array_path
from negfacediff_core.store.location import locate
from negfacediff_core.store.status import stages, unfinished
from tasks import chunks
from tasks.executors import open_pool

UNIT = Unit(1, 0)


@pytest.fixture(scope="module")
def server():
    with s3_server.connected() as server:
        yield server


@contextmanager
def bad_link(server, rate):
    """Spoil a share of the requests, of which there must be one, and delay them all."""
    server.trouble(rate=rate, latency=0.002, seed=7)
    yield
    spoiled = set(server.counts()) - {"none"}
    server.trouble()
    assert spoiled, "nothing went wrong on the way"


@pytest.fixture(scope="module")
def config(tiny_build):
    return changed(tiny_build, identities=3, images=2)


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    """The build in a folder."""
    folder = tmp_path_factory.mktemp("local")
    build(folder, config)
    return folder


def upload(folder, url):
    """Copy a store to S3, where it is one as well."""
    source, target = locate(str(folder)), locate(url)
    for entry in source.walk(""):
        target.write_atomic(entry.path, source.read_bytes(entry.path))


@pytest.fixture
def rebuilding(monkeypatch):
    """The commands build without Prefect, and say in `made` how many units."""
    monkeypatch.setattr(resume, "build_in", lambda *what: made.append(build(*what)))
    made.clear()


made: list[int] = []


@pytest.mark.slow
def test_dask_workers_on_s3_make_what_a_local_build_makes(server, config, folder, monkeypatch):
    """The workers are processes: each finds the store by its address, and the keys in the environment."""
    store = "s3://bucket/dask"
    specs = planned(config, store)
    monkeypatch.setattr(flow, "run_chunk", Direct)
    execution = ExecutionConfig(executor="dask", workers=2, device="cpu")
    with open_pool(execution) as pool:
        crew = chunks.Crew(pool, execution, lambda stage: None, lambda stage, rows: None, threading.Event())
        for group in flow.GROUPS:
            flow.finish([specs[name] for name in group], crew)
    assert all(records.pending(spec) == [] for spec in specs.values())
    assert results(store) == results(folder)


def stage(store, name):
    return next(spec for spec in stages(store) if spec.name == name)


@pytest.mark.slow
def test_what_is_damaged_on_s3_is_found_by_unit_repaired_and_made_again(server, folder, capsys, rebuilding):
    store = "s3://bucket/damaged"
    upload(folder, store)
    samples, embeddings = stage(store, "samples"), stage(store, "embeddings")
    shard = array_path(samples, samples.arrays[0], UNIT)
    metadata = f"arrays.zarr/{embeddings.arrays[0].name}/zarr.json"
    samples.location.write_atomic(shard, samples.location.read_bytes(shard)[:-9])
    embeddings.location.write_atomic(metadata, b"{")
    with bad_link(server, 0.01):
        code, said = run(capsys, "verify", store, "--repair")
        assert code == 1 and "Damage: 2 files, of 1 committed unit." in said
        assert f"{samples.path} {UNIT.name} {shard}: it is not what was committed" in said
        assert f"{metadata}: it is not what describes the committed units" in said
        assert f"Written again: {embeddings.path}/{metadata}" in said
        # its crops, its embeddings and the evaluation
        assert "Pending again: 1 unit, and 3 units made from them." in said
        assert unfinished(store) == {"tiny": 4}
        assert run(capsys, "resume", store)[0] == 0
        assert made == [4]
        assert results(store) == results(folder)
        code, said = run(capsys, "verify", store)
        assert code == 0 and "No damage was found." in said


@pytest.mark.slow
def test_rows_that_failed_are_made_again_on_s3(server, folder, config, capsys, monkeypatch, rebuilding):
    store, sample = "s3://bucket/failed", SamplingEngine.sample

    def failing(self, towards, away, weight, identities, replicates, seed):
        images, clipped = sample(self, towards, away, weight, identities, replicates, seed)
        return images, np.where((identities == 2) & (replicates == 1), np.nan, clipped).astype(np.float32)

    with bad_link(server, 0.01):
        with monkeypatch.context() as patch:
            patch.setattr(SamplingEngine, "sample", failing)
            build(store, config)
        assert results(store) != results(folder)
        code, said = run(capsys, "retry-failed", store)
        assert code == 0 and "Pending again: 2 failed rows in 2 units, and 2 units made from them." in said
        assert made == [4]
        assert results(store) == results(folder)


@pytest.mark.slow
def test_a_unit_that_fails_on_s3_leaves_a_log_that_can_be_shown(server, capsys, monkeypatch):
    spec = filled("s3://bucket/logs")
    bind(spec.store, "run", spec)
    records.forget(spec, UNIT)

    def failing(spec, unit, execution):
        raise OSError("cannot reach http://user:pass/word@host:9000")

    monkeypatch.setattr(chunks, "run_unit", failing)
    with bad_link(server, 0.2):
        with open_pool(EXECUTION) as pool:
            crew = chunks.Crew(
                pool, EXECUTION, lambda stage: None, lambda stage, rows: None, threading.Event()
            )
            (failure,) = chunks.drive([chunks.Line(UNIT, (spec,))], 0, crew)
        assert failure.log == f"{spec.directory}/logs/{UNIT.name}.txt"
        said = logs(capsys, spec)
        assert f"{spec.path} {UNIT.name} not committed last failure, {failure.log}: Traceback" in said
        assert said.endswith("OSError: cannot reach http://host:9000")
        commit(spec, UNIT)
        assert f"{spec.path} {UNIT.name} committed 20" in logs(capsys, spec)


def logs(capsys, spec):
    """What `negfacediff logs` says of the unit, in one line."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["logs", spec.store, spec.name, UNIT.name])
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_what_no_run_needs_is_listed_and_then_removed_on_s3(server, capsys, monkeypatch):
    store = "s3://bucket/cleaned"
    kept = filled(store)
    bind(store, "kept", kept)
    before = results(store)
    other = filled(store, config={"w": 0.9})
    with bad_link(server, 0.03):
        code, said = run(capsys, "gc", store)
        assert code == 0 and "There is nothing to remove." in said, "it was touched in the last hour"
        with monkeypatch.context() as patch:
            patch.setattr(gc, "ABANDONED", -1e9)
            code, said = run(capsys, "gc", store)
            assert code == 0 and said.count("no run needs this stage") == 1
            assert "Nothing was removed." in said
            (only,) = gc.find_rubbish(store)
        assert not gc.remove(store, only), "it is looked at again, and is new"
        assert records.pending(other) == []
        with monkeypatch.context() as patch:
            patch.setattr(gc, "ABANDONED", -1e9)
            code, said = run(capsys, "gc", store, "--delete")
            assert code == 0 and "Removed " in said
    assert other.location.walk("") == [], "the lock is gone too"
    assert results(store) == before and records.pending(kept) == []

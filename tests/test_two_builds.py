"""Two builds at once on one store: what they share is done once or identically, and nothing is corrupted."""

import threading
from collections import Counter
from pathlib import Path

import pytest
from noted_units import PROCESSES, build_real, build_small, promises, results, start
from small_stage import commit, make_spec
from stage_builds import changed

from negfacediff_core.config import ExecutionConfig
from negfacediff_core.stages.build import plan_build
from negfacediff_core.store import faults, records, shards

ONE = ExecutionConfig(workers=1, device="cpu")
TWO = ExecutionConfig(workers=2, device="cpu")


def run_both(*processes) -> None:
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]


def record_writes(folder: Path) -> Counter[str]:
    """How often each completion record was given its name, over the processes that noted below `folder`."""
    steps = [step for file in folder.glob("*/steps.txt") for step in file.read_text().splitlines()]
    return Counter(step for step in steps if "renamed done/" in step)


def test_two_processes_that_make_one_stage_commit_each_unit_once(tmp_path):
    store, alone = tmp_path / "store", tmp_path / "alone"
    run_both(*(start(build_small, store, tmp_path / name, TWO, 10) for name in ("first", "second")))
    spec = make_spec(store, identities=40)
    assert records.pending(spec) == []
    assert set(record_writes(tmp_path).values()) == {1}
    assert len(record_writes(tmp_path)) == 10
    start(build_small, alone, tmp_path / "third", TWO, 10).join()
    assert results(store) == results(alone)
    assert promises([spec]) == promises([make_spec(alone, identities=40)])


@pytest.mark.slow
def test_two_builds_that_share_contexts_make_what_each_makes_alone(tiny_build, tmp_path):
    """The builds differ in w alone: contexts and negatives are shared, all from the samples on is not."""
    store, alone = tmp_path / "store", tmp_path / "alone"
    builds = [changed(tiny_build, name=name, samples__w=w) for name, w in (("weak", 0.2), ("strong", 0.8))]
    run_both(*(start(build_real, store, tmp_path / build.name, ONE, build) for build in builds))
    specs = {build.name: plan_build(build, str(store)) for build in builds}
    pairs = list(zip(*specs.values(), strict=True))
    assert {one.name for one, other in pairs if one.path == other.path} == {"contexts", "negatives"}
    for build in builds:
        assert all(records.pending(spec) == [] for spec in specs[build.name])
        process = start(build_real, alone, tmp_path / f"{build.name}-alone", ONE, build)
        process.join(240)
        assert process.exitcode == 0
    assert results(store) == results(alone)
    for mine in specs.values():
        for spec in mine:
            assert {unit for _, unit in promises([spec])} == {unit.name for unit in spec.grid.units()}


def test_a_unit_that_two_have_made_is_written_by_one(tmp_path):
    """The second waits for the first, finds its record, and leaves every file as it is."""
    spec = make_spec(tmp_path)
    shards.prepare(spec)
    unit = spec.grid.units()[0]
    writes: Counter[str] = Counter()
    inside = threading.Event()

    def observe(step):
        writes[step] += 1
        if step.startswith("half"):
            inside.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "hook", observe)
        first = threading.Thread(target=commit, args=(spec, unit))
        first.start()
        assert inside.wait(30)
        commit(spec, unit)
        first.join(30)
    assert set(writes.values()) == {1}


def prepare_small(store: str, identities: int) -> None:
    """Prepare the small stage at an extent, again and again, while another process does so at another."""
    for _ in range(20):
        shards.prepare(make_spec(store, identities=identities))


def test_two_processes_that_grow_a_stage_leave_it_at_the_larger_extent(tmp_path):
    processes = [
        PROCESSES.Process(target=prepare_small, args=(str(tmp_path), identities)) for identities in (8, 24)
    ]
    for process in processes:
        process.start()
    run_both(*processes)
    large = make_spec(tmp_path, identities=24)
    for unit in large.grid.units():
        commit(large, unit)
    assert all(set(shards.read_arrays(large, unit)) == {"image", "embedding"} for unit in large.grid.units())

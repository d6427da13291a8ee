"""A process is really killed at every step of every commit; the rerun must equal an uninterrupted run."""

import signal

import pytest
from noted_units import promises, results, stamps, start
from small_stage import commit, make_spec

from negfacediff_core.store import records, shards

FILES = ("arrays.zarr/image/c", "arrays.zarr/embedding/c", "rows/part", "done/")


def build(store: str) -> None:
    """Make every pending unit of a small stage, one after the other."""
    spec = make_spec(store)
    shards.prepare(spec)
    for unit in records.pending(spec):
        commit(spec, unit)


def run(store, folder, kill_at=None) -> tuple[int | None, list[str]]:
    """Run `build` in a process of its own; return its exit code and the steps that it took."""
    process = start(build, store, folder, kill_at=kill_at)
    process.join()
    steps = folder / "steps.txt"
    return process.exitcode, steps.read_text().splitlines() if steps.exists() else []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, steps = run(folder / "store", folder)
    assert code == 0
    return folder / "store", steps


def test_the_steps_come_in_the_order_of_the_contract(uninterrupted):
    """Shards, rows, record; each is begun, half written, whole, and then has its name."""
    _, steps = uninterrupted
    first_unit, second_unit = (
        [step for step in steps if "json" not in step or "done/" in step][:16],
        steps[-16:],
    )
    for unit in (first_unit, second_unit):
        expected = [(kind, file) for file in FILES for kind in ("write", "half", "rename", "renamed")]
        assert [step.split()[0] for step in unit] == [kind for kind, _ in expected]
        assert all(step.split()[1].startswith(file) for step, (_, file) in zip(unit, expected, strict=True))
    assert len(steps) == 16 + 2 * 16


def test_killed_at_every_step_in_turn_it_comes_to_equal_an_uninterrupted_run(uninterrupted, tmp_path):
    expected, steps = uninterrupted
    store = tmp_path / "store"
    spec = make_spec(store)
    kept: dict = {}
    for number, step in enumerate(steps):
        code, taken = run(store, tmp_path / f"life-{number}", kill_at=step)
        assert (code, taken[-1]) == (-signal.SIGKILL, step)
        done = {unit.name for unit in records.committed(spec)}
        # the rename of its record, and nothing before, makes a unit done
        assert done == {step[-14:-5] for step in steps[: number + 1] if step.startswith("renamed done/")}
        assert stamps([spec]).items() >= kept.items(), f"{step}: a committed unit was written again"
        kept = stamps([spec])
        for unit in records.committed(spec):
            shards.read_arrays(spec, unit)
            shards.read_rows(spec, unit)
    code, taken = run(store, tmp_path / "last")
    assert (code, taken) == (0, [])
    assert results(store) == results(expected)
    assert promises([spec]) == promises([make_spec(expected)])

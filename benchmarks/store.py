"""The store and the executors with 100,000 units of trivial work: what they cost beside the work itself.

    python benchmarks/store.py

Targets are of processor time on a core of its own; the exit code is 1 when one is missed. Records are written
directly, as fast as files can be made: a unit of a real build takes minutes of a GPU.
"""

import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from measure import machine, write_results

from flows.build import pending_lines
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.store.layout import Grid, StageSpec, Unit, record_path
from negfacediff_core.store.records import Record, pending, records
from negfacediff_core.store.runs import write_run
from negfacediff_core.store.shards import prepare
from negfacediff_core.store.status import status
from tasks import chunks
from tasks.executors import open_pool

UNITS, FEW = 100_000, 1_000
# Units that go through Dask: the second measurement shows what grows with their number.
THROUGH_DASK = (1_000, 5_000)
# The first ones wait for the workers to import the stages.
WARM_UP = 50
# Seconds of processor time on a core of its own. What runs beside a benchmark delays the clock, and by
# sharing caches and cores makes processor time longer too: by as much as that of the plain loop, timed right
# before.
PLAIN_SECONDS = 0.5
TARGETS = {
    "plan, nothing done": 10.0,
    "plan, all done": 10.0,
    "lines of a round": 10.0,
    "status": 5.0,
    "open and check 1,000 records": 2.0,
}
# Milliseconds of processor time of driver and scheduler a unit, and by how much these may grow, in bytes.
TARGET_DASK, TARGET_MEMORY = 10.0, 64 * 2**20


def make_stage(store: Path, units: int) -> StageSpec:
    """A stage of one image a unit, with a run that covers it, in an empty store."""
    spec = StageSpec(
        store=str(store),
        name="samples",
        version=1,
        config={},
        inputs={},
        grid=Grid(units, 1, block_identities=1, block_replicates=1),
        columns=(("identity", "int64"),),
    )
    prepare(spec)
    place = {"fingerprint": spec.fingerprint, "identities": units, "replicates": 1}
    write_run(str(store), "load", {"stages": {"samples": place}})
    return spec


def record_of(unit: Unit) -> Record:
    """What a unit that has just been made looks like."""
    now = time.time()
    hashes = {f"arrays.zarr/image/c.{unit.identity_block}.0.0.0.0": "0" * 64, f"rows/{unit.name}": "1" * 64}
    return Record(unit, 1, 1, 0, hashes, {"sample": 0.1, "write": 0.01}, now, now + 0.1, "host", "cpu")


def write_records(spec: StageSpec) -> None:
    """Commit every unit of the stage, without its data and without waiting for the disk."""
    folder = Path(spec.directory) / "done"
    folder.mkdir()
    for unit in spec.grid.units():
        data = record_of(unit).to_bytes()
        (folder.parent / record_path(unit)).write_bytes(data)


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Time one call: by the clock, of the processor, and of one whose plain loop takes half a second."""
    plain = time.process_time()
    plain_loop()
    clock, processor = time.perf_counter(), time.process_time()
    work()
    seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - processor
    own = cpu_seconds * PLAIN_SECONDS / (processor - plain)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "own_core_seconds": own}


def plain_loop() -> None:
    """Ten million additions: about half a second on a core of its own, so that other machines compare."""
    total = 0
    for number in range(10_000_000):
        total += number


def measure_store(folder: Path) -> dict[str, dict[str, float]]:
    """How long planning and looking take, in a stage of 100,000 units and in one of 1,000."""
    spec = make_stage(folder / "many", UNITS)
    found = {
        "plan, nothing done": timed(lambda: pending(spec)),
        "lines of a round": timed(lambda: pending_lines([spec])),
    }
    write_records(spec)
    found["plan, all done"] = timed(lambda: pending(spec))
    found["status"] = timed(lambda: status(spec.store))
    few = make_stage(folder / "few", FEW)
    write_records(few)
    found["open and check 1,000 records"] = timed(lambda: (status(few.store), records(few)))
    return found


def trivial(spec: StageSpec, unit: Unit, execution: ExecutionConfig) -> Record:
    """Stand in for a stage: no work at all."""
    return record_of(unit)


def measure_dask(folder: Path, units: int) -> dict[str, Any]:
    """What a unit costs on its way through a Dask worker, and what driver and scheduler then hold more of."""
    spec = make_stage(folder / f"dask-{units}", units)
    process, lines = psutil.Process(), pending_lines([spec])
    rows: list[int] = []
    chunks.run_unit = trivial
    with open_pool(ExecutionConfig(executor="dask", workers=2, device="cpu")) as pool:
        crew = chunks.Crew(
            pool, ExecutionConfig(), lambda stage: None, lambda stage, n: rows.append(n), threading.Event()
        )
        chunks.drive(lines[:WARM_UP], 0, crew)
        before = process.memory_info().rss
        taken = timed(lambda: chunks.drive(lines[WARM_UP:], 0, crew))
        grown = process.memory_info().rss - before
    assert len(rows) == units
    a_unit = {f"ms_{name}": 1e3 * value / (units - WARM_UP) for name, value in taken.items()}
    return {"units": units, **a_unit, "target_ms": TARGET_DASK, "driver_and_scheduler_bytes": grown}


def verdict(met: bool) -> str:
    """Say whether a target is met."""
    return "met" if met else "MISSED"


def main() -> int:
    """Run and print everything; write `results/store.json`; return how many targets are missed."""
    results: dict[str, Any] = {"machine": machine(), "units": UNITS, "plain_loop": timed(plain_loop)}
    plain = results["plain_loop"]["cpu_seconds"]
    print(f"load average {results['machine']['load_average']}; CPU of the plain loop {plain:.2f} s")
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        found = measure_store(Path(folder))
        print(f"{UNITS:,} units                      clock       CPU  own core  target")
        for name, taken in found.items():
            clock, processor, own, target = *taken.values(), TARGETS[name]
            print(
                f"{name:<30} {clock:>7.2f} s {processor:>7.2f} s {own:>7.2f} s {target:>5.0f} s  "
                f"{verdict(own <= target)}"
            )
            missed += own > target
        results["store"] = {name: {**taken, "target": TARGETS[name]} for name, taken in found.items()}
        results["dask"] = []
        for units in THROUGH_DASK:
            row = measure_dask(Path(folder), units)
            results["dask"].append(row)
            own, grown = row["ms_own_core_seconds"], row["driver_and_scheduler_bytes"]
            print(
                f"{units:>6,} units through Dask: {row['ms_seconds']:.2f} ms a unit; driver and scheduler "
                f"{row['ms_cpu_seconds']:.2f} ms CPU, {own:.2f} ms on an own core "
                f"(target {TARGET_DASK:.0f} ms, {verdict(own <= TARGET_DASK)}); "
                f"memory {grown / 2**20:+.1f} MiB "
                f"(bound {TARGET_MEMORY / 2**20:.0f} MiB, {verdict(grown <= TARGET_MEMORY)})"
            )
            missed += (own > TARGET_DASK) + (grown > TARGET_MEMORY)
    results["missed"] = missed
    print(f"{missed or 'no'} targets missed; written to {write_results('store', results)}")
    return missed


if __name__ == "__main__":
    sys.exit(1 if main() else 0)

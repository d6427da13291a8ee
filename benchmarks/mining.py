"""Mining negatives against the plain loop over identities: time, the arithmetic floor, and memory.

    OMP_NUM_THREADS=1 python benchmarks/mining.py [--million]

Both forms run beside each other. Of the identities a slice is timed, since all would take too long: the work
of one does not depend on how many others are mined.
"""

import argparse
import resource
import tempfile
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import best_seconds, machine, product_rate, write_results
from numpy.typing import NDArray

from negfacediff_core.negatives import mine, plan_blocks

WIDTH = 512
UNIT = 1024
CASES = (("far", 1), ("far", 8), ("close", 1), ("mid", 1))
# Pool size, identities timed here, identities timed in the plain loop.
POOLS = ((10_000, UNIT, 128), (100_000, UNIT, 16))
MILLION = 1_000_000


@dataclass(frozen=True)
class FilePool:
    """A pool in a file of raw float32, of which only what is asked for is read."""

    path: Path
    shape: tuple[int, int]

    def __getitem__(self, rows: slice) -> NDArray[np.float32]:
        width = self.shape[1]
        values = np.fromfile(
            self.path, np.float32, (rows.stop - rows.start) * width, offset=rows.start * width * 4
        )
        return values.reshape(-1, width)


def unit_vectors(rows: int, seed: int) -> NDArray[np.float32]:
    """Draw rows uniformly on the sphere."""
    vectors = np.random.default_rng(seed).standard_normal((rows, WIDTH), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def plain_loop(pool: NDArray[np.float32], identities: int, rule: str, count: int) -> list[Any]:
    """Mine one identity after the other: a row of cosines, then numpy's argmin, argmax or argsort."""
    pick: dict[tuple[str, bool], Callable[[NDArray[np.float32]], Any]] = {
        ("far", True): np.argmin,
        ("far", False): lambda row: np.argsort(row)[:count],
        ("close", True): lambda row: np.argmax(np.where(np.isinf(row), -row, row)),
        ("mid", True): lambda row: np.argsort(row)[(len(row) - 1) // 2],
    }
    found = []
    for identity in range(identities):
        row = pool @ pool[identity]
        row[identity] = np.inf  # itself, last
        found.append(pick[rule, count == 1](row))
    return found


def compare(size: int, timed: int, looped: int, rate: float) -> list[dict[str, Any]]:
    """Time every case in a pool of that size."""
    pool = unit_vectors(size, seed=0)
    floor = 2 * WIDTH * size / rate
    rows = []
    for rule, count in CASES:
        ours = best_seconds(lambda r=rule, c=count: mine(pool[:timed], pool, r, 0, count=c), 2) / timed
        plain = best_seconds(lambda r=rule, c=count: plain_loop(pool, looped, r, c)) / looped
        found = mine(pool[:looped], pool, rule, 0, count=count).index.squeeze()
        agree = (found == np.array(plain_loop(pool, looped, rule, count))).mean()
        rows.append(
            {
                "pool": size,
                "rule": rule,
                "count": count,
                "identities_timed": timed,
                "identities_timed_in_the_loop": looped,
                "ms_per_identity": 1e3 * ours,
                "ms_per_identity_in_the_loop": 1e3 * plain,
                "ratio": plain / ours,
                "float32_floor_ms_per_identity": 1e3 * floor,
                "share_of_the_float32_floor": floor / ours,
                "agreement": float(agree),
            }
        )
        show(rows[-1])
    return rows


def extrapolated(row: dict[str, Any]) -> dict[str, Any]:
    """Hours for a million identities in a pool of a million: the work grows with the product of the two."""
    hours = MILLION / row["pool"] * MILLION / 3.6e6
    return {
        "rule": row["rule"],
        "count": row["count"],
        "here": row["ms_per_identity"] * hours,
        "plain_loop": row["ms_per_identity_in_the_loop"] * hours,
    }


def show(row: dict[str, Any]) -> None:
    """Print a row of the table."""
    loop, here, floor = (
        row[f"{key}ms_per_identity{suffix}"]
        for key, suffix in (("", "_in_the_loop"), ("", ""), ("float32_floor_", ""))
    )
    print(
        f"{row['pool']:>9,} {row['rule']:>6} {row['count']:>2} {loop:>11.2f} ms {here:>9.3f} ms"
        f" {row['ratio']:>7.1f}x {floor:>10.3f} ms {row['share_of_the_float32_floor']:>6.0%}"
    )


def peak_memory(size: int) -> dict[str, Any]:
    """What a unit of identities allocates, as planned and as measured."""
    pool = unit_vectors(size, seed=0)
    measured = {}
    for rule, count in CASES:
        tracemalloc.start()
        mine(pool[:UNIT], pool, rule, 0, count=count)
        measured[f"{rule} {count}"] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    most = max(count for _, count in CASES)
    return {
        "pool": size,
        "planned_bytes": plan_blocks(UNIT, size, WIDTH, most).bytes,
        "measured_bytes": measured,
    }


def million() -> dict[str, Any]:
    """Mine one unit in a pool of a million that lies in a file: time, and the most memory of this process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pool.f4"
        with path.open("wb") as file:
            for seed in range(MILLION // 10_000):
                unit_vectors(10_000, seed).tofile(file)
        pool = FilePool(path, (MILLION, WIDTH))
        contexts = pool[0:UNIT]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seconds = {
            f"{rule} {count}": best_seconds(
                lambda r=rule, c=count: mine(contexts, pool, r, 0, count=c), repeats=1
            )
            for rule, count in (("far", 1), ("mid", 1))
        }
    return {
        "pool": MILLION,
        "identities_timed": UNIT,
        "seconds_a_unit": seconds,
        "hours_for_all_units": {case: each * MILLION / UNIT / 3600 for case, each in seconds.items()},
        "planned_bytes": plan_blocks(UNIT, MILLION, WIDTH, 1).bytes,
        "process_peak_bytes_before": before,
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    """Run and print everything; write `results/mining.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--million", action="store_true", help="mine a unit in a pool of 1,000,000 (2 GB)")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": machine()}
    if arguments.million:  # first, so that the peak of the process is its own
        results["million"] = million()
        print(results["million"])
    rate = product_rate(UNIT, 8192, WIDTH)
    print(f"matrix product: {rate / 1e9:.0f} GFLOP/s; load average {results['machine']['load_average']}")
    print("     pool   rule  k     plain loop         here    ratio         floor  share")
    results["product_gflops"] = rate / 1e9
    results["cases"] = [row for pool in POOLS for row in compare(*pool, rate)]
    results["extrapolated_hours_at_a_million"] = [
        extrapolated(row) for row in results["cases"] if row["pool"] == POOLS[-1][0]
    ]
    results["bytes_read_per_identity"] = {
        "plain loop": 4 * WIDTH * MILLION,
        "here": 4 * WIDTH * MILLION // UNIT,
    }
    results["memory"] = peak_memory(POOLS[-1][0])
    print(*results["extrapolated_hours_at_a_million"], results["memory"], sep="\n")
    print(f"written to {write_results('mining', results)}")


if __name__ == "__main__":
    main()

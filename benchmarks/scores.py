"""All scores of a large set against plain forms: time, the arithmetic floor, memory, and exactness.

    OMP_NUM_THREADS=1 python benchmarks/scores.py [--images 50000] [--device cuda]

A slice of a set of 500,000 embeddings is timed, one band against a part of another, since a pair costs the
same whichever it is; then all pairs of a smaller set are counted, band by band, as two workers would share
them. With --device cuda the scores are made on a GPU, and timed by the clock instead of as processor time;
the plain forms and the product alone stay on the CPU. Exits with 1 where a target is missed.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from measure import best_seconds, machine, product_rate, write_results
from numpy.typing import NDArray

from negfacediff_core.evaluation.bands import (
    BAND_IMAGES,
    BINS,
    TILE_ROWS,
    Images,
    add_up,
    band_bytes,
    partners,
    score_band,
)
from negfacediff_core.evaluation.bootstrap import MOST_IDENTITIES, SUBSETS, bootstrap
from negfacediff_core.evaluation.metrics import separability

WIDTH, EACH = 512, 50
WORKERS = 2
MINUTES, MEMORY, RATIO = 45, 4 * 2**30, 20
# Identities that the times of all pairs are worked out for.
SIZES = (10_000, 100_000, 1_000_000)
DRAWS = 200
# Images that the timed band is compared with.
SLICE = 16_384
# Images and those they are compared with in the loop; more than a processor's caches hold.
LOOPED = 64, 100_000


def faces(identities: range) -> Images:
    """Embeddings whose scores are like published ones: 0.36 +- 0.13 genuine, 0.02 +- 0.06 impostor."""
    random = np.random.default_rng(identities.start)
    spread = np.r_[np.ones(260), np.full(WIDTH - 260, 0.1)].astype(np.float32)
    centres = random.standard_normal((len(identities), 1, WIDTH), dtype=np.float32)
    noise = random.standard_normal((len(identities), EACH, WIDTH), dtype=np.float32)
    blur = random.uniform(0.6, 2.1, (len(identities), EACH, 1)).astype(np.float32)
    vectors = (centres + blur * noise + 0.2) * spread
    return Images(vectors.reshape(-1, WIDTH), np.repeat(np.array(identities), EACH))


def plain(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.int64]:
    """Count the scores of unit rows in tiles of the same size: a similarity matrix and numpy's histogram."""
    counts = np.zeros(BINS, np.int64)
    for top in range(0, len(left), TILE_ROWS):
        for start in range(0, len(right), 4 * TILE_ROWS):
            scores = left[top : top + TILE_ROWS] @ right[start : start + 4 * TILE_ROWS].T
            counts += np.histogram(scores, BINS, (-1, 1))[0]
    return counts


def loop(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.int64]:
    """Count the same image by image: a row of cosines, which reads all of `right`, and one histogram."""
    return np.histogram([right @ one for one in left], BINS, (-1, 1))[0]


def time_slice(device: str) -> dict[str, Any]:
    """Nanoseconds a pair, here and in both plain forms, and those of the product alone."""
    per_band = BAND_IMAGES // EACH
    own, other = faces(range(per_band)), faces(range(per_band, 2 * per_band))
    part = Images(other.embeddings[:SLICE], other.identity[:SLICE])
    both = best_seconds(lambda: score_band(own, [part], device=device), 2, clock_of(device))
    alone = best_seconds(lambda: score_band(own, (), device=device), 2, clock_of(device))
    pairs = len(own.identity) * len(part.identity)
    units = [
        images.embeddings / np.linalg.norm(images.embeddings, axis=1, keepdims=True) for images in (own, part)
    ]
    few = units[0][: 2 * TILE_ROWS], units[1][: 4 * TILE_ROWS]
    tiled = best_seconds(lambda: plain(*few), 1) / (len(few[0]) * len(few[1]))
    every = np.tile(units[1], (-(-LOOPED[1] // len(units[1])), 1))[: LOOPED[1]]
    looped = best_seconds(lambda: loop(units[0][: LOOPED[0]], every), 1) / (LOOPED[0] * LOOPED[1])
    rate = product_rate(TILE_ROWS, 4 * TILE_ROWS, WIDTH)
    here = (both - alone) / pairs
    return {
        "ns_per_pair": 1e9 * here,
        "ns_per_pair_of_tiles": 1e9 * tiled,
        "ns_per_pair_of_a_loop": 1e9 * looped,
        "ratio_to_tiles": tiled / here,
        "ratio_to_a_loop": looped / here,
        "product_gflops": rate / 1e9,
        "floor_ns_per_pair": 1e9 * 2 * WIDTH / rate,
        "seconds_of_a_band_with_itself": alone,
    }


def clock_of(device: str) -> Callable[[], float]:
    """What times a device: processor time, or where a GPU works meanwhile the clock."""
    return time.process_time if device == "cpu" else time.perf_counter


def workers_on(device: str) -> int:
    """Workers that the times are for: WORKERS cores, or one GPU."""
    return WORKERS if device == "cpu" else 1


def extrapolated(timed: dict[str, Any], device: str) -> list[dict[str, float]]:
    """Hours for all pairs of EACH images of so many identities: each pair costs the same, a band besides."""
    rows = []
    for identities in SIZES:
        images = identities * EACH
        hours = images**2 / 2 / 3.6e12  # of a pair that takes a nanosecond
        bands = images / BAND_IMAGES * timed["seconds_of_a_band_with_itself"] / 3600
        rows.append(
            {
                "identities": identities,
                "images": images,
                "here": (hours * timed["ns_per_pair"] + bands) / workers_on(device),
                "tiles": hours * timed["ns_per_pair_of_tiles"] / WORKERS,
                "loop": hours * timed["ns_per_pair_of_a_loop"] / WORKERS,
                "floor": hours * timed["floor_ns_per_pair"] / WORKERS,
            }
        )
    return rows


def run_all(images: int, device: str) -> dict[str, Any]:
    """Count all pairs of `images`, band by band, and check their number and moments."""
    per_band = BAND_IMAGES // EACH
    identities = images // EACH
    bands = [range(start, min(start + per_band, identities)) for start in range(0, identities, per_band)]

    def others(band: int) -> Iterator[Images]:
        return (faces(bands[other]) for other in partners(band, len(bands))[1:])

    started, clock = time.process_time(), time.perf_counter()
    comparisons = add_up(
        [score_band(faces(bands[band]), others(band), device=device) for band in range(len(bands))]
    )
    seconds, wall = time.process_time() - started, time.perf_counter() - clock
    pairs = images * (images - 1) // 2
    found = separability(*comparisons)
    assert found.genuine_count + found.impostor_count == pairs
    return {
        "images": images,
        "pairs": pairs,
        "processor_seconds": seconds,
        "wall_seconds": wall,
        "ns_per_pair": 1e9 * seconds / pairs,
        **{
            f"{kind}_{moment}": getattr(found, f"{kind}_{moment}")
            for kind in ("genuine", "impostor")
            for moment in ("mean", "std")
        },
        "eer": found.eer,
        "eer_bound": found.eer_bound,
        "fmr1000": found.fmr1000,
    }


def time_bootstrap() -> dict[str, Any]:
    """Seconds of a subset's resamples; larger sets than it have SUBSETS of them."""
    images = faces(range(MOST_IDENTITIES))
    embeddings = images.embeddings.reshape(MOST_IDENTITIES, EACH, WIDTH)
    valid = np.ones(embeddings.shape[:2], bool)
    seconds = best_seconds(
        lambda: bootstrap(lambda some: (embeddings[some], valid[some]), valid.shape, DRAWS, 0), 1
    )
    return {"draws": DRAWS, "subsets": SUBSETS, "seconds_a_subset": seconds}


def main() -> int:
    """Run and print everything; write `results/scores.json`, of a GPU `results/scores_gpu.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000, help="of the set that is counted whole")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N: where scores are made")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "device": arguments.device}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results["whole"] = run_all(arguments.images, arguments.device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results["memory"] = {
        "planned_bytes_of_a_band": band_bytes(BAND_IMAGES, WIDTH),
        "process_peak_bytes_before": before,
        "process_peak_bytes": peak,
    }
    results["slice"] = time_slice(arguments.device)
    results["bootstrap"] = time_bootstrap()
    results["hours_for_all_pairs"] = extrapolated(results["slice"], arguments.device)
    workers = workers_on(arguments.device)
    every = results["hours_for_all_pairs"][0]
    verdicts = {
        f"{every['images']:,} embeddings on {workers} x {arguments.device} in {MINUTES} minutes": 60
        * every["here"]
        <= MINUTES,
        f"{RATIO}x a loop over images": results["slice"]["ratio_to_a_loop"] >= RATIO,
        f"{workers} workers in {MEMORY >> 30} GB": workers * peak <= MEMORY,
        "EER within 1e-5 of that of single scores": results["whole"]["eer_bound"] <= 1e-5,
    }
    results["targets"] = verdicts
    for section in ("whole", "memory", "slice", "bootstrap"):
        print(section, *(f"  {name}: {value:,.6g}" for name, value in results[section].items()), sep="\n")
    print(f"hours on {workers} x {arguments.device}; the plain forms on {WORKERS} cores")
    print("identities       images       here      tiles       loop      floor")
    for row in results["hours_for_all_pairs"]:
        print(
            f"{row['identities']:>10,} {row['images']:>12,}"
            + "".join(f" {row[form]:>10,.2f}" for form in ("here", "tiles", "loop", "floor"))
        )
    print(*(f"{'met' if met else 'MISSED'}: {target}" for target, met in verdicts.items()), sep="\n")
    name = "scores" if arguments.device == "cpu" else "scores_gpu"
    print(f"written to {write_results(name, results)}")
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

"""The sampling engine against the published procedure in its straightforward form, part by part.

    OMP_NUM_THREADS=1 python benchmarks/engine.py                    # full-size networks on the CPU
    python benchmarks/engine.py --device cuda --only evaluations decoding
    python benchmarks/engine.py --size tiny --quick                  # seconds, to see that everything runs

Each row is a ratio of two times of one run, with the floor beside it: operations at the measured rate of
matrix products, or bytes at the measured bandwidth. Exit status 1: a target of this device was missed.
"""

import argparse
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from engine_parts import decoding, evaluations, outside, samplers, unit, workers
from floors import bandwidth, matrix_rate, peak_bytes
from measure import machine, write_results
from networks import SIZES, random_generator
from steps import Row, Setup

from negfacediff_core.diffusion.precision import PRECISIONS

PARTS: dict[str, Callable[[Setup], list[Row]]] = {
    "evaluations": evaluations,
    "decoding": decoding,
    "samplers": samplers,
    "outside": outside,
    "unit": unit,
    "workers": workers,
}


def measured_rates(kind: str, side: int | None = None, size: int | None = None) -> dict[str, float]:
    """Operations a second by precision, and bytes a second."""
    rates = {name: matrix_rate(kind, PRECISIONS[name].dtype, side) for name in ("fp32", "bf16")}
    return rates | {"bytes": bandwidth(kind, size)}


def set_up(device: str, size: str, quick: bool) -> Setup:
    """Make the networks and measure the device."""
    kind, small = device.partition(":")[0], size == "tiny"
    rates = measured_rates(kind, *((128, 1 << 20) if small else ()))
    return Setup(device, size, quick, random_generator(size, device), rates)


def run_part(name: str, setup: Setup) -> dict[str, Any]:
    """Run a part; what it raised is its result where it fails, so that the others still run."""
    if setup.kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        rows = PARTS[name](setup)
    except Exception as error:
        traceback.print_exc()
        return {"rows": [], "error": f"{type(error).__name__}: {error}"}
    for row in rows:
        print(line_of(row), flush=True)
    peak = peak_bytes(setup.kind)
    print(f"{name}: peak memory {peak / 2**30:.2f} GiB", flush=True)
    return {"rows": [row._asdict() | {"verdict": row.verdict} for row in rows], "peak_bytes": peak}


def line_of(row: Row) -> str:
    """A row as a line of the table."""
    times = "".join("           -" if t is None else f"{t:12.4g}" for t in (row.plain, row.here, row.floor))
    target = "" if row.target is None else f"{'<=' if row.at_most else '>='} {row.target:g}: {row.verdict}"
    return f"{row.what:50}{times}{row.value:10.3g}  {target:16}{row.note}"


HEADER = (
    f"{'seconds an evaluation or an image':50}{'plain':>12}{'here':>12}{'floor':>12}{'ratio':>10}  target"
)


def failed(parts: dict[str, Any]) -> list[str]:
    """What missed its target, and the parts that could not run."""
    missed = [row["what"] for part in parts.values() for row in part["rows"] if row["verdict"] == "MISSED"]
    return missed + [name for name, part in parts.items() if "error" in part]


def main(words: list[str] | None = None) -> int:
    """Run the chosen parts; write `results/engine-DEVICE-SIZE.json`, of some parts `...-part.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--quick", action="store_true", help="time everything once, smaller plain batches")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args(words)
    setup = set_up(arguments.device, arguments.size, arguments.quick)
    results: dict[str, Any] = {"machine": machine(), "rates": setup.rates, **vars(arguments), "parts": {}}
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in setup.rates.items())
    print(f"1e9 operations or bytes a second: {rates}; load {results['machine']['load_average']}\n{HEADER}")
    # the results that are kept are those of the whole
    whole = not arguments.quick and set(arguments.only) == set(PARTS)
    name = f"engine-{setup.kind}-{setup.size}" + ("" if whole else "-part")
    for part in arguments.only:
        results["parts"][part] = run_part(part, setup)
        path = write_results(name, results)
    print(f"written to {path}")
    short = failed(results["parts"])
    print(*(f"missed: {what}" for what in short), sep="\n")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())

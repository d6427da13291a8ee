"""What the benchmarks share: timing, a word on the machine, and writing results."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"


def best_seconds(
    work: Callable[[], Any], repeats: int = 3, clock: Callable[[], float] = time.process_time
) -> float:
    """Return the shortest processor time of several calls, over all threads; of a GPU's, that of the `clock`.

    Other processes' turns are not counted in it, and what else disturbs a measurement only ever adds to it.
    """
    times = []
    for _ in range(repeats):
        start = clock()
        work()
        times.append(clock() - start)
    return min(times)


def product_rate(rows: int, columns: int, width: int) -> float:
    """Return the floating-point operations a second of a float32 matrix product of these sizes."""
    left, right = torch.randn(rows, width), torch.randn(columns, width)
    result = torch.empty(rows, columns)
    return 2 * rows * columns * width / best_seconds(lambda: torch.mm(left, right.T, out=result), 5)


def machine() -> dict[str, Any]:
    """Say on what, beside what and with what a benchmark runs."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
    }


def write_results(name: str, results: Mapping[str, Any]) -> Path:
    """Write `results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()

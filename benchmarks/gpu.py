"""Check and time the engine on a GPU in one go, within eight minutes; nothing is fetched or built.

    PYTHONPATH=. python benchmarks/gpu.py --results gpu.json

Every section runs whatever became of those before it, says what failed, and is written to the file as soon
as it ends; sections that the time no longer allows are left out. Without the packages of the store, the
sections of the unit and of the tests fail alone. Exit status 1: a check failed or a target was missed.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine import HEADER, PARTS, failed, run_part, set_up
from floors import seconds_of
from measure import machine
from networks import SIZES, rows_of, without_decoder
from numpy.typing import NDArray
from steps import Setup, engine_for

from negfacediff_core.diffusion.checkpoint import load_generator
from negfacediff_core.diffusion.precision import PRECISIONS
from negfacediff_core.noise import gaussian

PROJECT = Path(__file__).parents[1]
DEMO = PROJECT / "packs" / "demo" / "generator"

#: Steps that are timed where ways to evaluate are compared.
STEPS = 10
#: The most that images may differ by: mean over all values, in levels of 255, from float32 on the CPU.
MEAN_LEVELS = {"fp32": 0.05, "tf32": 0.5, "bf16": 3.0, "fp16": 0.5}
#: Between batch sizes, in float32: share of values that differ by over one level.
OTHER_VALUES = 0.02


def noise(setup: Setup) -> dict[str, Any]:
    """The same numbers on the device as on the CPU, up to one unit in the last place."""
    identities, replicates = torch.arange(64), torch.arange(64) % 7
    worst, equal = 0.0, []
    for step in (0, 1, 500, 1000):
        ours, theirs = (
            gaussian(2**40 + 3, identities, replicates, step, (3, 32, 32), device).cpu()
            for device in ("cpu", setup.device)
        )
        worst = max(worst, float((ours - theirs).abs().max()))
        equal.append(float((ours == theirs).float().mean()))
    return {"ok": worst < 1e-6, "largest difference": worst, "share equal": min(equal)}


def precisions(setup: Setup) -> dict[str, Any]:
    """Images of the demo pack in every precision of the device against float32 on the CPU."""
    expected, _ = _demo_images(setup, "cpu", "fp32")
    found: dict[str, Any] = {"ok": True}
    for precision in PRECISIONS if setup.kind == "cuda" else ("fp32", "bf16"):
        images, way = _demo_images(setup, setup.device, precision)
        found[precision] = differences(images, expected) | {"evaluated by": way}
        found["ok"] &= found[precision]["mean"] <= MEAN_LEVELS[precision]
    return found


def batches(setup: Setup) -> dict[str, Any]:
    """Images of the demo pack whatever the batch size, in float32 and bfloat16."""
    found: dict[str, Any] = {"ok": True}
    for precision in ("fp32", "bf16"):
        expected, _ = _demo_images(setup, setup.device, precision, batch=8)
        for batch in (1, 3):
            images, _ = _demo_images(setup, setup.device, precision, batch=batch)
            found[f"{precision}, {batch} against 8"] = differences(images, expected)
            allowed = OTHER_VALUES if precision == "fp32" else 1.0  # bfloat16 rounds by kernel: it is told
            found["ok"] &= found[f"{precision}, {batch} against 8"]["over one level"] <= allowed
    return found


def accelerations(setup: Setup) -> dict[str, Any]:
    """Eager evaluation and graphs: the same images, and the time of a step of the full-size network."""
    return _ways(setup, ("eager", "graphs"), (1, 8, 64) if setup.kind == "cuda" else (1,))


def compiling(setup: Setup) -> dict[str, Any]:
    """The same for the compiled network, at one batch: it takes minutes."""
    return _ways(setup, ("compile",), (64,)) if setup.kind == "cuda" else {"ok": True, "left out": "on a CPU"}


def _ways(setup: Setup, names: tuple[str, ...], batches: tuple[int, ...]) -> dict[str, Any]:
    expected, _ = _demo_images(setup, setup.device, "bf16", acceleration="eager")
    generator = without_decoder(setup.generator)
    found: dict[str, Any] = {"ok": True}
    for name in names:
        images, way = _demo_images(setup, setup.device, "bf16", acceleration=name)
        found[name] = {"evaluated by": way} | differences(images, expected)
        found["ok"] &= found[name]["mean"] <= MEAN_LEVELS["bf16"]
        found["ok"] &= way == name or setup.kind == "cpu"
        for batch in batches:
            engine = engine_for(generator, "dpm_solver", STEPS, batch, "bf16", acceleration=name)
            rows = rows_of(generator, batch)
            engine.sample(*rows, seed=0)
            seconds = seconds_of(lambda engine=engine, rows=rows: engine.sample(*rows, seed=0), setup.kind)
            found[name][f"seconds a step, batch {batch}"] = seconds / STEPS
            found[name][f"warm-up, batch {batch}"] = engine.warm_up
            found["ok"] &= engine.network.way == name or setup.kind == "cpu"
    return found


def memory(setup: Setup) -> dict[str, Any]:
    """Where the memory ends, batches are halved and the images stay; the largest batch is found."""
    if setup.kind != "cuda":
        return {"ok": True, "left out": "only a GPU runs out of memory without the process ending"}
    generator = without_decoder(setup.generator)
    rows = rows_of(generator, 512)
    taken = torch.cuda.memory_allocated() + (6 << 30)
    torch.cuda.set_per_process_memory_fraction(taken / torch.cuda.get_device_properties(0).total_memory)
    try:
        engine = engine_for(generator, "dpm_solver", 2, 512, "fp32")
        engine.sample(*rows, seed=0)
        halved = engine.batch_size
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    free = engine_for(generator, "dpm_solver", 2, 0, "bf16")
    free.sample(*rows, seed=0)
    return {"ok": halved < 512, "halved to": halved, "largest that fits": free.batch_size}


def suite(setup: Setup) -> dict[str, Any]:
    """The tests that ask for a GPU, and those of noise, network and engine beside it."""
    files = [f"tests/test_{name}.py" for name in ("noise", "unet", "engine", "first_stage")]
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *files]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, timeout=150, check=False)
    return {"ok": done.returncode == 0, "end": (done.stdout + done.stderr)[-2000:]}


def differences(images: NDArray[np.uint8], expected: NDArray[np.uint8]) -> dict[str, float]:
    """How far images lie from others: the largest, the mean, the share of values over one level."""
    levels = np.abs(images.astype(np.int16) - expected)
    return {
        "largest": int(levels.max()),
        "mean": float(levels.mean()),
        "over one level": float((levels > 1).mean()),
    }


def _demo_images(
    setup: Setup, device: str, precision: str, batch: int = 8, acceleration: str = "auto"
) -> tuple[NDArray[np.uint8], str]:
    """Images of the demo pack, which no network of random weights can stand for, and the way taken."""
    key = f"demo pack on {device}"
    if key not in setup.once:
        setup.once[key] = load_generator(DEMO, device)
    count, steps = (4, 3) if setup.quick else (16, 20)
    engine = engine_for(setup.once[key], "ddim", steps, batch, precision, acceleration=acceleration)
    return engine.sample(*rows_of(setup.once[key], count), seed=0).images, engine.network.way


CHECKS: dict[str, Callable[[Setup], dict[str, Any]]] = {
    "noise": noise,
    "precisions": precisions,
    "batches": batches,
    "memory": memory,
    "accelerations": accelerations,
}
# Compiling may take minutes, and the tests need packages that may be missing: they come last.
LATE: dict[str, Callable[[Setup], dict[str, Any]]] = {"suite": suite, "compiling": compiling}


def check(name: str, setup: Setup) -> dict[str, Any]:
    """Run a check; an error is a result of it."""
    try:
        found = (CHECKS | LATE)[name](setup)
    except Exception as error:
        traceback.print_exc()
        found = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    print(f"{name}: {'ok' if found['ok'] else 'FAILED'} {found}", flush=True)
    return found


def main(words: list[str] | None = None) -> int:
    """Run all sections and write what they found after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("gpu.json"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--minutes", type=float, default=8.0, help="no section begins after these")
    parser.add_argument("--only", nargs="+", choices=[*CHECKS, *PARTS, *LATE])
    arguments = parser.parse_args(words)
    begun = time.monotonic()
    setup = set_up(arguments.device, arguments.size, arguments.quick)
    results: dict[str, Any] = {"machine": machine(), "rates": setup.rates, "checks": {}, "parts": {}}
    if setup.kind == "cuda":
        results["device"] = torch.cuda.get_device_name(0)
    print(results, HEADER, sep="\n", flush=True)
    for name in arguments.only or [*CHECKS, *PARTS, *LATE]:
        kind, run = ("parts", run_part) if name in PARTS else ("checks", check)
        before = time.monotonic()
        if before - begun > 60 * arguments.minutes:
            results[kind][name] = {"rows": [], "ok": True, "left out": "the time was up"}
        else:
            results[kind][name] = run(name, setup) | {"seconds": time.monotonic() - before}
        arguments.results.write_text(json.dumps(results, indent=2) + "\n")
    short = [name for name, found in results["checks"].items() if not found["ok"]]
    short += failed(results["parts"])
    print(f"{time.monotonic() - begun:.0f} s; written to {arguments.results}")
    print(*(f"failed or missed: {what}" for what in short), sep="\n")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())

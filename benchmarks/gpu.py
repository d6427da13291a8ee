"""Check and time the engine on a GPU in one go, in eight minutes and a half; nothing is fetched or built.

    PYTHONPATH=. python benchmarks/gpu.py --results gpu.json

Every section runs whatever became of those before it, says what failed, and is written to the file as soon
as it ends. The targets come early. The last sections run in processes of their own, which end when the time
is up; what the time does not allow is named at the end, and what hangs ends everything half a minute later.
The tests need the extra [dev], and are left out without it. Exit status 1: a check failed, a target was
missed, or the time was up before everything was done.
"""

import argparse
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
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
#: Test files with tests that need a GPU, and those of what runs there.
TESTED = ("noise", "bands", "unet", "engine", "first_stage", "precision", "faces_device")
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
            seen = found[f"{precision}, {batch} against 8"] = differences(images, expected)
            found["ok"] &= seen["mean"] <= MEAN_LEVELS[precision]
            # bfloat16 rounds by kernel: how many values move is told, and not limited
            found["ok"] &= seen["over one level"] <= OTHER_VALUES or precision != "fp32"
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
    """Where the memory ends, batches are halved and the latents stay; the largest batch is found."""
    if setup.kind != "cuda":
        return {"ok": True, "left out": "only a GPU runs out of memory without the process ending"}
    rows = rows_of(setup.generator, 512)

    def latents(batch: int, precision: str) -> tuple[torch.Tensor, int]:
        seen: list[torch.Tensor] = []
        engine = engine_for(without_decoder(setup.generator, seen.append), "dpm_solver", 2, batch, precision)
        engine.sample(*rows, seed=0)
        return torch.cat(seen)[: len(rows[3])].float().cpu(), engine.batch_size

    expected, _ = latents(64, "fp32")
    torch.cuda.empty_cache()
    taken = torch.cuda.memory_allocated() + (6 << 30)
    torch.cuda.set_per_process_memory_fraction(taken / torch.cuda.get_device_properties(0).total_memory)
    try:
        found, halved = latents(512, "fp32")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    difference = float((found - expected).norm() / expected.norm())
    return {
        "ok": halved < 512 and difference < 1e-3,
        "halved to": halved,
        "relative difference": difference,
        "largest that fits": latents(0, "bf16")[1],
    }


def overlap(setup: Setup) -> dict[str, Any]:
    """Units of the demo one after the other, and overlapped: a GPU idles less while others write."""
    from stored_unit import overlap_units  # the store's packages are wanted here alone

    images, units = (2, 2) if setup.quick else (64, 6)
    precision = "bf16" if setup.kind == "cuda" else "fp32"
    found = overlap_units(setup.device, precision, images, units)
    before, after = found["one by one"], found["overlapped"]
    # threads of a CPU compute at the same time: their seconds add up to more than the clock's
    ok = setup.kind == "cpu" or after["idle"] < before["idle"]
    return {"ok": ok, "units": units, "ratio": before["seconds"] / after["seconds"], **found}


def suite(setup: Setup) -> dict[str, Any]:
    """The tests that ask for a GPU, and those beside them."""
    missing = [name for name in ("pytest", "hypothesis", "diffusers") if find_spec(name) is None]
    if missing:
        return {"ok": True, "left out": f"{', '.join(missing)} not installed: the extra [dev] has them"}
    files = [f"tests/test_{name}.py" for name in TESTED]
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *files]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=False)
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
    "overlap": overlap,
}
# Nobody knows how long these take: they come last, each in a process that ends with the time.
LATE: dict[str, Callable[[Setup], dict[str, Any]]] = {"suite": suite, "compiling": compiling}
# What the time is for stands first: right images, then the targets.
ORDER = ("noise", "precisions", *PARTS, "batches", "memory", "accelerations", "overlap", *LATE)
# Seconds after its time at which a section that hangs is ended, and with it the rest.
GRACE = 30


def check(name: str, setup: Setup) -> dict[str, Any]:
    """Run a check; an error is a result of it."""
    try:
        found = (CHECKS | LATE)[name](setup)
    except Exception as error:
        traceback.print_exc()
        found = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    print(f"{name}: {'ok' if found['ok'] else 'FAILED'} {found}", flush=True)
    return found


def check_apart(name: str, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run a check in a process of its own, for so many seconds at most."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        words = ["--device", arguments.device, "--size", arguments.size, "--results", str(results)]
        words += ["--quick"] if arguments.quick else []
        # a session of its own, so that what it has started ends with it
        process = subprocess.Popen(
            [sys.executable, __file__, *words, "--apart", name], start_new_session=True
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {"ok": False, "left out": f"it was not done in the {seconds:.0f} s that were left"}
        if not results.exists():
            return {"ok": False, "error": f"its process ended with {process.returncode}"}
        return json.loads(results.read_text())["checks"][name]


def run_section(name: str, setup: Setup, arguments: argparse.Namespace, left: float) -> dict[str, Any]:
    """Run a check or a part with `left` seconds to go."""
    if left <= 0:
        return {"rows": [], "ok": False, "left out": "the time was up"}
    before = time.monotonic()
    if name in LATE and name != arguments.apart:
        found = check_apart(name, arguments, left)
    else:
        found = run_part(name, setup) if name in PARTS else check(name, setup)
    return found | {"seconds": time.monotonic() - before}


def main(words: list[str] | None = None) -> int:
    """Run all sections and write what they found after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("gpu.json"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--minutes", type=float, default=8.0, help="how long it may take")
    parser.add_argument("--only", nargs="+", choices=ORDER)
    parser.add_argument("--apart", choices=LATE, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    begun = time.monotonic()
    faulthandler.dump_traceback_later(60 * arguments.minutes + GRACE, exit=True)
    setup = set_up(arguments.device, arguments.size, arguments.quick)
    results: dict[str, Any] = {"machine": machine(), "rates": setup.rates, "checks": {}, "parts": {}}
    if setup.kind == "cuda":
        results["device"] = torch.cuda.get_device_name(setup.device)
    print(results, HEADER, sep="\n", flush=True)
    names = [arguments.apart] if arguments.apart else arguments.only or ORDER
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # batch sizes found here are not the user's
        for name in names:
            left = 60 * arguments.minutes - (time.monotonic() - begun)
            kind = "parts" if name in PARTS else "checks"
            results[kind][name] = run_section(name, setup, arguments, left)
            arguments.results.write_text(json.dumps(results, indent=2) + "\n")
    faulthandler.cancel_dump_traceback_later()
    found = results["checks"] | results["parts"]
    short = [name for name, one in results["checks"].items() if not one["ok"]]
    short += failed(results["parts"])
    short += [name for name, one in results["parts"].items() if "left out" in one]
    print(f"{time.monotonic() - begun:.0f} s; written to {arguments.results}")
    print(*(f"failed, missed or left out: {what}" for what in short), sep="\n")
    print(
        *(f"{name} was left out: {one['left out']}" for name, one in found.items() if "left out" in one),
        sep="\n",
    )
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())

"""What Prefect takes: from submitting a build to its first unit, for each unit, and of a ten-minute build.

`negfacediff serve` is started with a database of its own, and a build of the demo pack with one worker and a
unit an image is submitted through the API, as the pages do. When no unit was worked on, it was orchestration.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from measure import machine, write_results

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

PORT = 4391
#: Images of the build, and in the quick mode; each is a unit of three stages.
IMAGES, QUICK = 100, 8
#: Seconds of the build whose share is told, and units that it has: one in three seconds.
BUILD, BUILD_UNITS = 600, 200


def main() -> None:
    """Measure, print a table, and write results/orchestration.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer units, for a look")
    images = QUICK if parser.parse_args().quick else IMAGES
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), images)
    share = (results["submit_to_first_unit"] + BUILD_UNITS * results["per_unit"] + results["end"]) / BUILD
    print("| what | |\n|---|---|")
    print(f"| server and deployments are up | {results['startup']:.1f} s |")
    print(f"| from submitting to the first unit at work | {results['submit_to_first_unit']:.1f} s |")
    print(f"| of it until the run is seen to run | {results['submit_to_running']:.1f} s |")
    print(f"| orchestration a unit | {1000 * results['per_unit']:.1f} ms |")
    print(f"| from the last unit to the end of the run | {results['end']:.1f} s |")
    print(f"| share of a build of {BUILD} s with {BUILD_UNITS} units | {share:.1%} |")
    print(write_results("orchestration", {"machine": machine(), "images": images, **results, "share": share}))


def measure(folder: Path, images: int) -> dict[str, Any]:
    """Serve, run one build, and return the seconds that everything took."""
    begun = time.monotonic()
    with serving(folder) as api:
        startup = time.monotonic() - begun
        return {"startup": startup, **timed_build(api, images, folder / "store")}


@contextmanager
def serving(folder: Path) -> Iterator[httpx.Client]:
    """Run `negfacediff serve` with a database of its own; yield a client of the API."""
    environment = {**os.environ, "PREFECT_HOME": str(folder / "prefect")}
    environment.pop("PREFECT_API_URL", None)
    serve = f"from flows.cli import main; main(['serve', '--no-open', '--port', '{PORT}'])"
    log = folder / "serve.log"
    with log.open("w") as written:
        process = subprocess.Popen(
            [sys.executable, "-c", serve], cwd=ROOT, env=environment, stdout=written, stderr=written
        )
    try:
        while "Ctrl-C ends all" not in log.read_text():
            if process.poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.1)
        with httpx.Client(base_url=f"http://127.0.0.1:{PORT}/api", timeout=60) as api:
            yield api
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


def timed_build(api: httpx.Client, images: int, store: Path) -> dict[str, float]:
    """Submit a build; return the seconds from then to its first unit, for a unit, and after its last."""
    from negfacediff_core.store.records import records
    from negfacediff_core.store.status import seconds_worked, stages

    deployment = api.get("/deployments/name/build-dataset/demo").json()
    build = deployment["parameters"]["build"] | {
        "identities": images,
        "images": 1,
        "block_identities": 1,
        "block_images": 1,
    }
    build["samples"]["steps"] = 1
    parameters = {"build": build, "store": str(store), "execution": {"device": "cpu", "workers": 1}}
    submitted = time.time()
    answer = api.post(f"/deployments/{deployment['id']}/create_flow_run", json={"parameters": parameters})
    running, ended = watch(api, answer.raise_for_status().json()["id"])
    done = [record for spec in stages(str(store)) for record in records(spec)]
    first, last = min(record.started for record in done), max(record.finished for record in done)
    return {
        "units": len(done),
        "submit_to_running": running - submitted,
        "submit_to_first_unit": first - submitted,
        "per_unit": (last - first - seconds_worked(done)) / len(done),
        "end": ended - last,
    }


def watch(api: httpx.Client, run: str) -> tuple[float, float]:
    """Wait for the end of a run; return when it was seen to run first, and when to be complete."""
    running = 0.0
    while True:
        state = api.get(f"/flow_runs/{run}").json()["state"]
        if state["type"] in ("FAILED", "CRASHED", "CANCELLED"):
            raise RuntimeError(state["message"])
        if not running and state["type"] in ("RUNNING", "COMPLETED"):
            running = time.time()
        if state["type"] == "COMPLETED":
            return running, time.time()
        time.sleep(0.1)


if __name__ == "__main__":
    main()

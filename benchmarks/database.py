"""By how much Prefect's database grows: a task run, an update of progress, a sign of life, a finished build.

`negfacediff serve` is started with a database of its own (SQLite). A flow makes many of one kind, and the
pages that the database has more of are counted; then a build of the demo pack is submitted, and what it adds
beside its task runs, updates and signs of life is what a build adds whatever its size.
"""

import argparse
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import httpx
from measure import machine, write_results
from orchestration import serving, watch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

#: How many of each kind are made, and in the quick mode.
MANY, QUICK = 200, 50
#: The measured build: identities, and images of each.
IDENTITIES, IMAGES = 16, 4
#: Seconds without growth, after which what was to be written is: the server writes events in batches.
QUIET = 15.0


def main() -> None:
    """Measure, print a table, and write results/database.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer of each, for a look")
    count = QUICK if parser.parse_args().quick else MANY
    with tempfile.TemporaryDirectory() as folder:
        # before Prefect is imported: this process, too, keeps clear of the user's own
        os.environ["PREFECT_HOME"] = f"{folder}/prefect"
        with serving(Path(folder)) as api:
            results = measure(api, Path(folder), count)
    print("| one more | bytes |\n|---|---|")
    for what, added in results["bytes"].items():
        print(f"| {what} | {added:,.0f} |")
    print(f"| an hour of one stage that moves | {results['hour']:,.0f} |")
    print(write_results("database", {"machine": machine(), "of_each": count, **results}))


def measure(api: httpx.Client, folder: Path, count: int) -> dict[str, Any]:
    """Return the bytes that one of each kind adds, an hour of progress, and what the build consists of."""
    from flows.artifacts import LONGEST
    from flows.serve import HEARTBEAT

    database = folder / "prefect" / "prefect.db"
    with at_server(api):
        empty = growth(database, lambda: many(lambda count: None, 0))
        each = {
            what: (growth(database, partial(many, make, count)) - empty) / count
            for what, make in KINDS.items()
        }
    before = counts(database)
    added = growth(database, lambda: build(api, folder / "store"))
    made = {what: number - before[what] for what, number in counts(database).items()}
    finished = added - sum(each[what] * number for what, number in made.items())
    hour = 3600 / LONGEST * each[UPDATE] + 3600 / HEARTBEAT * each[SIGN]
    with closing(sqlite3.connect(database)) as read:
        ((page,),) = read.execute("select max(length(data)) from artifact")
    return {
        "bytes": {**each, "finished build": finished},
        "hour": hour,
        "build": {**made, "bytes": added, "page of the result": page},
    }


@contextmanager
def at_server(api: httpx.Client) -> Iterator[None]:
    """Have flows of this process run at the server."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: str(api.base_url).rstrip("/")}):
        yield


def growth(database: Path, work: Callable[[], None]) -> int:
    """Return by how many bytes a database grows as something is done."""
    before = settled(database)
    work()
    return settled(database) - before


def settled(database: Path) -> int:
    """Return the bytes of a database that are in use, when they stay the same for a while."""
    size, since = 0, time.monotonic()
    while time.monotonic() - since < QUIET:
        time.sleep(0.5)
        now = used(database)
        if now != size:
            size, since = now, time.monotonic()
    return size


def used(database: Path) -> int:
    """Return the bytes of the pages that hold something, counting those that are in the log alone as yet."""
    with closing(sqlite3.connect(database, timeout=60)) as read:
        pages, free, size = (
            read.execute(f"pragma {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
    return (pages - free) * size


def counts(database: Path) -> dict[str, int]:
    """Return how many of each kind a database holds."""
    with closing(sqlite3.connect(database, timeout=60)) as read:
        return {what: read.execute(query).fetchone()[0] for what, query in QUERIES.items()}


def many(make: Callable[[int], None], count: int) -> None:
    """Run a flow, as builds are run, that makes so many of a kind."""
    from prefect import flow, tags

    from flows.build import CHUNK_RUNNER

    with tags("negfacediff", "build"):
        flow(name="build-dataset", flow_run_name="many", task_runner=CHUNK_RUNNER)(make)(count)


def task_runs(count: int) -> None:
    """Run chunks without units."""
    from tasks.chunks import run_chunk

    for number in range(count):
        run_chunk.submit(f"samples+aligned+embeddings {number}/{count}", [], 0, cast("Any", None)).result()


def updates(count: int) -> None:
    """Move the artifact of a stage's progress."""
    from prefect.artifacts import create_progress_artifact, update_progress_artifact

    text = "{:.0f}%: 18.2 images/s, 1:23:45 left; {:,} of 5,000,000 images"
    made = cast("UUID", create_progress_artifact(0.0, "many-samples", text.format(0, 0)))
    for number in range(count):
        percent = 100 * number / count
        update_progress_artifact(made, percent, text.format(percent, 50_000 * percent))


def signs(count: int) -> None:
    """Tell that the run lives, as Prefect's engine does for a run of a deployment."""
    from prefect.context import FlowRunContext
    from prefect.events import emit_event

    context = FlowRunContext.get()
    assert context is not None and context.flow_run is not None
    run = context.flow_run
    resource = {"prefect.resource.id": f"prefect.flow-run.{run.id}", "prefect.resource.name": run.name}
    related = [
        {"prefect.resource.id": f"prefect.{role}.{name}", "prefect.resource.role": role}
        for role, name in (
            ("flow", run.flow_id),
            ("deployment", uuid4()),
            ("tag", "negfacediff"),
            ("tag", "build"),
        )
    ]
    for _ in range(count):
        emit_event("prefect.flow-run.heartbeat", resource, related=related)


TASK, UPDATE, SIGN = "task run", "update of a stage's progress", "sign of life of a run"
KINDS: Mapping[str, Callable[[int], None]] = {TASK: task_runs, UPDATE: updates, SIGN: signs}
QUERIES = {
    TASK: "select count(*) from task_run",
    UPDATE: "select count(*) from events where event = 'prefect.artifact.updated'",
    SIGN: "select count(*) from events where event = 'prefect.flow-run.heartbeat'",
}


def build(api: httpx.Client, store: Path) -> None:
    """Build a dataset with the demo pack, as the pages do, and wait for its end."""
    deployment = api.get("/deployments/name/build-dataset/demo").json()
    chosen = deployment["parameters"]["build"] | {"identities": IDENTITIES, "images": IMAGES}
    parameters = {"build": chosen, "store": str(store), "execution": {"device": "cpu", "workers": 1}}
    answer = api.post(f"/deployments/{deployment['id']}/create_flow_run", json={"parameters": parameters})
    watch(api, answer.raise_for_status().json()["id"])


if __name__ == "__main__":
    main()

"""What Prefect shows of a run: progress while it moves, figures and pictures at its end, and what failed.

Artifacts are there to be looked at. One that a server does not take is passed over: no build fails, and none
waits for long, because of it.
"""

import base64
import io
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, cast
from uuid import UUID

from PIL import Image
from prefect import get_run_logger
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.context import FlowRunContext

from flows.progress import Meter, clock_text
from flows.results import figure_rows
from flows.words import command_text, count_text
from negfacediff_core.evaluation.figures import GROUPS
from negfacediff_core.store.layout import Unit
from negfacediff_core.store.location import locate
from tasks.chunks import Failure

# Seconds between two looks at the meters; a long run is looked at less often, up to every LONGEST seconds.
PERIOD, LONGEST = 3.0, 30.0
# How long the end of a run waits for a server to take the last of its progress, in seconds.
PATIENCE = 5.0
# Failures that are listed; the rest are counted.
LISTED = 50
# A picture of at most so many bytes is shown as it is; another as WebP of this quality and at most so many
# pixels a side. A page of Prefect loads all of a run's artifacts at once, and its database keeps each three
# times: as the run's, as the latest of its key, and in the event that tells of it.
BYTES, QUALITY, SIDE = 10_000, 80, 1600
#: The deployment that goes on with a run of a store.
RESUME = "resume-failed/resume-failed"
# The headings of the pictures, in the order in which they stand.
PICTURES = {
    "contact_sheet.png": "Images: a row an identity, a column a replicate",
    "histogram.png": "Scores of genuine and impostor pairs",
    "det.png": "DET curves: genuine pairs missed, against impostor pairs that match",
}


def key_of(*words: str) -> str:
    """Return an artifact's key, which Prefect wants of lower-case letters, digits and dashes."""
    return re.sub("[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")


@contextmanager
def progress_artifacts(run: str, meters: Sequence[Meter]) -> Iterator[None]:
    """Show the meters in the flow run while the block runs: one artifact `<run>-<stage>` each.

    A thread of its own tells Prefect, every few seconds, what has changed. Outside a flow run, nothing.
    """
    if FlowRunContext.get() is None:
        yield
        return
    # the page of a flow run opens with its log
    get_run_logger().info("To do: %s. How it goes is shown in the tab Artifacts.", _to_do(meters))
    done = threading.Event()
    # a daemon: a request that hangs must not keep the process
    thread = threading.Thread(target=copy_context().run, args=(_follow, run, meters, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(PATIENCE)


def _to_do(meters: Sequence[Meter]) -> str:
    """List what the stages lack: `samples 256 images, aligned 256 images`."""
    lacking = (meter for meter in meters if not meter.complete)
    return ", ".join(f"{meter.stage} {meter.total - meter.position:,} {meter.noun}" for meter in lacking)


def _follow(run: str, meters: Sequence[Meter], done: threading.Event) -> None:
    """Keep the artifacts of the meters as the meters are, until `done`, and once more then."""
    artifacts: dict[str, UUID] = {}
    shown: dict[str, tuple[int, str]] = {}
    pause = PERIOD
    while True:
        last = done.is_set()
        for meter in filter(lambda meter: meter.total, meters):
            now = meter.position, meter.describe()
            if shown.get(meter.stage) != now and _tell(run, meter, artifacts):
                shown[meter.stage] = now
        if last:
            return
        done.wait(pause)
        pause = min(pause * 1.02, LONGEST)


def _tell(run: str, meter: Meter, artifacts: dict[str, UUID]) -> bool:
    """Create or update the artifact of a meter; returns whether Prefect took it."""
    percent = 100 * meter.position / meter.total
    # a card shows the first thirty letters
    text = f"{percent:.0f}%: {meter.describe()}; {meter.position:,} of {meter.total:,} {meter.noun}"
    with _as_far_as_it_goes():
        if meter.stage in artifacts:
            update_progress_artifact(artifacts[meter.stage], percent, text)
        else:
            # which is asynchronous to a caller that is, and so typed as both
            made = create_progress_artifact(percent, key_of(run, meter.stage), text)
            artifacts[meter.stage] = cast("UUID", made)
        return True
    return False


@contextmanager
def _as_far_as_it_goes() -> Iterator[None]:
    """Log what keeps Prefect from showing something, and go on."""
    try:
        yield
    except Exception as error:
        get_run_logger().debug("Prefect did not take an artifact: %s", error)


def publish(
    name: str, report: Mapping[str, Any], pictures: Mapping[str, bytes], page: str, summary: str = ""
) -> None:
    """Show a report in Prefect, under `name`: figures, pictures, lineage and licences, and where its page is.

    Args:
        name: what the artifacts are called: `<name>`, and `<name>-report` for the link.
        report: as `report.json` has it.
        pictures: by file name; those of PICTURES are shown.
        page: path or URL of the report's page.
        summary: Markdown that stands before all else.
    """
    address = page if "://" in page else locate(page).url
    link = address if "://" in address else f"file://{address}"
    parts = [f"## {report['title']}", summary, f"Report: `{address}`", *_body(report, pictures)]
    with _as_far_as_it_goes():
        create_markdown_artifact("\n\n".join(filter(None, parts)), key_of(name), report["title"])
    with _as_far_as_it_goes():
        create_link_artifact(
            link,
            address,
            key_of(name, "report"),
            f"The whole report of {name}, a page of its own. Browsers follow no link from here to a file: "
            "copy the address.",
        )


def _body(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Iterator[str]:
    """Yield the paragraphs of a report, what most people look for first."""
    datasets, captions = report["datasets"], report.get("captions", {})
    yield from (f"> {warning}" for warning in report.get("warnings", ()))
    first, *others = GROUPS
    yield _figures(datasets, first)
    for file, what in PICTURES.items():
        if file in pictures:
            yield f"### {what}"
            yield f"![{what}]({data_url(pictures[file])})"
            yield captions.get(file.removesuffix(".png"), "")
    yield from (_figures(datasets, group) for group in others)
    yield from report.get("notes", ())
    yield "### Licences\n\n" + _table(
        ["part", "licence", "weights"],
        [[one["part"], one["licence"], one["source"]] for one in report["licences"]],
    )
    yield "### Lineage\n\n" + _table(
        ["stage", *(dataset["name"] for dataset in datasets)],
        [
            [stage, *(f"`{dataset['lineage'].get(stage, '')}`" for dataset in datasets)]
            for stage in datasets[0]["lineage"]
        ],
    )
    versions = ", ".join(f"{tool} {version}" for tool, version in report["versions"].items())
    took = f"{clock_text(report['seconds'])} of work on {report['device']}"
    yield f"Made {report['made']} in {took}, with {versions}."


def _figures(datasets: Sequence[Mapping[str, Any]], group: str) -> str:
    """The figures that stand under a heading, a column a dataset; nothing where there are none."""
    rows = figure_rows(datasets, group)
    return _table([group, *(str(dataset["name"]) for dataset in datasets)], rows) if rows else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Keep a text within its cell."""
    return " ".join(text.split()).replace("|", "\\|")


def data_url(picture: bytes) -> str:
    """Return a PNG as a `data:` URL, which shows without a network: a big one smaller, and as WebP."""
    kind = "png"
    if len(picture) > BYTES:
        image = Image.open(io.BytesIO(picture)).convert("RGB")
        image.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=QUALITY, method=6)
        kind, picture = "webp", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def publish_failures(run: str, store: str, why: str, failures: Sequence[Failure]) -> None:
    """Say why a run ended; list units that failed, where their logs are, and how to go on: `<run>-failed`."""
    # as text, which breaks into lines; code would push the log out of sight
    rows = [
        [one.stage, one.unit, one.error.replace("<", "&lt;"), f"`{one.log}`"] for one in failures[:LISTED]
    ]
    parts = [f"## {run} is not complete", why, "What is committed is kept."]
    if rows:
        parts.append(_table(["stage", "unit", "what went wrong", "log"], rows))
    if len(failures) > LISTED:
        parts.append(f"And {len(failures) - LISTED:,} more.")
    parts += ["### To go on, when the cause is mended", _ways_on(run, store, "resume")]
    with _as_far_as_it_goes():
        create_markdown_artifact("\n\n".join(parts), key_of(run, "failed"), f"Why {run} is not complete")


def publish_failed_images(run: str, store: str, failed: Mapping[Unit, int], example: str) -> None:
    """List units with images that failed, and how many: the artifact `<run>-failed`.

    `example` says which image failed and why.
    """
    rows = [["samples", unit.name, f"{count:,}"] for unit, count in list(failed.items())[:LISTED]]
    more = f"And {len(failed) - LISTED:,} more units.\n\n" if len(failed) > LISTED else ""
    text = (
        f"## {count_text(sum(failed.values()), 'image')} of {run} failed\n\nThe dataset is complete but for "
        f"them. One of them: `{example}`\n\n{_table(['stage', 'unit', 'failed images'], rows)}\n\n{more}"
        f"### To make them again\n\n{_ways_on(run, store, 'retry-failed')}"
    )
    with _as_far_as_it_goes():
        create_markdown_artifact(text, key_of(run, "failed"), f"Images of {run} that failed")


def _ways_on(run: str, store: str, command: str) -> str:
    """Say how one goes on with a run, in a shell and in Prefect."""
    retry = ["- here: **Retry** of this flow run, at the top right"] if command == "resume" else []
    return "\n".join(
        [
            *retry,
            f"- here: the deployment `{RESUME}`, with store `{store}` and run `{run}`",
            f"- in a shell: `{command_text(command, store, run)}`",
            f"\nTo see all that is known of a unit: `{command_text('logs', store, 'STAGE', 'UNIT')}`",
        ]
    )

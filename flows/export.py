"""The flow `export_dataset`: a run of a store as a folder that trainers read and that can be published."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.context import FlowRunContext
from prefect.states import Completed
from rich.console import Console

from flows.artifacts import key_of, progress_artifacts
from flows.build import CHUNK_RUNNER, DEFAULT_EXECUTION
from flows.export_pages import PAGES, lineage_of, pages_of
from flows.export_result import result_lines
from flows.form import STORE, Name
from flows.grow import grow_dataset
from flows.progress import CallbackBar, Meter, show_progress
from flows.words import command_text, count_text
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import ConfigError
from negfacediff_core.explained import explained
from negfacediff_core.export.challenges import check_images, check_strangers
from negfacediff_core.export.draft import Draft, draft, is_done
from negfacediff_core.export.filter import taken
from negfacediff_core.export.formats import FORMATS
from negfacediff_core.export.licence import terms_of_weights
from negfacediff_core.export.manifest import FileSum, checksums, not_written, read_head, write_manifest
from negfacediff_core.export.selection import Selection, grown_extent, select
from negfacediff_core.export.settings import ExportConfig, check_places, check_refill
from negfacediff_core.stages.exported import (
    Job,
    check_columns,
    check_exportable,
    gated_from,
    job_of,
    usable_images,
)
from negfacediff_core.store.runs import stages_of_run
from negfacediff_core.store.status import unfinished
from tasks.machine import usable_cores
from tasks.pieces import written_pieces

DEFAULT_SETTINGS = ExportConfig()
# Seconds of finished work that a kill can cost.
CHECKPOINT = 5.0
# How often a run is grown before it is said that it does not get there.
_GROWTHS = 5


@flow(
    name="export-dataset",
    flow_run_name="{run}",
    task_runner=CHUNK_RUNNER,
)
def export_dataset(
    run: Name,
    out: str,
    settings: ExportConfig = DEFAULT_SETTINGS,
    refill: bool = False,
    execution: ExecutionConfig = DEFAULT_EXECUTION,
    store: str = STORE,
) -> dict[str, Any]:
    """Write the images of `run` that `settings` ask for to a new folder `out`, with all that goes with them.

    Running the same again goes on where it stopped, and does nothing where it is complete. The artifact
    `export` says what was written.

    Returns `out`, `images`, `identities`, `bytes`; how many identities are `short` of the images that are
    `needed`, and how many they are `missing` together; and the `licence` with its `conditions`.

    Raises:
        StoreError: if the run is not there, not complete or damaged, or `out` cannot be written.
        ConfigError: if there are too few images, or the format cannot hold them, or `out` is taken or no
            local folder, or a refill could not help.

    Args:
        run: Name of the finished run; one that a leakage gate kept is one, too.
        out: Folder to make, as the machine that runs this sees it; it must not be there yet.
        settings: Which images are taken, and how they are written.
        refill: Grow the run until there are as many identities with as many images as are asked for. What
            a leakage gate kept does not grow.
        execution: How many processes encode, and where a run that is refilled grows.
        store: The store.
    """
    source = gated_from(store, run)
    check_strangers(settings.challenge, run, gated=source is not None)
    if refill:
        check_refill(settings, run, source)
    check_places(out, settings)
    selection = _select(store, run, settings, execution if refill else None)
    job = job_of(stages_of_run(store, run), settings, selection)
    place = Path(out).absolute()
    if not is_done(place, job.plan):
        _write(job, place, execution.workers or usable_cores(), store, run)
    head = read_head(place)
    terms = terms_of_weights(head["licences"])
    result = {
        "out": str(place),
        "images": job.layout.images,
        "identities": len(job.layout.identities),
        "bytes": head["total"]["bytes"],
        "short": selection.short,
        "missing": selection.missing,
        "needed": selection.needed,
        "licence": terms.name,
        "conditions": list(terms.conditions),
    }
    if FlowRunContext.get() is None:
        return result
    create_markdown_artifact(_page(run, settings, result), key_of("export"), f"Export of {run}")
    # Prefect shows the state's message with the flow run, and hands its data to the caller.
    return cast("dict[str, Any]", Completed(message=next(result_lines(result)), data=result))


def _select(store: str, run: str, settings: ExportConfig, execution: ExecutionConfig | None) -> Selection:
    """Choose the images; with `execution` grow the run until there are enough."""
    if execution is not None and run in unfinished(store):
        check_columns(stages_of_run(store, run), settings, run)
        # a growth that was cut short comes to its end, and no further
        grow_dataset(run=run, identities=1, until_identities=1, execution=execution, store=store)
    for growth in range(_GROWTHS + 1):
        stages = stages_of_run(store, run)
        check_exportable(stages, settings, run)
        with CallbackBar("select", "units") as bar:
            usable = usable_images(stages, settings, bar)
        if settings.filter:
            usable = taken(Path(settings.filter), usable, stages["samples"].fingerprint)
        identities, each = settings.extent
        chosen = select(usable, settings.min_images, each, identities)
        if not chosen.lacking and len(chosen.identities):
            check_images(settings.challenge, int(chosen.chosen.sum()), run)
            return chosen
        if execution is None or growth == _GROWTHS:
            raise ConfigError(_too_few(store, run, identities, chosen, usable.shape))
        grid = stages["samples"].grid
        extent = grown_extent(
            usable, chosen.needed, identities, (grid.block_identities, grid.block_replicates)
        )
        grow_dataset(
            run=run,
            identities=max(0, extent[0] - usable.shape[0]),
            images=max(0, extent[1] - usable.shape[1]),
            execution=execution,
            store=store,
        )
    raise AssertionError("the last growth has returned or raised")


def _too_few(store: str, run: str, identities: int, chosen: Selection, extent: tuple[int, ...]) -> str:
    """Say how many identities fall short, by how many images, and what can be done."""
    asked = f"{identities:,} identities" if identities else "at least one identity"
    if source := gated_from(store, run):
        rest = f"grow the run that it came from ({command_text('grow', store, source)}), run the gate again"
    elif identities:
        rest = f"have the rest made, with --refill or {command_text('grow', store, run)}"
    else:
        rest = f"have more made, with {command_text('grow', store, run)}"
    return (
        f"{asked} with {count_text(chosen.needed, 'usable image')} each were asked for, but of the "
        f"{extent[0]:,} of the run {run}, with {count_text(extent[1], 'image')} each, {chosen.short:,} have "
        f"fewer, {count_text(chosen.missing, 'image')} in all, which leaves {extent[0] - chosen.short:,}: "
        f"ask for fewer, or {rest}"
    )


def _write(job: Job, place: Path, workers: int, store: str, run: str) -> None:
    """Write an export, or the rest of one."""
    with draft(place, job.plan) as begun:
        if not begun.complete:
            write_pieces(job, begun, workers)
            _complete(job, begun, store, run)
        begun.finish()


def write_pieces(job: Job, begun: Draft, workers: int) -> None:
    """Have the pieces written that are not there, in order, with progress on the console and in Prefect."""
    done = begun.pieces
    lost = _lost_pieces(begun) if done else []
    left = [job.pieces[number] for number in lost] + job.pieces[done:]
    images = {piece.number: int(job.layout.counts[piece.start : piece.stop].sum()) for piece in left}
    with (
        _shown("export", "images", job.layout.images, sum(images.values())) as advance,
        written_pieces(job, begun.folder, workers, left) as results,
    ):
        noted = time.monotonic()
        for piece, (appends, own) in zip(left, results, strict=True):
            if piece.number >= done:  # of a lost one its own files alone were
                begun.append(appends, own)
            if time.monotonic() - noted > CHECKPOINT:
                begun.checkpoint()
                noted = time.monotonic()
            advance(images[piece.number])
    begun.checkpoint()
    begun.close()
    if lost and _lost_pieces(begun):
        raise not_written(begun.folder, "")


def _lost_pieces(begun: Draft) -> list[int]:
    with CallbackBar("look again", "pieces") as bar:
        return begun.lost_pieces(bar)


def _complete(job: Job, begun: Draft, store: str, run: str) -> None:
    """Write what needs all pieces: indexes, pages, and the manifest of all files."""
    files = checked_files(job, begun)
    lineage = lineage_of(store, run, job)
    pages = pages_of(store, job, lineage, files)
    with explained("write", begun.folder):
        for name, page in pages.items():
            content = page.encode()
            (begun.folder / name).write_bytes(content)
            files.append(FileSum(name, len(content), hashlib.sha256(content).hexdigest()))
        write_manifest(begun.folder, job.plan, lineage, lambda: chain(begun.own_files(), files))


def checked_files(job: Job, begun: Draft) -> list[FileSum]:
    """Write what the format needs besides the pieces; read back what they were appended to, and that."""
    with explained("write", begun.folder):
        FORMATS[job.settings.format].finish(begun.folder, job.layout)
        for name in PAGES:  # of an end that was cut short
            (begun.folder / name).unlink(missing_ok=True)
    with CallbackBar("check", "MB") as bar:
        return checksums(begun.folder, begun.segments(), bar)


@contextmanager
def _shown(stage: str, noun: str, total: int, left: int) -> Iterator[Callable[[int], None]]:
    """Show progress on the console and in Prefect; what is yielded is told how many more are done."""
    meter = Meter(stage, noun, total, before=total - left)
    with progress_artifacts("dataset", [meter]), show_progress("", [meter], Console()) as reporter:
        reporter.started(stage)
        yield partial(reporter.committed, stage)


def _page(run: str, settings: ExportConfig, result: Mapping[str, Any]) -> str:
    """Write in Markdown what was written, and where it lies."""
    form = f"`{settings.format}`, {settings.images} images as {settings.encoding.upper()}"
    parts = [f"## {run}", *result_lines(result), f"Format: {form}.", f"Folder: `{result['out']}`"]
    check = command_text("verify-export", result["out"])
    parts.append(f"Its card is `README.md` there. After a copy, `{check}` tells whether all is there.")
    return "\n\n".join(parts)

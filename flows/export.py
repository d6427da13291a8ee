"""The flow `export_dataset`: a run of a store as a folder that trainers read and that can be published."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from prefect import flow

from flows.build import CHUNK_RUNNER, DEFAULT_EXECUTION
from flows.export_pages import PAGES, lineage_of, pages_of
from flows.form import STORE, Name
from flows.grow import grow_dataset
from flows.progress import CallbackBar
from flows.words import command_text, count_text
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import ConfigError
from negfacediff_core.export.challenges import check_images, check_strangers
from negfacediff_core.export.draft import Draft, draft, is_done
from negfacediff_core.export.filter import taken
from negfacediff_core.export.formats import FORMATS
from negfacediff_core.export.licence import terms_of
from negfacediff_core.export.manifest import MANIFEST, FileSum, checksums, manifest
from negfacediff_core.export.selection import Selection, grown_extent, select
from negfacediff_core.export.settings import ExportConfig
from negfacediff_core.stages.exported import Job, check_exportable, job_of, usable_images
from negfacediff_core.store.runs import read_run, stages_of_run
from tasks.machine import usable_cores
from tasks.pieces import written_pieces

DEFAULT_SETTINGS = ExportConfig()
# Seconds of work that a kill can cost.
CHECKPOINT = 5.0
# How often a run is grown before it is said that it does not get there.
_GROWTHS = 5
_HASHERS = 4


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

    Running the same again goes on where it stopped, and does nothing where it is complete.

    Returns `out`, `images`, `identities`, `bytes`; how many identities are `short` of the images that are
    `needed`, and how many they are `missing` together; and the `licence` with its `conditions`.

    Raises:
        StoreError: if the run is not there, not complete or damaged, or `out` cannot be written.
        ConfigError: if there are too few images, or the format cannot hold them, or `out` is taken or no
            local folder.

    Args:
        run: Name of the finished run; one that a leakage gate kept is one, too.
        out: Folder to make, as the machine that runs this sees it; it must not be there yet.
        settings: Which images are taken, and how they are written.
        refill: Grow the run until there are as many identities with as many images as are asked for.
        execution: How many processes encode, and where a run that is refilled grows.
        store: The store.
    """
    if "://" in out:
        raise ConfigError(f"out {out!r} is no local folder: export to one, and copy it from there.")
    check_strangers(settings.challenge, run, gated="gate" in (read_run(store, run) or {}))
    selection = _select(store, run, settings, execution if refill else None)
    job = job_of(stages_of_run(store, run), settings, selection)
    place = Path(out).absolute()
    if not is_done(place, job.plan):
        with draft(place, job.plan) as begun:
            if not begun.complete:
                write_pieces(job, begun, execution.workers or usable_cores())
                _complete(job, begun, store, run)
            begun.finish()
    content = json.loads((place / MANIFEST).read_bytes())
    terms = terms_of(one["licence"] for one in content["licences"])
    return {
        "out": str(place),
        "images": job.layout.images,
        "identities": len(job.layout.identities),
        "bytes": sum(one["bytes"] for one in content["files"].values()),
        "short": selection.short,
        "missing": selection.missing,
        "needed": selection.needed,
        "licence": terms.name,
        "conditions": list(terms.conditions),
    }


def _select(store: str, run: str, settings: ExportConfig, execution: ExecutionConfig | None) -> Selection:
    """Choose the images; with `execution` grow the run until there are enough."""
    for growth in range(_GROWTHS + 1):
        stages = stages_of_run(store, run)
        check_exportable(stages, settings, run)
        with CallbackBar("select", "units") as bar:
            usable = usable_images(stages, settings, bar)
        if settings.filter:
            usable = taken(Path(settings.filter), usable)
        identities, each = settings.extent
        chosen = select(usable, settings.min_images, each, identities)
        if not chosen.lacking and len(chosen.identities):
            check_images(settings.challenge, int(chosen.chosen.sum()), run)
            return chosen
        if execution is None or growth == _GROWTHS:
            raise ConfigError(_too_few(store, run, identities, chosen, usable.shape))
        grid = stages["samples"].grid
        wanted = identities or 1
        extent = grown_extent(usable, chosen.needed, wanted, (grid.block_identities, grid.block_replicates))
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
    grow = command_text("grow", store, run)
    return (
        f"{asked} with {count_text(chosen.needed, 'usable image')} each were asked for, but of the "
        f"{extent[0]:,} of the run {run}, with {count_text(extent[1], 'image')} each, {chosen.short:,} have "
        f"fewer, {count_text(chosen.missing, 'image')} in all, which leaves {extent[0] - chosen.short:,}: "
        f"ask for fewer, or have the rest made, with --refill or {grow}"
    )


def write_pieces(job: Job, begun: Draft, workers: int) -> None:
    """Have the pieces written that are not there yet, in order, with progress on the console."""
    left = job.pieces[begun.pieces :]
    with CallbackBar("export", "images") as bar, written_pieces(job, begun.folder, workers, left) as results:
        bar(left[0].first if left else job.layout.images, job.layout.images)
        noted = time.monotonic()
        for piece, (appends, sums) in zip(left, results, strict=True):
            begun.append(appends, sums)
            if time.monotonic() - noted > CHECKPOINT:
                begun.checkpoint()
                noted = time.monotonic()
            bar(piece.first + int(job.layout.counts[piece.start : piece.stop].sum()), job.layout.images)
    begun.checkpoint()
    begun.close_files()


def _complete(job: Job, begun: Draft, store: str, run: str) -> None:
    """Write what needs all pieces: indexes, pages, and the manifest of all files, which are read back."""
    files = checked_files(job, begun)
    lineage = lineage_of(store, run, job)
    for name, page in pages_of(store, job, lineage, files).items():
        content = page.encode()
        (begun.folder / name).write_bytes(content)
        files.append(FileSum(name, len(content), hashlib.sha256(content).hexdigest()))
    (begun.folder / MANIFEST).write_bytes(manifest(job.plan, files, lineage))


def checked_files(job: Job, begun: Draft) -> list[FileSum]:
    """Write what the format needs besides the pieces, and read everything back."""
    FORMATS[job.settings.format].finish(begun.folder, job.layout)
    for name in PAGES:  # of an end that was cut short
        (begun.folder / name).unlink(missing_ok=True)
    with CallbackBar("check", "MB") as bar:
        return checksums(begun.folder, begun.segments(), _HASHERS, bar)

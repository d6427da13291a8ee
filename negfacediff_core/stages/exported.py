"""Reading a run for its export: which images can be used, and the pieces that workers write.

Workers read whole units of the store, encode their images and turn them into bytes of the format. Files that
belong to one piece they write themselves; what is appended to a common file goes to whoever put them to work.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import ConfigError, StoreError
from negfacediff_core.export.draft import write_file
from negfacediff_core.export.formats import FORMATS
from negfacediff_core.export.images import ENCODERS, SUFFIXES
from negfacediff_core.export.layout import Layout, Sample
from negfacediff_core.export.selection import Selection
from negfacediff_core.export.settings import ExportConfig
from negfacediff_core.store.layout import StageSpec, Unit, fingerprint
from negfacediff_core.store.records import pending
from negfacediff_core.store.runs import read_run
from negfacediff_core.store.shards import read_arrays, read_rows

# Raised when the same settings make other bytes.
VERSION = 2
# What is told of each image: the column and the stage that it comes from. Where a run has it.
FACTS = {
    "detection_score": ("aligned", "score"),
    "norm": ("embeddings", "norm"),
    "quality": ("embeddings", "quality"),
    "context_cosine": ("embeddings", "context_cosine"),
}
# Stages that an export reads; each is a folder of units of the same blocks.
_READ = ("samples", "aligned", "embeddings")
_READERS = 4


class Piece(NamedTuple):
    """Images that one worker writes: of labels `start` .. `stop`-1; `first` is the number of the first."""

    number: int
    start: int
    stop: int
    first: int


@dataclass(frozen=True)
class Job:
    """All that a worker must know: the run's stages, what to write where, and which images `(N, R)`."""

    stages: Mapping[str, StageSpec]
    settings: ExportConfig
    layout: Layout
    chosen: NDArray[np.bool_]
    pieces: list[Piece]

    @property
    def plan(self) -> str:
        """Fingerprint of all that decides what is written: the same one, the same bytes."""
        return fingerprint(
            {
                "version": VERSION,
                # what a filter takes is in `chosen`, wherever the file lies
                "settings": self.settings.model_dump(mode="json", exclude={"filter"}),
                "stages": {name: spec.fingerprint for name, spec in self.stages.items()},
                "identities": self.layout.identities.tolist(),
                "chosen": np.packbits(self.chosen).tobytes().hex(),
                "images": self.chosen.shape[1],
            }
        )


def gated_from(store: str, run: str) -> str | None:
    """Return the run of which a leakage gate kept `run`; None where `run` is no gate's, or not there."""
    record = read_run(store, run) or {}
    return record["gate"]["run"] if "gate" in record else None


def check_exportable(stages: Mapping[str, StageSpec], settings: ExportConfig, run: str) -> None:
    """Check a run's stages before work on an export, whose pages tell what the evaluation has found, too.

    Raises:
        StoreError: if a unit is missing.
        ConfigError: if images are chosen by what the run does not have.
    """
    _check_finished(stages, run, stages)
    check_columns(stages, settings, run)


def check_readable(stages: Mapping[str, StageSpec], settings: ExportConfig, run: str) -> None:
    """Check a run's stages before its images are read; raises as `check_exportable`."""
    _check_finished(stages, run, _READ)
    check_columns(stages, settings, run)


def _check_finished(stages: Mapping[str, StageSpec], run: str, names: Iterable[str]) -> None:
    lacking = sum(len(pending(stages[name])) for name in names)
    if lacking:
        raise StoreError(
            f"{lacking} units of the run {run} are missing: finish it first, with negfacediff resume "
            f"{stages['samples'].store} {run}"
        )


def check_columns(stages: Mapping[str, StageSpec], settings: ExportConfig, run: str) -> None:
    """Raise ConfigError if images are chosen by what the run does not have."""
    if settings.banded and "context_cosine" not in _columns(stages["embeddings"]):
        raise ConfigError(
            f"min_cosine and max_cosine choose by the cosine of an image to its context, but the run {run} "
            "has none: build it with embeddings.recogniser, or leave both out"
        )


def usable_images(
    stages: Mapping[str, StageSpec], settings: ExportConfig, progress: Callable[[int, int], None]
) -> NDArray[np.bool_]:
    """Return which images `(I, R)` of a run's extent meet what is asked of status, quality and cosine.

    `progress` is told how many units are read, and how many there are. Raises StoreError for damaged units.
    """
    grid = stages["embeddings"].grid
    usable = np.zeros((grid.identities, grid.replicates), bool)
    units = grid.units()
    progress(0, len(units))
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda unit: _usable(stages, settings, unit), units)
        for done, (unit, part) in enumerate(zip(units, found, strict=True), start=1):
            first, start = grid.identities_of(unit).start, grid.replicates_of(unit).start
            place = usable[first : first + part.shape[0], start : start + part.shape[1]]
            place[:] = part[: place.shape[0], : place.shape[1]]
            progress(done, len(units))
    return usable


def job_of(stages: Mapping[str, StageSpec], settings: ExportConfig, selection: Selection) -> Job:
    """Cut an export into pieces; ConfigError for what the format cannot hold."""
    format_ = FORMATS[settings.format]
    images = stages["aligned" if settings.images == "aligned" else "samples"]
    counts = selection.chosen.sum(axis=1)
    edges = _cut(selection.identities // images.grid.block_identities, counts, format_.piece)
    before = np.concatenate([[0], np.cumsum(counts)])
    pieces = [
        Piece(number, start, stop, int(before[start])) for number, (start, stop) in enumerate(pairwise(edges))
    ]
    columns = {name: _columns(stages[name]) for name in _READ}
    height, width, _ = images.arrays[0].item
    layout = Layout(
        identities=selection.identities,
        counts=counts,
        height=height,
        width=width,
        suffix=SUFFIXES[settings.encoding],
        facts=tuple(name for name, (stage, column) in FACTS.items() if column in columns[stage]),
        variant=settings.variant,
        pieces=len(pieces),
    )
    format_.check(layout)
    return Job({name: stages[name] for name in _READ}, settings, layout, selection.chosen, pieces)


def write_piece(job: Job, piece: Piece, folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """Write the files of a piece; returns what is to be appended to others, by path, and its files' lines.

    Raises:
        StoreError: if a unit is not committed, or is damaged, or a file cannot be written.
    """
    samples: list[Sample] = []
    blocks = job.layout.identities[piece.start : piece.stop] // job.stages["aligned"].grid.block_identities
    for block in np.unique(blocks):
        rows = piece.start + np.flatnonzero(blocks == block)
        samples += _encode_block(job, int(block), rows, piece.first + len(samples))
    written = FORMATS[job.settings.format].write(piece.number, samples, job.layout)
    own = [write_file(folder, path, content) for path, content in written.files.items()]
    return written.appends, own


def _encode_block(job: Job, block: int, rows: NDArray[np.int64], first: int) -> list[Sample]:
    """Encode the chosen images of the identities `rows` of the export, all of one block of the store.

    Returns them in order, numbered from `first`. One unit is decoded at a time.
    """
    settings, grid = job.settings, job.stages["aligned"].grid
    images = job.stages["aligned" if settings.images == "aligned" else "samples"]
    encode = ENCODERS[settings.encoding]
    chosen = job.chosen[rows]
    numbers = first + np.cumsum(chosen).reshape(chosen.shape) - 1
    samples: list[Sample] = []
    for replicate_block in range(grid.blocks[1]):
        unit = Unit(block, replicate_block)
        replicates = grid.replicates_of(unit)
        index, place = np.nonzero(chosen[:, replicates.start : replicates.stop])
        if not len(index):
            continue
        pixels = read_arrays(images, unit)["image"]
        identity, replicate = job.layout.identities[rows[index]], replicates.start + place
        row = identity - grid.identities_of(unit).start
        facts = [values[row, place].tolist() for values in _facts(job.stages, unit, job.layout.facts)]
        known = [*zip(*facts, strict=True)] or [()] * len(index)
        columns = (row, place, numbers[index, replicate], rows[index], identity, replicate)
        table = zip(*(column.tolist() for column in columns), known, strict=True)
        for i, r, number, label, who, which, told in table:
            content = encode(pixels[i, r], settings.quality)
            samples.append(Sample(number, label, who, which, content, told))
    return sorted(samples, key=lambda sample: sample.number)


def _usable(stages: Mapping[str, StageSpec], settings: ExportConfig, unit: Unit) -> NDArray[np.bool_]:
    """Which images `(B, R)` of a unit meet what is asked."""
    aligned = _placed(stages["aligned"], unit, ("status",))
    names = _columns(stages["embeddings"])
    quality = "quality" if "quality" in names else "norm"
    chosen = ("status", quality, *(["context_cosine"] if settings.banded else []))
    embedded = _placed(stages["embeddings"], unit, chosen)
    # what was not embedded was not, because alignment found no face or had no image
    status = np.where(embedded["status"] == "skipped", aligned["status"], embedded["status"])
    usable = np.isin(status, list(settings.status))
    if settings.min_quality is not None:
        usable &= embedded[quality] >= settings.min_quality
    if settings.banded:
        cosine = embedded["context_cosine"]
        usable &= (cosine >= settings.min_cosine) & (cosine <= settings.max_cosine)
    return usable


def _facts(stages: Mapping[str, StageSpec], unit: Unit, names: tuple[str, ...]) -> list[NDArray]:
    """What is told of the images of a unit, an array `(B, R)` for each name; NaN where it is not known."""
    found: dict[str, NDArray] = {}
    for stage in dict.fromkeys(FACTS[name][0] for name in names):
        columns = {FACTS[name][1]: name for name in names if FACTS[name][0] == stage}
        placed = _placed(stages[stage], unit, tuple(columns))
        found |= {columns[column]: values for column, values in placed.items()}
    return [found[name] for name in names]


def _placed(spec: StageSpec, unit: Unit, names: tuple[str, ...]) -> dict[str, NDArray]:
    """Columns of a unit's rows, each as `(B, R)`."""
    rows = read_rows(spec, unit)
    identities, replicates = spec.grid.identities_of(unit), spec.grid.replicates_of(unit)
    place = (
        rows.column("identity").to_numpy() - identities.start,
        rows.column("replicate").to_numpy() - replicates.start,
    )
    found: dict[str, NDArray[Any]] = {}
    for name in names:
        values = rows.column(name).to_numpy()
        found[name] = np.empty((len(identities), len(replicates)), values.dtype)
        found[name][place] = values
    return found


def _columns(spec: StageSpec) -> set[str]:
    return {name for name, _ in spec.columns}


def _cut(blocks: NDArray[np.int64], counts: NDArray[np.int64], least: int) -> list[int]:
    """Return the edges of pieces of whole `blocks` `(N,)`, of at least so many images but for the last."""
    edges, held = [0], 0
    for index in range(1, len(blocks)):
        held += int(counts[index - 1])
        if blocks[index] != blocks[index - 1] and held >= least:
            edges.append(index)
            held = 0
    return [*edges, len(blocks)]

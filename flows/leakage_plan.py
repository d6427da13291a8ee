"""What a leakage gate will take, before it runs: counts, operations, memory, and time from short trials."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import faiss
import numpy as np

from flows.progress import clock_text
from flows.words import size_text
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.evaluation.leakage import (
    SAMPLE,
    Block,
    calibrate,
    nearest,
    search_bytes,
    search_operations,
)
from negfacediff_core.stages.aligned import SIZE
from negfacediff_core.stages.gallery import crop_images
from negfacediff_core.stages.gate import Gate
from negfacediff_core.stages.models import embedder_of
from negfacediff_core.stages.stored_gallery import KEPT, UNITS
from negfacediff_core.store.layout import StageSpec
from negfacediff_core.store.records import pending
from tasks.machine import usable_cores

# How much of each kind of work is tried: images, and a search of queries in a gallery.
_IMAGES, _QUERIES, _VECTORS = 4, 512, 16_384


class Row(NamedTuple):
    """One kind of work that is left: how many of what, operations of products, and seconds."""

    work: str
    left: str
    operations: int
    seconds: float


class Rates(NamedTuple):
    """Operations a second of one core, in a search and in the calibration of thresholds."""

    search: float
    calibration: float


class Estimate(NamedTuple):
    """The work that is left, the bytes that a process holds, and those that are added to the store."""

    rows: list[Row]
    memory: int
    disk: int


def estimate(gate: Gate, execution: ExecutionConfig) -> Estimate:
    """Estimate a gate's work on this machine, for the workers of `execution`.

    Trials take about a second each. The time of a search grows with queries times gallery and is nearly all
    products; images vary, so that their time is good to a factor of two.
    """
    gallery, found, counted = gate.stages.values()
    workers = execution.workers or usable_cores()
    people, widths = gallery.grid.limit or 0, [array.item[0] for array in gallery.arrays]
    images = _left(gallery) if gallery.config["kind"] == "images" else 0
    samples = _left(found)
    per_image, per_crop = _trial_images(gallery, found) if images or samples else (0.0, 0.0)
    rates = {width: _trial_search(width) for width in set(widths)}
    once = int(bool(pending(counted)))
    identities, sample = once * counted.config["identities"], once * min(SAMPLE, people)
    speeds = [rates[width].search for width in widths], [rates[width].calibration for width in widths]
    rows = [
        Row("gallery: detect, align, embed", f"{images:,} images", 0, images * per_image / workers),
        Row("generated: embed", f"{samples:,} images", 0, samples * per_crop / workers),
        _products("generated: search", samples, people, widths, speeds[0], min(workers, usable_cores())),
        _products("centres: search", identities, people, widths, speeds[0], 1),
        _products("thresholds: compare", sample, people, widths, speeds[1], 1),
    ]
    unit = found.grid.block_identities * found.grid.block_replicates
    held = min(people, UNITS * KEPT * gallery.grid.block_identities)
    memory = sum(search_bytes(unit * workers, held, width) for width in widths)
    return Estimate(rows, memory, 4 * sum(widths) * (_left(gallery) + samples))


def rows_of(estimated: Estimate) -> list[list[str]]:
    """Put an estimate into the cells of a table: work, left, operations, time."""
    return [[row.work, row.left, _operations(row.operations), _time(row.seconds)] for row in estimated.rows]


def memory_text(estimated: Estimate) -> str:
    """Say what a process holds and what the store gains."""
    memory, disk = size_text(estimated.memory), size_text(estimated.disk)
    return f"Memory of a process for the search: {memory}. Added to the store: about {disk}."


def _products(
    work: str, queries: int, people: int, widths: Sequence[int], speeds: Sequence[float], lanes: int
) -> Row:
    """A row of products, of the recognisers of these widths and operations a second."""
    operations = [search_operations(queries, people, width) for width in widths]
    seconds = sum(count / speed for count, speed in zip(operations, speeds, strict=True)) / lanes
    return Row(work, f"{queries:,} x {people:,}", sum(operations), seconds)


def _left(spec: StageSpec) -> int:
    """Rows of the units that are not committed."""
    return sum(
        len(spec.grid.identities_of(unit)) * len(spec.grid.replicates_of(unit)) for unit in pending(spec)
    )


def _trial_images(gallery: StageSpec, found: StageSpec) -> tuple[float, float]:
    """Seconds of one core for a gallery image and for a generated crop, all recognisers together."""
    blank = np.zeros((_IMAGES, SIZE, SIZE, 3), np.uint8)
    embedders = [embedder_of(weight, threads=1) for weight in found.weights.values()]
    for embedder in embedders:
        embedder.embed(blank[:1])
    begun = time.perf_counter()
    for embedder in embedders:
        embedder.embed(blank)
    per_crop = (time.perf_counter() - begun) / _IMAGES
    if gallery.config["kind"] != "images":
        return 0.0, per_crop
    numbers = np.arange(min(_IMAGES, gallery.grid.limit or 0))
    begun = time.perf_counter()
    crop_images(gallery, numbers, threads=1)
    return (time.perf_counter() - begun) / len(numbers) + per_crop, per_crop


def _trial_search(width: int) -> Rates:
    """Search and calibrate among random unit vectors on one core."""
    random = np.random.default_rng(0)
    vectors = random.standard_normal((_VECTORS, width), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    gallery = [Block.of(np.arange(_VECTORS), vectors)]
    operations = search_operations(_QUERIES, _VECTORS, width)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        nearest(vectors[:32], gallery)
        begun = time.perf_counter()
        nearest(vectors[:_QUERIES], gallery)
        searched = time.perf_counter()
        calibrate(gallery, np.arange(_VECTORS), sample=_QUERIES)
        return Rates(operations / (searched - begun), operations / (time.perf_counter() - searched))
    finally:
        faiss.omp_set_num_threads(threads)


def _operations(count: int) -> str:
    return f"{count:.2g}" if count else ""


def _time(seconds: float) -> str:
    return "under 1 s" if seconds < 1 else clock_text(seconds)

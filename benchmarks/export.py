"""Exporting a run, against encoding the same images alone, in processor time and by the clock.

    OMP_NUM_THREADS=1 python benchmarks/export.py

An export reads the store, chooses, encodes, writes, and reads everything back for its checksums; the plain
form encodes images that are in memory already, with Pillow. The target is 70% of its rate. The floor is the
same with the export's own encoder, which for JPEG is another than Pillow's.
"""

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measure import best_seconds, machine, write_results
from numpy.typing import NDArray
from PIL import Image

from flows.export import checked_files, write_pieces
from negfacediff_core.export.draft import draft
from negfacediff_core.export.formats import FORMATS
from negfacediff_core.export.images import ENCODERS, PNG_LEVEL
from negfacediff_core.export.selection import select
from negfacediff_core.export.settings import ExportConfig
from negfacediff_core.stages import aligned, embeddings, samples
from negfacediff_core.stages.exported import Job, job_of, usable_images
from negfacediff_core.store.layout import ArraySpec, Grid, StageSpec
from negfacediff_core.store.shards import commit, prepare
from negfacediff_core.store.tables import rows_of
from tasks.machine import usable_cores

TARGET, ROUNDS = 0.7, 3
BLOCK, IMAGES = 8, 50
# By the clock processes must begin first, for some seconds: a set that takes several times as long.
CLOCK_IDENTITIES = 400
ENCODED: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": PNG_LEVEL},
    "jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}


def faces(count: int) -> NDArray[np.uint8]:
    """Smooth pictures with a little noise `(count, 112, 112, 3)`: what encoders take as long for as faces."""
    random = np.random.default_rng(0)
    coarse = random.uniform(0, 255, (count, 8, 8, 3)).astype(np.uint8)
    smooth = [np.asarray(Image.fromarray(one).resize((112, 112), Image.Resampling.BICUBIC)) for one in coarse]
    noisy = np.stack(smooth) + random.normal(0, 1.5, (count, 112, 112, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def make_store(store: Path, identities: int) -> dict[str, StageSpec]:
    """A run of `identities` x 50 crops, without anything that made them."""
    grid = Grid(identities, IMAGES, BLOCK, IMAGES)
    crops = faces(BLOCK * IMAGES).reshape(BLOCK, IMAGES, 112, 112, 3)
    stages: dict[str, StageSpec] = {}
    for name, module in (("samples", samples), ("aligned", aligned), ("embeddings", embeddings)):
        held = (ArraySpec("image", "u1", (112, 112, 3)),) if name == "aligned" else ()
        spec = StageSpec(str(store), name, 1, {}, {}, grid, arrays=held, columns=module.COLUMNS)
        prepare(spec)
        for unit in grid.units():
            place = np.meshgrid(grid.identities_of(unit), range(IMAGES), indexing="ij")
            columns = {field: [None] * BLOCK * IMAGES for field, _ in spec.columns}
            columns |= {"identity": place[0].ravel(), "replicate": place[1].ravel()}
            columns |= {field: np.ones(BLOCK * IMAGES) for field in {"score", "norm"} & columns.keys()}
            columns["status"] = ["ok"] * BLOCK * IMAGES
            arrays = {"image": np.roll(crops, unit.identity_block, axis=2)} if held else {}
            rows = rows_of(spec, columns)
            commit(spec, unit, arrays=arrays, rows=rows, started=time.time(), seconds={}, device="cpu")
        stages[name] = spec
    return stages


def export(stages: dict[str, StageSpec], settings: ExportConfig, out: Path, workers: int) -> Job:
    """All of an export but its pages."""
    usable = usable_images(stages, settings, lambda done, total: None)
    job = job_of(stages, settings, select(usable, 1, 0, 0))
    with draft(out, job.plan) as begun:
        write_pieces(job, begun, workers)
        checked_files(job, begun)
        begun.finish()
    return job


def encode(images: NDArray[np.uint8], encoding: str) -> int:
    """The plain form: encode images that are in memory, and drop the bytes."""
    size = 0
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, **ENCODED[encoding])
        size += len(file.getvalue())
    return size


def encode_as_here(images: NDArray[np.uint8], encoding: str) -> int:
    """The same with the encoder of the export."""
    return sum(len(ENCODERS[encoding](image, 95)) for image in images)


def encode_blocks(encoding: str, blocks: int) -> None:
    """The plain form on one core, as often as a process is asked to."""
    images = faces(BLOCK * IMAGES)
    for _ in range(blocks):
        encode(images, encoding)


def clock_seconds(work: Callable[[], Any]) -> float:
    """Seconds that a call takes by the clock."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> int:
    """Run and print everything; write `results/export.json`; return how many targets are missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--identities", type=int, default=40, help="Identities of 50 images each.")
    parser.add_argument(
        "--clock", action="store_true", help="All cores by the clock, too: on an idle machine."
    )
    asked = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "rows": [], "clock": []}
    missed, cores = 0, usable_cores()
    with tempfile.TemporaryDirectory() as folder:
        stages = make_store(Path(folder) / "store", asked.identities)
        clocked = make_store(Path(folder) / "clocked", CLOCK_IDENTITIES) if asked.clock else {}
        count = asked.identities * IMAGES
        print(f"{count:,} images, load average {results['machine']['load_average']}; processor time an image")
        print("encoding  format          plain    floor     here  rate of plain")
        images = faces(BLOCK * IMAGES)
        for encoding in ENCODED:
            for form in FORMATS:
                settings = ExportConfig(format=form, encoding=encoding)
                rounds = []
                for turn in range(ROUNDS):  # by turns, as other work on the machine comes and goes
                    out = Path(folder) / f"{encoding}-{form}-{turn}"
                    plain = best_seconds(partial(encode, images, encoding), 2) / len(images)
                    floor = best_seconds(partial(encode_as_here, images, encoding), 2) / len(images)
                    here = best_seconds(partial(export, stages, settings, out, 1), 1) / count
                    rounds.append((plain, floor, here))
                plain, floor, here = (min(times) for times in zip(*rounds, strict=True))
                met = plain / here >= TARGET
                missed += not met
                times = {"plain_us": 1e6 * plain, "floor_us": 1e6 * floor, "here_us": 1e6 * here}
                row = {"encoding": encoding, "format": form, **times}
                results["rows"].append({**row, "ratio": plain / here, "target": TARGET})
                shown = " ".join(f"{value:>6.0f} us" for value in times.values())
                verdict = "met" if met else "MISSED"
                print(f"{encoding:<9} {form:<12} {shown} {plain / here:>6.0%} ({verdict})")
            if asked.clock:
                results["clock"].append(by_the_clock(clocked, encoding, Path(folder), cores))
    print(f"{missed or 'no'} targets missed; written to {write_results('export', results)}")
    return missed


def by_the_clock(stages: dict[str, StageSpec], encoding: str, folder: Path, cores: int) -> dict[str, Any]:
    """Images a second on all cores, here (processes that begin included) and in the plain form."""
    blocks = CLOCK_IDENTITIES // BLOCK
    images, share = blocks * BLOCK * IMAGES, [-(-blocks // cores)] * cores
    rates: dict[str, Any] = {}
    with ProcessPoolExecutor(cores) as pool:
        list(pool.map(encode_blocks, [encoding] * cores, [0] * cores))
        for form in FORMATS:  # each beside the plain form, as other work on the machine comes and goes
            plain = clock_seconds(lambda: list(pool.map(encode_blocks, [encoding] * cores, share)))
            settings, out = ExportConfig(format=form, encoding=encoding), folder / f"{encoding}-{form}-clock"
            here = clock_seconds(partial(export, stages, settings, out, cores))
            rates[form] = {"plain": sum(share) * BLOCK * IMAGES / plain, "here": images / here}
    print(f"{encoding}, {images:,} images on {cores} cores by the clock, images/s:")
    for form, rate in rates.items():
        share_of_plain = rate["here"] / rate["plain"]
        print(f"  {form:<12} {rate['here']:,.0f}, plain {rate['plain']:,.0f}: {share_of_plain:.0%}")
    return {"encoding": encoding, "cores": cores, "rates": rates}


if __name__ == "__main__":
    sys.exit(1 if main() else 0)

"""The flow `verify_recogniser`: recognisers on verification sets, as tables like those of papers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, Literal

import torch
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from pydantic import Field
from rich.console import Console

from flows.artifacts import key_of, progress_artifacts
from flows.progress import Meter, show_progress
from flows.results import json_bytes
from flows.words import count_text
from negfacediff_core.errors import ConfigError
from negfacediff_core.faces.embed import Embedder
from negfacediff_core.recognition.embedding import Embedding, check_size
from negfacediff_core.recognition.ijbc import TemplateSet
from negfacediff_core.recognition.pair_sets import PairSet
from negfacediff_core.recognition.recogniser_files import open_recognisers
from negfacediff_core.recognition.verification_sets import open_sets
from negfacediff_core.recognition.verification_tables import markdown, plain_text
from negfacediff_core.recognition.verify import verify_all
from negfacediff_core.store.location import Location, locate
from tasks.machine import usable_cores

STAGE = "verify"


@flow(name="verify-recogniser", flow_run_name="verify {out}")
def verify_recogniser(
    recognisers: list[str],
    sets: list[str],
    out: str = "verification",
    flip: bool = True,
    detector_scores: bool = True,
    draws: Annotated[int, Field(ge=0, le=100_000)] = 1000,
    batch: Annotated[int, Field(ge=1, le=4096)] = 32,
    threads: Annotated[int, Field(ge=0, le=1024)] = 0,
    device: Literal["cpu", "cuda"] = "cpu",
) -> dict[str, Any]:
    """Verify recognisers on sets of pairs (ten-fold accuracy) and of templates (TAR at FAR).

    Everything but the images' pixels is checked before anything is embedded. The tables are written to `out`
    as they grow. Returns what `results.json` there holds.

    Args:
        recognisers: Paths of recognisers (pack folder, .onnx, or weights of an iResNet); after a path,
            divided by commas, name=..., colour=BGR, pixels=0..1. Others are compared with the first.
        sets: Paths of verification sets (.bin, pair list, IJB-C's folder, or a folder of .bin sets); after a
            path, divided by commas, name=..., images=FOLDER.
        out: Folder or fsspec URL for the tables and figures.
        flip: Add the embedding of the mirror image, the usual form.
        detector_scores: Weigh the images of an IJB-C template by the detector's scores of their faces.
        draws: Resamples of the pairs for the intervals. Allowed: 0 (no intervals) to 100000.
        batch: Images that a network takes at a time; ONNX networks take at most 32. Allowed: 1 to 4096.
        threads: Batches that are at work at a time. Allowed: 0 (a core each) to 1024.
        device: Where networks run. Allowed: cpu, cuda.
    """
    tested = open_sets(sets)
    embedders = open_recognisers(recognisers, device)
    check_all(tested, embedders)
    folder = locate(out)
    folder.check_writable()  # makes it where it is not there
    results: dict[str, Any] = {
        "recognisers": [_about(name, embedder) for name, embedder in embedders.items()],
        "sets": {one.name: _describe(one) for one in tested},
        "flip": flip,
        "detector_scores": detector_scores,
        "draws": draws,
        "figures": {name: {} for name in embedders},
        "differences": {},
    }
    side_by_side = threads or usable_cores()
    how = {name: Embedding(one, flip, batch, side_by_side) for name, one in embedders.items()}
    title = f"Verifying {count_text(len(how), 'recogniser')} on {count_text(len(tested), 'set')}"
    images = len(how) * sum(len(one.crops) for one in tested)
    with _one_thread_a_network(), _shown(title, images) as committed:
        for outcome in verify_all(tested, how, committed, draws, detector_scores):
            results["figures"][outcome.recogniser][outcome.tested] = outcome.figures
            if outcome.differences:
                by_set = results["differences"].setdefault(outcome.recogniser, {})
                by_set[outcome.tested] = outcome.differences
            _write(folder, results)
    text = f"{markdown(results)}\nFigures: `{folder.url}/results.json`"
    create_markdown_artifact(text, key_of("verify-recogniser"), title)
    return results


def check_all(tested: Sequence[PairSet | TemplateSet], embedders: Mapping[str, Embedder]) -> None:
    """Raise ConfigError where there is no set, NegFaceDiffError where a recogniser takes other crops."""
    if not tested:
        raise ConfigError("no verification set is given: name a .bin, a pair list, or a folder")
    for one in tested:
        for embedder in embedders.values():
            check_size(one.crops, embedder, one.name)


@contextmanager
def _shown(title: str, images: int) -> Iterator[Callable[[int], None]]:
    """Show progress on the console and in Prefect; what is yielded is told of images that were embedded."""
    meter = Meter(STAGE, "images", images)
    with (
        progress_artifacts("verify-recogniser", [meter]),
        show_progress(title, [meter], Console()) as reporter,
    ):
        reporter.started(STAGE)
        yield partial(reporter.committed, STAGE)


@contextmanager
def _one_thread_a_network() -> Iterator[None]:
    """Batches are at work side by side: each with a thread of its own inside torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _about(name: str, embedder: Embedder) -> dict[str, Any]:
    return {
        "name": name,
        "weights": str(embedder.weights),
        "sha256": embedder.sha256,
        "colour": embedder.colour_order,
        "width": embedder.width,
    }


def _describe(tested: PairSet | TemplateSet) -> dict[str, Any]:
    return {
        "kind": "templates" if isinstance(tested, TemplateSet) else "pairs",
        "images": len(tested.crops),
        "pairs": len(tested.same),
        "genuine": int(tested.same.sum()),
    }


def _write(folder: Location, results: Mapping[str, Any]) -> None:
    folder.write_atomic("results.json", json_bytes(results))
    folder.write_atomic("table.md", markdown(results).encode())
    folder.write_atomic("table.txt", plain_text(results).encode())

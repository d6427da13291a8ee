"""The flow `verify_recogniser`: recognisers on verification sets, as tables like those of papers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

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
from negfacediff_core.faces.detect import load_detector
from negfacediff_core.faces.embed import Embedder
from negfacediff_core.recognition.embedding import Embedding, check_size
from negfacediff_core.recognition.frcsyn import (
    check_datasets,
    choose_threshold,
    score_file,
    systems,
    threshold_pairs,
)
from negfacediff_core.recognition.ijbc import TemplateSet
from negfacediff_core.recognition.pair_sets import ComparisonList, PairSet
from negfacediff_core.recognition.recogniser_files import open_recognisers
from negfacediff_core.recognition.verification_sets import VerificationSet, open_sets
from negfacediff_core.recognition.verification_tables import markdown, plain_text
from negfacediff_core.recognition.verify import Outcome, verify_all
from negfacediff_core.store.location import Location, locate
from tasks.machine import usable_cores

STAGE = "verify"
#: Below the folder of the tables, the score files of FRCSyn.
FRCSYN = "frcsyn"


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
    detector: str = "",
    detector_size: Annotated[int, Field(ge=32, le=1280, multiple_of=32)] = 128,
    frcsyn: str = "",
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
        detector: Model pack with a detector: pairs of images that are no crops of 112x112 are aligned by it.
            Empty: they are refused.
        detector_size: Side of the detector's input, in pixels. Allowed: 32 to 1280 in steps of 32.
        frcsyn: Set of pairs of the training data: score files for the challenge FRCSyn are written to `out`
            as well, with decisions by the threshold that judges these pairs best. Of two recognisers the
            first is the baseline. Empty: no score files.
    """
    opened = open_all(recognisers, sets, device, detector, detector_size, frcsyn)
    tested, embedders = opened.tested, opened.embedders
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
        "faceless": {},
    }
    side_by_side = threads or usable_cores()
    how = {name: Embedding(one, flip, batch, side_by_side) for name, one in embedders.items()}
    title = f"Verifying {count_text(len(how), 'recogniser')} on {count_text(len(tested), 'set')}"
    images = len(how) * sum(len(one.crops) for one in opened.all_sets)
    with _one_thread_a_network(), _shown(title, images) as committed:
        if opened.training is not None:
            results["frcsyn"] = _frcsyn(opened.training, how, committed)
        for outcome in verify_all(tested, how, committed, draws, detector_scores):
            _note(outcome, results)
            results["faceless"] = _faceless(opened.all_sets)
            if opened.training is not None:
                _write_scores(folder, outcome, results["frcsyn"])
            _write(folder, results)
    text = f"{markdown(results)}\nFigures: `{folder.url}/results.json`"
    create_markdown_artifact(text, key_of("verify-recogniser"), title)
    return results


class Opened(NamedTuple):
    """What a verification works on; `training` are the pairs that FRCSyn's threshold is chosen on."""

    tested: list[VerificationSet]
    embedders: dict[str, Embedder]
    training: PairSet | None

    @property
    def all_sets(self) -> list[VerificationSet]:
        """The sets, and the pairs of the threshold."""
        return [*self.tested, *([] if self.training is None else [self.training])]


def open_all(
    recognisers: list[str], sets: list[str], device: str, detector: str, detector_size: int, frcsyn: str
) -> Opened:
    """Open what `verify_recogniser` is given, and check all of it but the pixels.

    Raises ConfigError where there is no set, or score files cannot be made of one; NegFaceDiffError where a
    recogniser takes other crops, and as `open_sets`, `open_recognisers` and `load_detector`.
    """
    finder = load_detector(detector, detector_size) if detector else None
    tested, embedders = open_sets(sets, finder), open_recognisers(recognisers, device)
    training = threshold_pairs(open_sets([frcsyn], finder)) if frcsyn else None
    opened = Opened(tested, embedders, training)
    if not tested:
        raise ConfigError("no verification set is given: name a .bin, a pair list, or a folder")
    if training is not None:
        systems(list(embedders))
        check_datasets(tested)
    elif (unlabelled := next((one for one in tested if isinstance(one, ComparisonList)), None)) is not None:
        raise ConfigError(
            f"{unlabelled.name} does not say which pairs are genuine: verification takes path1,path2,same; "
            "FRCSyn's score files alone (--frcsyn) can be made without"
        )
    for one in opened.all_sets:
        for embedder in embedders.values():
            check_size(one.crops, embedder, one.name)
    return opened


def _frcsyn(
    training: PairSet, how: Mapping[str, Embedding], committed: Callable[[int], None]
) -> dict[str, Any]:
    """Which system each recogniser is, and the threshold of its decisions."""
    return {
        "systems": systems(list(how)),
        "threshold_pairs": training.name,
        "thresholds": {name: choose_threshold(training, one, committed) for name, one in how.items()},
    }


def _note(outcome: Outcome, results: dict[str, Any]) -> None:
    """Put the figures of a set by a recogniser in their place; comparisons without labels have none."""
    if outcome.figures:
        results["figures"][outcome.recogniser][outcome.tested] = outcome.figures
    if outcome.differences:
        results["differences"].setdefault(outcome.recogniser, {})[outcome.tested] = outcome.differences


def _faceless(sets: Sequence[VerificationSet]) -> dict[str, Any]:
    """By set, in how many of how many images a detector has found no face, where there are such."""
    return {
        one.name: {"faceless": len(one.crops.faceless), "images": len(one.crops)}
        for one in sets
        if one.crops.faceless
    }


def _write_scores(folder: Location, outcome: Outcome, frcsyn: Mapping[str, Any]) -> None:
    system, threshold = (frcsyn[key][outcome.recogniser] for key in ("systems", "thresholds"))
    content = score_file(outcome.cosines, threshold)
    folder.write_atomic(f"{FRCSYN}/{outcome.tested}/{system}.txt", content)


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


def _describe(tested: VerificationSet) -> dict[str, Any]:
    counts = {"images": len(tested.crops), "pairs": len(tested.pairs)}
    if isinstance(tested, ComparisonList):
        return {"kind": "comparisons", **counts}
    kind = "templates" if isinstance(tested, TemplateSet) else "pairs"
    return {"kind": kind, **counts, "genuine": int(tested.same.sum())}


def _write(folder: Location, results: Mapping[str, Any]) -> None:
    folder.write_atomic("results.json", json_bytes(results))
    folder.write_atomic("table.md", markdown(results).encode())
    folder.write_atomic("table.txt", plain_text(results).encode())

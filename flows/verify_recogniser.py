"""The flow `verify_recogniser`: recognisers on verification sets, as tables like those of papers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Annotated, Any, Literal, NamedTuple

import torch
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from pydantic import Field
from rich.console import Console

from flows.artifacts import key_of, progress_artifacts
from flows.progress import Meter, show_progress
from flows.results import json_bytes
from flows.verified_before import RESULTS, settings_of, take_over
from flows.words import count_text, names_text
from negfacediff_core.errors import ConfigError
from negfacediff_core.faces.detect import Detector, load_detector
from negfacediff_core.faces.embed import Embedder
from negfacediff_core.recognition.embedding import Embedding, check_size
from negfacediff_core.recognition.frcsyn import (
    check_datasets,
    choose_threshold,
    score_file,
    score_path,
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


class Opened(NamedTuple):
    """What a verification works on; `training` are the pairs that FRCSyn's threshold is chosen on."""

    tested: list[VerificationSet]
    embedders: dict[str, Embedder]
    training: PairSet | None
    detector: Detector | None

    @property
    def all_sets(self) -> list[VerificationSet]:
        """The sets, and the pairs of the threshold."""
        return [*self.tested, *([] if self.training is None else [self.training])]


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
    as they grow; a set whose figures lie there, of the same settings, is not verified again. Returns what
    `results.json` there holds.

    Args:
        recognisers: Paths of recognisers (pack folder, .onnx, or weights of an iResNet); after a path,
            divided by commas, name=..., colour=BGR, pixels=0..1, torchscript=yes (its code runs). Others are
            compared with the first.
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
    opened = open_once(tuple(recognisers), tuple(sets), device, detector, detector_size, frcsyn)
    open_once.cache_clear()  # whoever verifies next in this process opens what is there then
    tested, embedders = opened.tested, opened.embedders
    folder = locate(out)
    folder.check_writable()  # makes it where it is not there
    how = {"flip": flip, "detector_scores": detector_scores, "draws": draws}
    results: dict[str, Any] = {
        "recognisers": [_about(name, embedder) for name, embedder in embedders.items()],
        "sets": {one.name: _describe(one) for one in tested},
        **how,
        "figures": {name: {} for name in embedders},
        "differences": {},
        "faceless": {},
        "settings": settings_of(embedders, how, opened.detector, opened.training),
        "done": {},
    }
    take_over(folder, results, tested)
    if results["done"]:
        taken = names_text(list(results["done"]))
        print(f"From {folder.url}/{RESULTS}, as nothing they depend on has changed: {taken}")
    _verify(opened, results, folder, batch, threads or usable_cores())
    title = _title(opened)
    text = f"{markdown(results)}\nFigures: `{folder.url}/{RESULTS}`"
    create_markdown_artifact(text, key_of("verify-recogniser"), title)
    return results


def _verify(opened: Opened, results: dict[str, Any], folder: Location, batch: int, threads: int) -> None:
    """Add to the results, and write, what they lack."""
    draws, weigh, flip = (results[key] for key in ("draws", "detector_scores", "flip"))
    how = {name: Embedding(one, flip, batch, threads) for name, one in opened.embedders.items()}
    left = [one for one in opened.tested if one.name not in results["done"]]
    digests = {one.name: one.digest for one in left}
    training = opened.training if "frcsyn" not in results else None
    images, ahead = (
        len(how) * sum(len(one.crops) for one in sets)
        for sets in (opened.all_sets, [*left, *([] if training is None else [training])])
    )
    with _one_thread_a_network(), _shown(_title(opened), images, images - ahead) as committed:
        if training is not None:
            results["frcsyn"] = _frcsyn(training, how, committed)
        for outcome in verify_all(left, how, committed, draws, weigh):
            _note(outcome, results)
            results["faceless"] |= _faceless(opened.all_sets)
            if "frcsyn" in results:
                _write_scores(folder, outcome, results["frcsyn"])
            if outcome.recogniser == list(how)[-1] and digests[outcome.tested]:
                results["done"][outcome.tested] = digests[outcome.tested]
            _write(folder, results)
    _write(folder, results)


def _title(opened: Opened) -> str:
    recognisers, sets = count_text(len(opened.embedders), "recogniser"), count_text(len(opened.tested), "set")
    return f"Verifying {recognisers} on {sets}"


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
    opened = Opened(tested, embedders, training, finder)
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


@lru_cache(maxsize=1)
def open_once(
    recognisers: tuple[str, ...],
    sets: tuple[str, ...],
    device: str,
    detector: str,
    detector_size: int,
    frcsyn: str,
) -> Opened:
    """As `open_all`; the flow takes what the command of the same process has opened to check it."""
    return open_all(list(recognisers), list(sets), device, detector, detector_size, frcsyn)


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
    folder.write_atomic(score_path(outcome.tested, system), content)


@contextmanager
def _shown(title: str, images: int, before: int) -> Iterator[Callable[[int], None]]:
    """Show progress on the console and in Prefect; what is yielded is told of images that were embedded.

    An earlier run has embedded so many of them `before`.
    """
    meter = Meter(STAGE, "images", images, before)
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
    folder.write_atomic(RESULTS, json_bytes(results))
    folder.write_atomic("table.md", markdown(results).encode())
    folder.write_atomic("table.txt", plain_text(results).encode())

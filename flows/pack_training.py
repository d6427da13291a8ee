"""How each network of the demo pack is trained, exported to the pack and noted for its card."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.pack_card import record_training
from flows.pack_data import renders_of, training_set_of
from flows.progress import CallbackBar
from negfacediff_core.contexts import fitted, load_contexts, load_identities, normalise, uniform
from negfacediff_core.diffusion.train import GeneratorTraining, export_generator, train_generator
from negfacediff_core.diffusion.train_first_stage import (
    FirstStageTraining,
    load_first_stage,
    train_first_stage,
)
from negfacediff_core.diffusion.training import CHECKPOINT_NAME
from negfacediff_core.faces.embed import load_embedder
from negfacediff_core.faces.train_detector import CHECKPOINT as DETECTOR_CHECKPOINT
from negfacediff_core.faces.train_detector import DetectorSettings, export_detector, train_detector
from negfacediff_core.recognition.demo import DEMO_NETWORKS
from negfacediff_core.recognition.export import export_recogniser
from negfacediff_core.recognition.projection import narrow
from negfacediff_core.recognition.train import CHECKPOINT_NAME as RECOGNISER_CHECKPOINT
from negfacediff_core.recognition.train import train_recogniser

Figures = dict[str, Any]
# The folder of the pack that holds the recogniser, beside the detector, and the judge, in a pack of its own.
PLACES = {"recogniser": "faces", "judge": "judge"}


def train_network(network: str, work: Path, out: Path, steps: int) -> Figures:
    """Train `network`, a row of `TRAININGS`, in WORK/<network>, export it to the pack `out`, note it there.

    Starts from the render sets in `work`, or from the last checkpoint; `steps` 0 takes those of the shipped
    pack. Returns the figures of the trained network.
    """
    run, checkpoint = TRAININGS[network]
    figures = run(work, out, steps)
    record_training(out, network, work / network / checkpoint, figures)
    return figures


def _train_recogniser(network: str) -> Callable[[Path, Path, int], Figures]:
    def run(work: Path, out: Path, steps: int) -> Figures:
        demo, folder, renders = DEMO_NETWORKS[network], work / network, renders_of(work, "train")
        settings = _with_steps(demo.settings, steps)
        with CallbackBar(network, "steps") as progress:
            figures = train_recogniser(renders, demo.architecture, settings, folder, progress)
        checkpoint, projection = folder / RECOGNISER_CHECKPOINT, None
        if demo.projection:
            projection, narrowed = narrow(checkpoint, renders, demo.projection, settings.held_out)
            figures |= {f"narrowed_{key}": value for key, value in narrowed.items()}
        export_recogniser(checkpoint, out / PLACES[network] / f"{network}.onnx", projection)
        return figures

    return run


def _train_detector(work: Path, out: Path, steps: int) -> Figures:
    sets = {"frames": renders_of(work, "detector"), "crops": renders_of(work, "train")}
    folder = work / "detector"
    with CallbackBar("detector", "steps") as progress:
        figures = train_detector(sets, folder, _with_steps(DetectorSettings(), steps), progress=progress)
    export_detector(folder / DETECTOR_CHECKPOINT, out / "faces" / "detector.onnx")
    return dict(figures)


def _train_first_stage(work: Path, out: Path, steps: int) -> Figures:
    images, held_out = (_flat(renders_of(work, name).images) for name in ("train", "heldout"))
    with CallbackBar("first-stage", "steps") as progress:
        return dict(
            train_first_stage(
                images,
                held_out,
                work / "first-stage",
                _with_steps(FirstStageTraining(), steps),
                progress=progress,
            )
        )


def _train_generator(work: Path, out: Path, steps: int) -> Figures:
    _, decoder, _ = load_first_stage(work / "first-stage")
    sets = {name: training_set_of(work, out, name) for name in ("train", "heldout")}
    with CallbackBar("generator", "steps") as progress:
        figures = train_generator(
            sets["train"],
            sets["heldout"],
            decoder,
            _pictured(out / "contexts"),
            work / "generator",
            _with_steps(GeneratorTraining(), steps),
            progress=progress,
        )
    conditioner = load_embedder(out / "faces").sha256
    export_generator(work / "generator", work / "first-stage", out / "generator", conditioner)
    return dict(figures)


# How a network is trained, and the file in WORK/<network> that holds its settings and loss curve.
TRAININGS: dict[str, tuple[Callable[[Path, Path, int], Figures], str]] = {
    "recogniser": (_train_recogniser("recogniser"), RECOGNISER_CHECKPOINT),
    "judge": (_train_recogniser("judge"), RECOGNISER_CHECKPOINT),
    "detector": (_train_detector, DETECTOR_CHECKPOINT),
    "first-stage": (_train_first_stage, CHECKPOINT_NAME),
    "generator": (_train_generator, CHECKPOINT_NAME),
}


def _pictured(folder: Path) -> dict[str, NDArray[np.float32]]:
    """Four contexts of each source, for the sample pictures."""
    known, numbers = load_contexts(folder / "heldout.npz").contexts, np.arange(4)
    mean, covariance, _ = load_identities(folder / "reference.npz")
    return {
        "file": normalise(known[numbers]),
        "fitted": fitted(0, numbers, mean, covariance),
        "uniform": uniform(0, numbers, known.shape[1]),
    }


def _flat(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Render-set images `(N, K, S, S, 3)` as one list of images `(N * K, S, S, 3)`."""
    return images.reshape(-1, *images.shape[2:])


def _with_steps(settings: Any, steps: int) -> Any:
    """Training settings with another number of steps, or as they are for 0."""
    return dataclasses.replace(settings, steps=steps) if steps else settings

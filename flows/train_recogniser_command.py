"""`negfacediff train-recogniser`, `prune`, `onnx` and `study-recognition`: what comes after a dataset."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flows.command import DEFAULTS, Verbose, check, print_places, show_log, with_execution
from flows.words import count_text
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import ConfigError
from negfacediff_core.recognition.recipe import TrainingExecution

_HELP = {name: field.description for name, field in TrainingExecution.model_fields.items()}


class Pruning(StrEnum):
    """By which rule images are left out."""

    dynunc = "dynunc"
    diffprob = "diffprob"
    none = "none"


def train_recogniser(
    source: Annotated[
        str,
        typer.Argument(
            help="A store (with RUN), or a folder: an export, one with train.rec, or one with a sub-folder "
            "of aligned 112x112 crops an identity."
        ),
    ],
    run: Annotated[str, typer.Argument(help="Name of a run of the store.")] = "",
    out: Annotated[str, typer.Option(help="Folder of the training.")] = "recogniser",
    recipe: Annotated[
        str, typer.Option(help="A recipe (paper, paper-plateau, small) or a YAML file.")
    ] = "paper",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Change one field of it; may be repeated (see negfacediff fields recogniser).",
        ),
    ] = None,
    filter_: Annotated[
        str, typer.Option("--filter", metavar="FILE", help="Take the images that negfacediff prune has kept.")
    ] = "",
    cache: Annotated[
        str,
        typer.Option(help="Folder for crops that must be packed, which trainings can share. Empty: --out."),
    ] = "",
    device: Annotated[str, typer.Option(help=_HELP["device"])] = "auto",
    processes: Annotated[int, typer.Option(help=_HELP["processes"])] = 1,
    loaders: Annotated[int, typer.Option(help=_HELP["loaders"])] = 0,
    threads: Annotated[int, typer.Option(help=_HELP["threads"])] = 0,
    checkpoint_seconds: Annotated[float, typer.Option(help=_HELP["checkpoint_seconds"])] = 120.0,
    verbose: Verbose = False,
) -> None:
    """Train a recogniser on a run, an export or a folder, and write it as ONNX.

    Running the same command again goes on where it stopped. The best epoch is chosen on identities of the set
    that are held out, never on a test set.
    """
    from flows.recipes import check_training_execution, load_recipe

    settings = load_recipe(recipe, set_ or [])
    execution = check_training_execution(
        {
            "device": device,
            "processes": processes,
            "loaders": loaders,
            "threads": threads,
            "checkpoint_seconds": checkpoint_seconds,
        }
    )
    _check_source(source, run, out)
    show_log(verbose)
    from flows.launch import launch
    from flows.train_recogniser import train_recogniser as train_flow

    place = {"store": source, "run": run} if run else {"folder": source}
    result = launch(
        train_flow,
        after_interrupt=f"The training in {out} is kept; the same command goes on with it:",
        out=out,
        recipe=settings,
        filter=filter_,
        execution=execution,
        cache=cache,
        **place,
    )
    print(
        f"\nBest epoch {result['epoch']:g} of {result['epochs']}: EER {result['eer']:.2%}, FDR "
        f"{result['fdr']:.2f} on {result['held_out_identities']:,} held-out identities."
    )
    print_places(pack=result["pack"], sdfr=result["sdfr"], curves=f"{out}/curves.csv, {out}/curves.svg")


def prune(
    training: Annotated[Path, typer.Argument(help="Folder of a training, as train-recogniser leaves it.")],
    out: Annotated[Path, typer.Option(help="File of the images that are kept.")] = Path("kept.csv"),
    rule: Annotated[
        Pruning,
        typer.Option(
            help="dynunc: keep the images whose probability moves most from epoch to epoch. diffprob: of "
            "each identity, leave out images that are as probable as another. none: with --clean, only that."
        ),
    ] = Pruning.dynunc,
    share: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Of dynunc: share of each identity's images to keep.")
    ] = 0.75,
    apart: Annotated[
        float, typer.Option(help="Of diffprob: least difference of two probabilities, above 0 and below 1.")
    ] = 0.05,
    clean: Annotated[
        bool,
        typer.Option(
            help="Leave out images that the trained network takes for another identity. For photographs: "
            "labels of generated images are right by construction."
        ),
    ] = False,
) -> None:
    """Choose images by how a training went: export and train-recogniser take the file with --filter.

    Identities that were held out from the training are kept whole.
    """
    from negfacediff_core.recognition.pruning import prune_training
    from negfacediff_core.tensor_files import replacing

    kept = prune_training(training, rule, share, apart, clean)
    with replacing(out) as file:
        file.write(kept.text.encode())
    print(
        f"{kept.images:,} of {count_text(kept.trained, 'image')} kept, of {kept.identities - kept.lost:,} of "
        f"{kept.identities:,} identities; and {count_text(kept.held_out, 'image')} that were held out."
    )
    if kept.mislabelled is not None:
        print(
            f"To the trained network {count_text(kept.mislabelled, 'image')} "
            f"({kept.mislabelled / kept.trained:.1%}) look like another identity: "
            + ("left out." if clean else "--clean leaves them out.")
        )
    elif kept.epochs < kept.planned:
        print(
            f"The training is not over: this is what its first {kept.epochs} of {kept.planned} epochs say.",
            file=sys.stderr,
        )
    print_places(filter=str(out))


def onnx(
    weights: Annotated[
        Path,
        typer.Argument(
            help="Folder of a training, or weights of an iResNet (.pt, .pth, .safetensors) of ElasticFace or "
            "insightface."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the subfolders pack and sdfr.")],
) -> None:
    """Write a recogniser as ONNX: a model pack for insightface, and the form of the challenge SDFR.

    The pack takes RGB scaled to -1 .. 1, as insightface does by itself; the form for SDFR takes RGB in 0 .. 1
    and scales it.
    """
    from negfacediff_core.recognition.export import export_forms
    from negfacediff_core.recognition.recogniser_files import load_network
    from negfacediff_core.recognition.training_job import BEST

    pack, sdfr = export_forms(load_network(weights / BEST if weights.is_dir() else weights), out)
    print_places(pack=str(pack.parent), sdfr=str(sdfr))


@with_execution("approve_above_hours")
def study_recognition(
    name: Annotated[str, typer.Argument(help="A study (negative) or a YAML file.")] = "negative",
    store: Annotated[str, typer.Option(help="Folder or fsspec URL that the builds are kept in.")] = "store",
    out: Annotated[str, typer.Option(help="Folder for trainings, table and figures.")] = "study",
    execution: ExecutionConfig = DEFAULTS,
    verbose: Verbose = False,
) -> None:
    """Train the same recogniser on datasets of equal size, and verify each on rendered people.

    Needs the extra render. Running the same command again goes on where it stopped; a line of the table is
    written as soon as it is known.
    """
    from flows.study import cases, check_study, load_study

    study = load_study(name)
    check_study(study)
    execution = check([case.build for case in cases(study)], store, execution)
    show_log(verbose)
    from flows.launch import launch
    from flows.study import study_recognition as study_flow
    from flows.study import table_of

    rows = launch(study_flow, study=study, store=store, out=out, execution=execution)
    print(f"\n{table_of(study, rows)}")
    print_places(table=f"{out}/table.md", figures=f"{out}/rows.json")


def _check_source(source: str, run: str, out: str) -> None:
    """Refuse what cannot be before Prefect starts."""
    if "://" in out:
        raise ConfigError(f"--out {out!r} is no local folder: a training keeps its state in one.")
    if not run:
        if not Path(source).is_dir():
            raise ConfigError(
                f"There is no folder {source}: give an export, a folder with train.rec, or one with a "
                "sub-folder of aligned crops an identity; of a store, the name of a run as well."
            )
        return
    from negfacediff_core.export.settings import ExportConfig
    from negfacediff_core.stages.exported import check_readable
    from negfacediff_core.store.runs import stages_of_run
    from negfacediff_core.store.status import check_store

    check_store(source)
    check_readable(stages_of_run(source, run), ExportConfig(), run)

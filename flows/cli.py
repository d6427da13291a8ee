"""The `negfacediff` command. Heavy imports stand inside the commands, so that help comes at once."""

import sys
from enum import StrEnum
from textwrap import TextWrapper
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flows.automations import automations
from flows.command import (
    DEFAULTS,
    Changes,
    Preset,
    Verbose,
    build_in,
    check,
    print_figures,
    print_places,
    show_log,
    with_execution,
)
from flows.contexts import contexts
from flows.export_command import export, verify_export
from flows.growing import evaluate, grow
from flows.leakage import leakage
from flows.pack import app as pack_app
from flows.plan import plan
from flows.serve import serve
from flows.store import COMMANDS
from flows.train_recogniser_command import onnx, prune, study_recognition, train_recogniser
from flows.verify_recogniser_command import verify_recogniser
from flows.weights import app as weights_app
from flows.whose import whose
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import BuildError, NegFaceDiffError

BAD_INPUT, BUILD_FAILED = 2, 1


class Configured(StrEnum):
    """What has fields."""

    build = "build"
    recogniser = "recogniser"


app = typer.Typer(
    name="negfacediff",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Build synthetic face-recognition training sets with identity-conditioned diffusion and negative "
    "contexts.\n\nStart with **negfacediff demo**: it builds two small datasets from the same "
    "contexts and noise, without and with a negative, and compares them.",
)


@app.command(
    epilog="Examples:\n\n"
    "negfacediff build demo --store out\n\n"
    "negfacediff build demo --set name=mine --set samples.w=0.3 --set negatives.rule=close\n\n"
    "negfacediff build my.yaml --store s3://bucket/faces --executor tcp://scheduler:8786"
)
@with_execution()
def build(
    preset: Preset,
    store: Annotated[
        str,
        typer.Option(
            help="Folder or fsspec URL that datasets are kept in; s3:// needs the extra s3: "
            "pip install 'negfacediff\\[s3]'."
        ),
    ] = "store",
    set_: Changes = None,
    execution: ExecutionConfig = DEFAULTS,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Approve it, however long it takes.")] = False,
    verbose: Verbose = False,
) -> None:
    """Build a dataset, or finish one: contexts, negatives, samples, aligned crops, embeddings, evaluation.

    Running the same command again goes on where it stopped: what is committed is never made twice. Another
    setting makes another dataset beside it, in the same store, and shares the stages that do not differ.
    """
    from flows.presets import load_build

    config = load_build(preset, set_ or [])
    if yes:
        execution = execution.model_copy(update={"approve_above_hours": 0.0})
    build_in(store, config, execution, verbose)


@app.command(epilog="Example: negfacediff demo --out demo --executor dask")
@with_execution("approve_above_hours")
def demo(
    out: Annotated[str, typer.Option(help="Folder for the store, the report and the pictures.")] = "demo",
    execution: ExecutionConfig = DEFAULTS,
    verbose: Verbose = False,
) -> None:
    """Build two small datasets from the same contexts and noise, w = 0 and w = 0.5, and compare them.

    Writes report.html, report.json, histogram.png and contact_sheet.png. Takes minutes on two CPU cores.
    """
    from flows.presets import demo_builds, demo_store

    execution = check(demo_builds(), demo_store(out), execution)
    show_log(verbose)
    from flows.demo import demo as demo_flow
    from flows.launch import launch

    report = launch(demo_flow, out=out, execution=execution)
    print_figures(report["datasets"])
    print_places(
        report=f"{out}/report.html",
        figures=f"{out}/report.json",
        pictures=f"{out}/histogram.png, {out}/det.png, {out}/contact_sheet.png",
    )


@app.command()
def status(store: Annotated[str, typer.Argument(help="Folder or fsspec URL of a store.")]) -> None:
    """Show how far every stage in a store is, read from the store alone.

    done and pending count work units, failed the samples (rows) in them that failed; left is the time that
    what is pending takes at the rate so far. Beneath are the runs that each stage is part of.
    """
    from flows.progress import clock_text
    from negfacediff_core.store.status import check_store
    from negfacediff_core.store.status import status as read_status

    check_store(store)
    stages = read_status(store)
    table = Table("stage", box=None, pad_edge=False)
    table.add_column("fingerprint", no_wrap=True, min_width=16)
    for column in ("done", "pending", "failed", "rows/s", "left"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in stages:
        table.add_row(
            stage.stage,
            stage.fingerprint,
            f"{stage.done:,}",
            f"{stage.pending:,}",
            f"{stage.failed:,}",
            "" if stage.rate is None else f"{stage.rate:,.1f}",
            clock_text(stage.seconds_left) if stage.pending and stage.seconds_left else "",
        )
    Console().print(table)
    print()
    # names are whole, to be copied, however narrow the terminal is
    wrapper = TextWrapper(
        Console().width, subsequent_indent=30 * " ", break_long_words=False, break_on_hyphens=False
    )
    print(f"{'stage':<12}{'fingerprint':<18}runs")
    for stage in stages:
        print(wrapper.fill(f"{stage.stage:<12}{stage.fingerprint:<18}{', '.join(stage.runs)}"))


@app.command()
def presets(
    name: Annotated[
        str | None, typer.Argument(help="Print this preset: the start of a file of your own.")
    ] = None,
) -> None:
    """List the presets with a line each, or print one."""
    from flows.presets import headline, preset_text, preset_texts

    if name is not None:
        print(preset_text(name), end="")
        return
    table = Table("preset", "what it builds", box=None)
    for preset, text in preset_texts().items():
        table.add_row(f"[bold]{preset}", headline(text))
    Console().print(table)


@app.command()
def fields(
    of: Annotated[
        Configured, typer.Argument(help="Of a build's presets, or of the recipes of recognisers.")
    ] = Configured.build,
) -> None:
    """List every field that a preset or --set can give, with its default and what it means."""
    from flows.presets import describe_fields
    from negfacediff_core.config import BuildConfig
    from negfacediff_core.recognition.recipe import RecogniserConfig

    table = Table("field", "default", "meaning", box=None)
    for name, default, meaning in describe_fields(BuildConfig if of == "build" else RecogniserConfig):
        table.add_row(f"[bold]{name}", default, meaning)
    Console().print(table)


@app.command(epilog="Example: negfacediff compare demo/store demo-none demo-far --out comparison")
def compare(
    store: Annotated[str, typer.Argument(help="Folder or fsspec URL of a store.")],
    runs: Annotated[
        list[str], typer.Argument(help="Finished runs; the first is what the others differ from.")
    ],
    out: Annotated[str, typer.Option(help="Folder for the report and the pictures.")] = "comparison",
    verbose: Verbose = False,
) -> None:
    """Show finished runs side by side: figures and their differences, score histograms, DET curves, images.

    Where runs share contexts, the same place of each contact sheet is the same identity and noise.
    """
    from negfacediff_core.store.status import check_store

    check_store(store)
    show_log(verbose)
    from flows.compare import compare as compare_flow
    from flows.compare import read_datasets
    from flows.launch import launch

    read_datasets(store, runs)
    again = "The same command compares anew:"
    report = launch(compare_flow, after_interrupt=again, store=store, runs=runs, out=out)
    print_figures(report["datasets"])
    print_places(report=f"{out}/report.html", figures=f"{out}/report.json", pictures=f"{out}/*.png, *.svg")


@app.command(
    epilog="Example: negfacediff sweep steps --store sweeps --out sweeps/steps --workers 2\n\n"
    "How to write a sweep of one's own: docs/sweeps.md"
)
@with_execution("approve_above_hours")
def sweep(
    name: Annotated[str, typer.Argument(help="A sweep (steps, ablation) or a YAML file.")],
    store: Annotated[str, typer.Option(help="Folder or fsspec URL that the builds are kept in.")] = "store",
    out: Annotated[str, typer.Option(help="Folder for the table, the plot and the figures.")] = "sweep",
    execution: ExecutionConfig = DEFAULTS,
    verbose: Verbose = False,
) -> None:
    """Build one dataset a setting and seed, and set their figures against each other.

    Running the same command again goes on where it stopped; figures are written to the folder as they come.
    """
    from flows.sweep import cases, load_sweep

    described = load_sweep(name)
    execution = check([case.build for case in cases(described)], store, execution)
    show_log(verbose)
    from flows.launch import launch
    from flows.sweep import run_sweep

    launch(run_sweep, sweep=described, store=store, out=out, execution=execution)
    print_places(table=f"{out}/table.md", plot=f"{out}/plot.svg", figures=f"{out}/rows.json")


# Behind the commands above, which people need first.
app.command(epilog="Examples:\n\nnegfacediff serve --store out\n\nnegfacediff serve --port 4300 --no-open")(
    serve
)
app.command(
    epilog="Examples:\n\nnegfacediff grow out demo --identities +100\n\n"
    "negfacediff grow out demo --images +10 --executor dask"
)(grow)
app.command(
    epilog="Examples:\n\nnegfacediff evaluate out demo --bootstrap 1000\n\n"
    "negfacediff evaluate out demo --judge packs/other --name demo-other-judge"
)(evaluate)
app.command(
    epilog="Examples:\n\nnegfacediff plan demo --store out\n\n"
    "negfacediff plan negfacediff --set samples.precision=bf16 --device h100"
)(plan)
app.command(epilog="Example: negfacediff contexts demo/store")(contexts)
app.command(
    epilog="Examples:\n\nnegfacediff leakage out demo --gallery training_images --dry-run\n\n"
    "negfacediff leakage out demo --gallery training_images --recogniser packs/one --recogniser packs/two "
    "--policy drop"
)(leakage)
app.command(
    epilog="Examples:\n\nnegfacediff export out demo --out exported\n\n"
    "negfacediff export out faces --out train --format rec --identities 10000 --images-per-identity 50 "
    "--refill"
)(export)
app.command(epilog="Example: negfacediff verify-export train")(verify_export)
app.command(epilog="Example: negfacediff whose face.jpg out")(whose)
app.command(
    epilog="Examples:\n\nnegfacediff train-recogniser out demo --out trained --recipe small\n\n"
    "negfacediff train-recogniser exported --out trained --processes 4 --set schedule=plateau"
)(train_recogniser)
app.command(
    epilog="Examples:\n\nnegfacediff prune trained --share 0.8 --out kept.csv\n\n"
    "negfacediff export out demo --out pruned --filter kept.csv"
)(prune)
app.command(epilog="Example: negfacediff study-recognition negative --store studies --out studies/negative")(
    study_recognition
)
app.command(epilog="Example: negfacediff onnx 295672backbone.pth --out packs/elasticface")(onnx)
app.command(
    epilog="Examples:\n\nnegfacediff verify-recogniser lfw.bin agedb_30.bin --recogniser packs/buffalo_l\n\n"
    "negfacediff verify-recogniser faces_emore IJBC --recogniser one.onnx,name=w0 --recogniser other.pth"
)(verify_recogniser)
app.command(
    epilog="Examples:\n\nnegfacediff automations\n\nnegfacediff automations mark-crashed resume-crashed\n\n"
    "negfacediff automations notify --block slack-webhook/team\n\n"
    "negfacediff automations resume-crashed --remove"
)(automations)
for _name, _command in COMMANDS.items():
    app.command(_name, epilog=_command.epilog)(_command.run)
app.add_typer(weights_app, name="weights")
app.add_typer(pack_app, name="pack")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. An error that a user can mend is one paragraph on stderr and an exit code."""
    try:
        app(arguments)
    except NegFaceDiffError as error:
        print(f"Error: {str(error).rstrip('.')}.", file=sys.stderr)
        sys.exit(BUILD_FAILED if isinstance(error, BuildError) else BAD_INPUT)

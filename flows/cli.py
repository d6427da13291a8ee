"""The `negfacediff` command. Heavy imports stand inside the commands, so that help comes at once."""

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flows.command import (
    DEFAULTS,
    BatchSize,
    Device,
    Executor,
    Retries,
    Threads,
    Verbose,
    Workers,
    build_in,
    check,
    execution_of,
    print_figures,
    print_places,
    show_log,
)
from flows.contexts import contexts
from flows.pack import app as pack_app
from flows.store import COMMANDS
from flows.weights import app as weights_app
from negfacediff_core.errors import BuildError, NegFaceDiffError

BAD_INPUT, BUILD_FAILED = 2, 1

app = typer.Typer(
    name="negfacediff",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Build synthetic face-recognition training sets with identity-conditioned diffusion and negative "
    "contexts.\n\nStart with [bold]negfacediff demo[/bold]: it builds two small datasets from the same "
    "contexts and noise, without and with a negative, and compares them.",
)


@app.command(
    epilog="Examples:\n\n"
    "negfacediff build demo --store out\n\n"
    "negfacediff build demo --set name=mine --set samples.w=0.3 --set negatives.rule=close\n\n"
    "negfacediff build my.yaml --store s3://bucket/faces --executor tcp://scheduler:8786"
)
def build(
    preset: Annotated[str, typer.Argument(help="A preset (see negfacediff presets) or a YAML file.")],
    store: Annotated[
        str,
        typer.Option(
            help="Folder or fsspec URL that datasets are kept in; s3:// needs the extra s3: "
            "pip install 'negfacediff\\[s3]'."
        ),
    ] = "store",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Change one field; may be repeated (see negfacediff fields)."
        ),
    ] = None,
    executor: Executor = DEFAULTS.executor,
    workers: Workers = DEFAULTS.workers,
    threads_per_worker: Threads = DEFAULTS.threads_per_worker,
    batch_size: BatchSize = DEFAULTS.batch_size,
    device: Device = DEFAULTS.device,
    retries: Retries = DEFAULTS.retries,
    verbose: Verbose = False,
) -> None:
    """Build a dataset, or finish one: contexts, negatives, samples, aligned crops, embeddings, evaluation.

    Running the same command again goes on where it stopped: what is committed is never made twice. Another
    setting makes another dataset beside it, in the same store, and shares the stages that do not differ.
    """
    from flows.presets import load_build

    config = load_build(preset, set_ or [])
    execution = execution_of(executor, workers, threads_per_worker, batch_size, device, retries)
    build_in(store, config, execution, verbose)


@app.command(epilog="Example: negfacediff demo --out demo --executor dask")
def demo(
    out: Annotated[str, typer.Option(help="Folder for the store, the report and the pictures.")] = "demo",
    executor: Executor = DEFAULTS.executor,
    workers: Workers = DEFAULTS.workers,
    threads_per_worker: Threads = DEFAULTS.threads_per_worker,
    batch_size: BatchSize = DEFAULTS.batch_size,
    device: Device = DEFAULTS.device,
    retries: Retries = DEFAULTS.retries,
    verbose: Verbose = False,
) -> None:
    """Build two small datasets from the same contexts and noise, w = 0 and w = 0.5, and compare them.

    Writes report.html, report.json, histogram.png and contact_sheet.png. Takes minutes on two CPU cores.
    """
    from flows.presets import demo_builds, demo_store

    execution = execution_of(executor, workers, threads_per_worker, batch_size, device, retries)
    check(demo_builds(), demo_store(out), execution)
    show_log(verbose)
    from flows.demo import demo as demo_flow
    from flows.launch import launch

    report = launch(demo_flow, out=out, execution=execution)
    print_figures(report["datasets"])
    print_places(
        report=f"{out}/report.html",
        figures=f"{out}/report.json",
        pictures=f"{out}/histogram.png, {out}/contact_sheet.png",
    )


@app.command()
def status(store: Annotated[str, typer.Argument(help="Folder or fsspec URL of a store.")]) -> None:
    """Show how far every stage in a store is, read from the store alone.

    done and pending count work units, failed the samples (rows) in them that failed; left is the time that
    what is pending takes at the rate so far.
    """
    from flows.progress import clock_text
    from negfacediff_core.store.status import check_store
    from negfacediff_core.store.status import status as read_status

    check_store(store)
    stages = read_status(store)
    table = Table("stage", box=None, pad_edge=False)
    table.add_column("fingerprint", no_wrap=True, min_width=16)
    table.add_column("runs")
    for column in ("done", "pending", "failed", "rows/s", "left"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in stages:
        table.add_row(
            stage.stage,
            stage.fingerprint,
            ", ".join(stage.runs),
            f"{stage.done:,}",
            f"{stage.pending:,}",
            f"{stage.failed:,}",
            "" if stage.rate is None else f"{stage.rate:,.1f}",
            clock_text(stage.seconds_left) if stage.pending and stage.seconds_left else "",
        )
    Console().print(table)


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
def fields() -> None:
    """List every field that a preset or --set can give, with its default and what it means."""
    from flows.presets import describe_fields

    table = Table("field", "default", "meaning", box=None)
    for name, default, meaning in describe_fields():
        table.add_row(f"[bold]{name}", default, meaning)
    Console().print(table)


# Behind the commands above, which people need first.
app.command(epilog="Example: negfacediff contexts demo/store")(contexts)
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

"""What the commands that build have in common: options, checks before, and what they print after."""

import os
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from negfacediff_core.config import BuildConfig, ExecutionConfig

DEFAULTS = ExecutionConfig()

Executor = Annotated[
    str,
    typer.Option(
        help="Where units run: threads (of this process), dask (local processes), cuda (a process a GPU), or "
        "the address of a Dask scheduler, tcp://host:8786."
    ),
]
Workers = Annotated[int, typer.Option(help="Workers; 0 is one a core or GPU.")]
Threads = Annotated[int, typer.Option(help="CPU threads of each worker.")]
BatchSize = Annotated[int, typer.Option(help="Images a batch; 0 fits the device.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Retries = Annotated[int, typer.Option(help="Further rounds over units that failed.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's log as well.")]


def execution_of(
    executor: str, workers: int, threads_per_worker: int, batch_size: int, device: str, retries: int
) -> ExecutionConfig:
    """Return how a build is to be run; ConfigError for an impossible value."""
    from flows.presets import check_execution

    return check_execution(
        {
            "executor": executor,
            "workers": workers,
            "threads_per_worker": threads_per_worker,
            "batch_size": batch_size,
            "device": device,
            "retries": retries,
        }
    )


def check(builds: Sequence[BuildConfig], store: str, execution: ExecutionConfig) -> None:
    """Check all inputs, as the flow does: here an error comes before Prefect starts."""
    from negfacediff_core.stages import plan_build
    from tasks.executors import check_available

    check_available(execution)
    for one in builds:
        plan_build(one, store)


def show_log(verbose: bool) -> None:
    """Let Prefect's log through to the console; takes effect where Prefect has not been imported yet."""
    if verbose:
        os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "INFO"


def build_in(store: str, config: BuildConfig, execution: ExecutionConfig, verbose: bool) -> None:
    """Check a build, run it to its end, and print its figures and where they lie."""
    check([config], store, execution)
    show_log(verbose)
    from flows.build import build_dataset
    from flows.launch import launch

    result = launch(build_dataset, build=config, execution=execution, store=store)
    print_figures([result["figures"]])
    stages = result["stages"]
    print_places(
        images=stages["samples"], crops=stages["aligned"], report=f"{stages['evaluation']}/report.html"
    )


def print_figures(datasets: list[dict[str, Any]]) -> None:
    """Print the datasets' figures side by side, a column a dataset."""
    from flows.results import figure_rows

    table = Table("", *(dataset["name"] for dataset in datasets), box=None, header_style="bold")
    for row in figure_rows(datasets):
        table.add_row(*row)
    console = Console()
    console.print()
    console.print(table)
    console.print()


def print_places(**places: str) -> None:
    """Print where things lie, a line each."""
    for label, place in places.items():
        print(f"{label:<9}{place}")

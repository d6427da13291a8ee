"""What the commands that build have in common: options, checks before, and what they print after."""

import os
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import Parameter, signature
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from negfacediff_core.config import BuildConfig, ExecutionConfig

DEFAULTS = ExecutionConfig()

Preset = Annotated[str, typer.Argument(help="A preset (see negfacediff presets) or a YAML file.")]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Change one field; may be repeated (see negfacediff fields)."
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's log as well.")]


def with_execution(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for every field of `ExecutionConfig` but those `left_out`.

    What approval alone reads is left out with it. Where the device is, nothing is made that licences bear on.

    The options stand where the command's parameter `execution` does, which gets them checked; a ConfigError
    names an impossible value before the command begins.
    """
    if "approve_above_hours" in left_out:
        left_out += ("calibration",)
    if "device" in left_out:
        left_out += ("accept_licences",)
    fields = {name: field for name, field in ExecutionConfig.model_fields.items() if name not in left_out}
    options = [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[field.annotation, typer.Option(help=field.description)],
        )
        for name, field in fields.items()
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def with_options(**given: Any) -> None:
            from flows.presets import check_execution

            execution = check_execution({name: given.pop(name) for name in fields})
            command(**given, execution=execution)

        seen = signature(command, eval_str=True)
        parameters: list[Parameter] = []
        for parameter in seen.parameters.values():
            parameters += (
                options if parameter.name == "execution" else [parameter.replace(kind=Parameter.KEYWORD_ONLY)]
            )
        # what typer reads
        with_options.__signature__ = seen.replace(parameters=parameters)  # type: ignore[attr-defined]
        return with_options

    return decorate


def check(builds: Sequence[BuildConfig], store: str, execution: ExecutionConfig) -> ExecutionConfig:
    """Check all inputs, as the flow does: here an error comes before Prefect starts.

    The terms of the weights are shown, and asked for where that is due; returns `execution` with the answer.
    """
    from flows.acknowledgement import acknowledge_in_terminal
    from negfacediff_core.stages.build import plan_build
    from tasks.executors import check_available

    check_available(execution, *(one.samples.precision for one in builds))
    plans = [(one.name, {spec.name: spec for spec in plan_build(one, store)}) for one in builds]
    return acknowledge_in_terminal(plans, store, execution)


def show_log(verbose: bool) -> None:
    """Let Prefect's log through to the console; takes effect where Prefect has not been imported yet."""
    if verbose:
        os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "INFO"


def build_in(
    store: str,
    config: BuildConfig,
    execution: ExecutionConfig,
    verbose: bool,
    run: Callable[[ExecutionConfig], dict[str, Any]] | None = None,
) -> None:
    """Check a build, run it to its end, and print its figures and where they lie.

    `run` launches another flow that makes it and returns what `build_dataset` does; None: that flow itself.
    """
    execution = check([config], store, execution)
    show_log(verbose)
    if execution.approve_above_hours:
        from flows.approval import approve_in_terminal

        approve_in_terminal(config, store, execution)
        # asked here, and so not once more in Prefect
        execution = execution.model_copy(update={"approve_above_hours": 0.0})
    if run is None:
        from flows.build import build_dataset
        from flows.launch import launch

        result = launch(build_dataset, build=config, execution=execution, store=store)
    else:
        result = run(execution)
    print_figures([result["figures"]])
    stages = result["stages"]
    print_places(
        images=stages["samples"],
        crops=stages["aligned"],
        report=f"{stages['evaluation']}/report.html",
        figures=f"{stages['evaluation']}/page.json",
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

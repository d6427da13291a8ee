"""The commands `grow` and `evaluate`: a run of a store made larger, or evaluated anew."""

from typing import Annotated, Any

import typer

from flows.command import DEFAULTS, Verbose, build_in, with_execution
from flows.resume import Store
from negfacediff_core.config import EvaluationConfig, ExecutionConfig, Protocol

_FIELDS = EvaluationConfig.model_fields

Run = Annotated[str, typer.Argument(help="Name of the run.")]


@with_execution()
def grow(
    store: Store,
    run: Run,
    identities: Annotated[int, typer.Option(min=0, metavar="+N", help="Identities to add.")] = 0,
    images: Annotated[int, typer.Option(min=0, metavar="+N", help="Images of each identity to add.")] = 0,
    execution: ExecutionConfig = DEFAULTS,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Approve it, however long it takes.")] = False,
    verbose: Verbose = False,
) -> None:
    """Add identities, or images of each, to a run; nothing that it has changes or moves.

    A run that is not complete is finished instead: after an interruption the same command goes on.
    """
    from flows.growth import grown

    build, said = grown(store, run, identities, images)
    print(said)
    if yes:
        execution = execution.model_copy(update={"approve_above_hours": 0.0})

    def launch_growth(execution: ExecutionConfig) -> dict[str, Any]:
        from flows.grow import grow_dataset
        from flows.launch import launch

        # where other runs write to the store it waits, and adds to what is there then
        return launch(
            grow_dataset, run=run, identities=identities, images=images, execution=execution, store=store
        )

    build_in(store, build, execution, verbose, launch_growth)


@with_execution("approve_above_hours")
def evaluate(
    store: Store,
    run: Run,
    protocol: Annotated[Protocol | None, typer.Option(help=_FIELDS["protocol"].description)] = None,
    bootstrap: Annotated[int | None, typer.Option(help=_FIELDS["bootstrap"].description)] = None,
    match_cosine: Annotated[float | None, typer.Option(help=_FIELDS["match_cosine"].description)] = None,
    seed: Annotated[int | None, typer.Option(help=_FIELDS["seed"].description)] = None,
    judge: Annotated[str, typer.Option(help="Judge by this insightface model pack.")] = "",
    name: Annotated[str, typer.Option(help="Name for the new figures; none: RUN.evaluated.")] = "",
    execution: ExecutionConfig = DEFAULTS,
    verbose: Verbose = False,
) -> None:
    """Compute the figures of a finished run anew; its images stay, and so do its own figures.

    What is not given is as it was. The new figures belong to a run of their own, or, where that is named,
    replace those of the run.
    """
    from flows.growth import evaluated

    given = {"protocol": protocol, "bootstrap": bootstrap, "match_cosine": match_cosine, "seed": seed}
    settings = {field: value for field, value in given.items() if value is not None}
    build_in(store, evaluated(store, run, settings, judge, name), execution, verbose)

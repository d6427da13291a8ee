"""`negfacediff leakage`: are generated faces those of real people? The flow of the gate, and its command."""

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from flows.command import DEFAULTS, Verbose, print_figures, print_places, show_log, with_execution
from flows.resume import Store, build_of
from flows.words import count_text
from negfacediff_core.config import ExecutionConfig, LeakageConfig, Model, Policy
from negfacediff_core.errors import ConfigError

if TYPE_CHECKING:
    from flows.leakage_plan import Estimate
    from negfacediff_core.store.layout import StageSpec

_FIELDS = LeakageConfig.model_fields


class GateNames(NamedTuple):
    """The names of the runs that a gate makes: its `counts`, and what policy drop has `kept`."""

    counts: str
    kept: str


class GateRecord(Model):
    """What the records of a gate's runs hold of the gate that made them."""

    run: str
    settings: LeakageConfig


def gate_names(run: str, gallery: str) -> GateNames:
    """Name what a gate makes of a run; `gallery` is `Gate.label`, which tells the gates of a run apart.

    Stores of earlier versions have `<run>.leakage` and `<run>.kept`, for the last gallery alone.
    """
    return GateNames(f"{run}.leakage.{gallery}", f"{run}.kept.{gallery}")


@with_execution("batch_size", "device", "faces_device", "acceleration", "approve_above_hours")
def leakage(
    store: Store,
    run: Annotated[str, typer.Argument(help="Name of the run whose images are compared.")],
    gallery: Annotated[str, typer.Option(help=_FIELDS["gallery"].description)],
    recogniser: Annotated[
        list[str] | None,
        typer.Option(
            help="insightface model pack that did not condition the generator; may be given twice. Left "
            "out: the judge of the run."
        ),
    ] = None,
    detector: Annotated[str | None, typer.Option(help=_FIELDS["detector"].description)] = None,
    detector_size: Annotated[int, typer.Option(help=_FIELDS["detector_size"].description)] = 0,
    policy: Annotated[Policy, typer.Option(help=_FIELDS["policy"].description)] = Policy.report,
    fmr: Annotated[float, typer.Option(help=_FIELDS["fmr"].description)] = 1e-5,
    pictures: Annotated[bool, typer.Option("--pictures", help=_FIELDS["pictures"].description)] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it will take, after short trials, and do nothing.")
    ] = False,
    execution: ExecutionConfig = DEFAULTS,
    verbose: Verbose = False,
) -> None:
    """Find the most similar person of a gallery for every image of a run, and count those that are alike.

    The gallery is what must not come out again: the images that the generator was trained on, or public test
    sets. What counts as alike is calibrated on the gallery's own people. Running the same command again goes
    on where it stopped.
    """
    from negfacediff_core.stages.gate import plan_gate
    from negfacediff_core.store.status import check_store
    from tasks.executors import check_available

    settings = _settings(
        gallery=gallery,
        recognisers=tuple(recogniser or ()),
        detector=detector,
        detector_size=detector_size,
        policy=policy,
        fmr=fmr,
        pictures=pictures,
    )
    execution = on_cpu(execution)
    check_available(execution)
    check_store(store)
    gate = plan_gate(store, run, settings)
    if settings.policy == Policy.drop:
        build_of(store, run)
    if not gate.conditioner_known:
        print(
            "The generator does not tell which recogniser it was trained with: make sure that it is none of "
            "those that look here."
        )
    if dry_run:
        from flows.leakage_plan import estimate

        _print_estimate(estimate(gate, execution))
        return
    gate_in(store, run, settings, execution, verbose)


def gate_in(store: str, run: str, settings: LeakageConfig, execution: ExecutionConfig, verbose: bool) -> None:
    """Run the gate of a run to its end, and print what was counted and where it lies."""
    show_log(verbose)
    from flows.gate import leakage_gate
    from flows.launch import launch

    result = launch(leakage_gate, store=store, run=run, settings=settings, execution=execution)
    _print_report(result["report"])
    print_places(**result["places"])
    if result["figures"]:
        print_figures(result["figures"])


def on_cpu(execution: ExecutionConfig) -> ExecutionConfig:
    """Return how a gate is run: wherever the images were made, it takes the CPU."""
    return execution.model_copy(update={"device": "cpu"})


def read_gate(store: str, name: str) -> GateRecord | None:
    """Return the gate that made the run `name`; None if it was not made by one, or is not there.

    Raises StoreError if the record is damaged, ConfigError if it holds settings that there are not.
    """
    from flows.presets import explain
    from negfacediff_core.store.runs import read_run

    record = read_run(store, name) or {}
    if "gate" not in record:
        return None
    try:
        return GateRecord.model_validate(record["gate"])
    except ValidationError as error:
        raise ConfigError(f"the run {name} in {store}: {explain(error, GateRecord)}") from error


def stages_of_gate(store: str, name: str, gate: GateRecord) -> "list[StageSpec]":
    """Plan what the gate made for the run `name`, its counts or the run without what leaks.

    Checks everything, and raises as `plan_gate`.
    """
    from negfacediff_core.stages.gate import plan_gate, plan_kept

    planned = plan_gate(store, gate.run, gate.settings)
    if not holds_kept(name, gate):
        return list(planned.stages.values())
    remade = plan_kept(planned, build_of(store, gate.run), gate.settings.fmr)
    return list({**planned.run, **remade}.values())


def holds_kept(name: str, gate: GateRecord) -> bool:
    """Tell whether a gate's run `name` is a dataset: what policy drop has kept of the gate's run."""
    return f"{name}.".startswith(f"{gate.run}.kept.")


def _settings(**values: Any) -> LeakageConfig:
    from flows.presets import explain

    try:
        return LeakageConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, LeakageConfig)) from error


def _print_estimate(estimated: "Estimate") -> None:
    from flows.leakage_plan import memory_text, rows_of

    table = Table("work", box=None, pad_edge=False)
    for column in ("left", "operations", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows_of(estimated):
        table.add_row(*row)
    Console().print(table)
    print(memory_text(estimated))


def _print_report(report: dict[str, Any]) -> None:
    """Print what was counted, a row a recogniser and rate."""
    people = report["gallery"]
    print(
        f"\n{report['compared']:,} of {count_text(report['images'], 'image')} compared with "
        f"{count_text(people['faces'], 'face')} of {people['people']:,} people "
        f"({people['images'] - people['faces']:,} images of the gallery show none)."
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("recogniser", no_wrap=True)
    for column in ("FMR", "threshold", "alike", "identities", "centres", "gallery"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in report["recognisers"]:
        for row in one["rates"]:
            table.add_row(one["recogniser"], f"{row['fmr']:g}", *_cells(row, report["compared"]))
    Console().print(table)
    for one in report["recognisers"]:
        lacking = [
            f"FMR {row['fmr']:g} takes {row['pairs_needed']:,}"
            for row in one["rates"]
            if row["threshold"] is None
        ]
        if lacking:
            print(f"{one['recogniser']}: {one['impostor_pairs']:,} impostor pairs; {', '.join(lacking)}.")
    if len(report["recognisers"]) > 1:
        for row in report["rates"]:
            if row["some"] is not None:
                print(f"At FMR {row['fmr']:g}: {row['some']:,} alike to either, {row['all']:,} to both.")
    for one in report["recognisers"]:
        for pair in one["worst_images"][:3]:
            print(
                f"{one['recogniser']}: identity {pair['identity']}, image {pair['replicate']} and "
                f"{pair['gallery']}: {pair['cosine']:.3f}"
            )


def _cells(row: dict[str, Any], compared: int) -> list[str]:
    """The cells of one rate, for which there may be no threshold."""
    if row["threshold"] is None:
        return ["none"]
    return [
        f"{row['threshold']:.3f}",
        f"{row['images']:,} ({row['images'] / max(1, compared):.1%})",
        f"{row['identities']:,}",
        f"{row['centres']:,}",
        f"{row['gallery_share']:.1%}",
    ]

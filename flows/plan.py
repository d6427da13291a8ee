"""`negfacediff plan`: what a build would take, before any of it is made."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flows.command import DEFAULTS, Changes, Preset, with_execution
from flows.progress import clock_text
from flows.words import count_text, size_text
from negfacediff_core.config import ExecutionConfig

if TYPE_CHECKING:
    from flows.planning import Plan
    from negfacediff_core.cost import Calibration, Span

# Devices that are timed; any other name is that of a stored calibration.
AT_HAND = ("auto", "cpu", "cuda")


@with_execution("device", "retries", "approve_above_hours")
def plan(
    preset: Preset,
    store: Annotated[str, typer.Option(help="Folder or fsspec URL that the dataset is to go to.")] = "store",
    set_: Changes = None,
    execution: ExecutionConfig = DEFAULTS,
    device: Annotated[
        str,
        typer.Option(
            help="auto, cpu, cuda or cuda:N: the device is timed in about a minute, here or on a worker of "
            "the Dask scheduler that --executor names. Another name is that of a stored calibration, such as "
            "h100."
        ),
    ] = DEFAULTS.device,
    calibrate: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Time the device, or leave time out.")
    ] = True,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show what a build would take, without running it: units, network evaluations, bytes on disk and time.

    What the store holds already is left out of the time. Weights that are not there yet are assumed to be of
    the published size, and it says so.
    """
    from flows.calibrations import load_calibration
    from flows.planning import plan_of, timed_plan_of
    from flows.presets import check_execution, load_build

    build = load_build(preset, set_ or [])
    at_hand = device.partition(":")[0] in AT_HAND
    execution = check_execution({**execution.model_dump(), "device": device if at_hand else "cpu"})
    if at_hand and calibrate:
        planned = timed_plan_of(build, store, execution)
    else:
        stored = None if at_hand else load_calibration(device)
        planned = plan_of(build, store, execution, stored)
    if json_:
        print(json.dumps(plan_json(planned), indent=2))
    else:
        print_plan(planned)


def plan_json(plan: "Plan") -> dict[str, Any]:
    """Return a plan as plain types; what is computed of it stands beside it."""
    return {
        **asdict(plan),
        "evaluations": plan.evaluations,
        "evaluations_left": plan.evaluations_left,
        "bytes": sum(stage.bytes for stage in plan.stages.values()),
    }


def print_plan(plan: "Plan", console: Console | None = None) -> None:
    """Print a plan: a table of the stages, and a line for each thing that it takes."""
    console = console or Console()
    console.print(f"[bold]{plan.name}[/bold] in {plan.store}; nothing has been run", highlight=False)
    console.print()
    console.print(_stages(plan))
    console.print()
    for label, text in plan_lines(plan):
        console.print(f"[bold]{label:<12}[/bold]{text}", highlight=False, soft_wrap=True)


def plan_lines(plan: "Plan") -> list[tuple[str, str]]:
    """Return what a build takes in words: a label and a sentence each."""
    from negfacediff_core.stages.sizes import BYTES_TOLERANCE

    images = plan.images // plan.identities
    passes = ", ".join(
        f"{count:,} passes x {contexts}" for contexts, count in sorted(plan.passes.items(), reverse=True)
    )
    each = plan.evaluations // plan.stages["samples"].rows
    done = plan.evaluations - plan.evaluations_left
    left = f", of which {done:,} are done" if done else ""
    size = size_text(sum(stage.bytes for stage in plan.stages.values()))
    lines = [
        (
            "images",
            f"{plan.images:,}: {plan.identities:,} identities x {images:,}",
        ),
        ("network", f"{plan.evaluations:,} evaluations{left}; {each:,} an image: {passes} contexts"),
        (
            "operations",
            f"{plan.gflop:,.2f} GFLOP an evaluation, {plan.decoder_gflop:,.2f} GFLOP to decode an image",
        ),
        ("task runs", f"{plan.task_runs:,}, more if units fail"),
        ("on disk", f"{size}, within {BYTES_TOLERANCE:.0%} for images like the demo pack's"),
        *(("assumed", sentence) for sentence in plan.assumed),
        *_time_lines(plan),
    ]
    return lines


def _time_lines(plan: "Plan") -> list[tuple[str, str]]:
    calibration, time = plan.calibration, plan.time
    if calibration is None or time is None:
        return [("time", "not estimated; leave out --no-calibrate, or name a --device")]
    where = _places(plan, calibration)
    if calibration.floor:
        return [
            (
                "time",
                f"at least {clock_text(time.wall.seconds)} on {where}: a floor, the operations at the "
                "highest rate that the device has; no build is that fast",
            ),
            ("GPU-hours", f"at least {time.device.seconds / 3600:,.2f}"),
            ("rates", calibration.how),
            ("without", f"the time of {', '.join(time.missing)}, which run on CPUs beside it"),
        ]
    hours = [("GPU-hours", _hours(time.device))] if plan.devices else []
    return [
        ("time", f"{_between(time.wall)} on {where}"),
        *hours,
        ("CPU-hours", _hours(time.cpu)),
        ("rates", calibration.how),
        ("without", "; ".join([*_warm_up(calibration), *plan.not_counted, *time.missing])),
    ]


def _warm_up(calibration: "Calibration") -> list[str]:
    seconds = calibration.warm_up
    return [f"loading and warming up, {seconds:,.1f} s in each worker"] if seconds else []


def _places(plan: "Plan", calibration: "Calibration") -> str:
    if calibration.floor:
        return f"{plan.devices} x {calibration.device}"
    cpus = f"{count_text(plan.workers, 'worker')}"
    return (
        f"{plan.devices} x {calibration.device} and {cpus}"
        if plan.devices
        else f"{cpus} ({calibration.device})"
    )


def _between(span: "Span") -> str:
    return f"about {clock_text(span.seconds)} ({clock_text(span.low)} to {clock_text(span.high)})"


def _hours(span: "Span") -> str:
    best, low, high = (f"{seconds / 3600:,.2f}" for seconds in (span.seconds, span.low, span.high))
    return f"{best} ({low} to {high})"


def _stages(plan: "Plan") -> Table:
    table = Table("stage", box=None, pad_edge=False)
    for column in ("units", "done", "rows", "on disk"):
        table.add_column(column, justify="right", no_wrap=True)
    timed = plan.time is not None and plan.calibration is not None and not plan.calibration.floor
    if timed:
        table.add_column("one worker's time", justify="right", no_wrap=True)
    for name, stage in plan.stages.items():
        cells = [name, f"{stage.units:,}", f"{stage.done:,}", f"{stage.rows:,}", size_text(stage.bytes)]
        if timed and plan.time is not None:
            span = plan.time.stages.get(name)
            cells.append(clock_text(span.seconds) if span else "")
        table.add_row(*cells)
    return table

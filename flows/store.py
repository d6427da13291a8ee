"""Commands that look after a store: verify, resume, retry-failed, gc and logs."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from flows.examination import NO_DAMAGE, by_units, damage_text, examine, leftovers_text, mend
from flows.resume import Store, resume, retry_failed
from flows.words import command_text, names_text, size_text
from negfacediff_core.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from negfacediff_core.store.layout import StageSpec, Unit
    from negfacediff_core.store.verify import Finding

# Exit code of `verify` where damage was found; bad input has another.
DAMAGED = 1


def verify(
    store: Store,
    sample: Annotated[
        str, typer.Option(metavar="SHARE", help="Check only this share of the units, like 5% or 0.05.")
    ] = "100%",
    seed: Annotated[int, typer.Option(help="Another seed samples other units.")] = 0,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make damaged units, and what was made from them, pending.")
    ] = False,
    run: Annotated[str | None, typer.Option(help="Check only what this run needs.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Files that are read at a time.")] = 4,
) -> None:
    """Read every file of a store again and compare it with what was committed; list the damage.

    The exit code is 0 if all is well and 1 if something is damaged, even where --repair has mended it.
    Repairing removes completion records, so that the next build makes those units again. Stop builds into the
    store first: this waits for none, and one that just reads such a unit fails, to be run again. The
    deployment verify-store waits for its turn before it repairs.
    """
    from flows.progress import CallbackBar

    share = _share(sample)
    with CallbackBar("verify", "MB") as bar:
        checked = examine(store, run, share, seed, workers, bar)
    print(checked.text)
    if checked.leftovers:
        print(f"{leftovers_text(checked)}: {command_text('gc', store)}")
    if not checked.damage:
        print(NO_DAMAGE)
        return
    _print_findings(checked.damage)
    if repair:
        _repair(store, checked.damage)
    else:
        print(f"To make what is damaged again: {command_text('verify', store, '--repair')}")
    raise typer.Exit(DAMAGED)


def gc(
    store: Store,
    delete: Annotated[bool, typer.Option("--delete", help="Remove what is listed.")] = False,
) -> None:
    """List what no run needs, and with --delete remove it: other stages, and what killed writers left.

    What was touched in the last hour is passed over. To give up a dataset, remove its file in runs/ first.
    """
    from negfacediff_core.store.gc import find_rubbish, remove

    def say_linked(path: str) -> None:
        print(f"{path} is a symbolic link: what lies behind it was not looked at.")

    rubbish = find_rubbish(store, say_linked)
    if not rubbish:
        print("There is nothing to remove.")
        return
    table = Table("path", "why", "files", "size", box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    for one in rubbish:
        table.add_row(one.path, one.why, f"{one.files:,}", size_text(one.size))
    Console().print(table)
    total = sum(one.size for one in rubbish)
    if not delete:
        print(f"Nothing was removed. To remove {size_text(total)}: {command_text('gc', store, '--delete')}")
        return
    went = {one: remove(store, one) for one in rubbish}
    print(f"Removed {size_text(sum(one.size for one in rubbish if went[one]))}.")
    stayed = [one.path for one in rubbish if not went[one]]
    if stayed:
        print(f"Not removed, as it has come into use meanwhile: {names_text(stayed)}.")


def logs(
    store: Store,
    stage: Annotated[
        str, typer.Argument(help="A stage, like samples, or one directory: samples/FINGERPRINT.")
    ],
    unit: Annotated[str, typer.Argument(help="A unit, like 00042-000.")],
) -> None:
    """Show what is known of a unit: its record, and the log of its last failure."""
    from negfacediff_core.store.records import committed
    from negfacediff_core.store.status import check_store, stages, wanted_units

    check_store(store)
    specs = stages(store)
    chosen = [spec for spec in specs if stage in (spec.name, spec.path)]
    if not chosen:
        there = names_text(sorted({spec.path if "/" in stage else spec.name for spec in specs}))
        raise StoreError(f"There is no stage {stage} in {store}; there are {there}.")
    wanted = wanted_units(store, chosen)
    known: set[str] = set()
    for spec in chosen:
        units = {one.name: one for one in set(committed(spec)).union(*wanted[spec.path].values())}
        known |= units.keys()
        if unit in units:
            _print_unit(spec, units[unit])
    if unit not in known:
        there = names_text(sorted(known))
        raise StoreError(f"There is no unit {unit} of {stage} in {store}; there are {there}.")


class Command(NamedTuple):
    """A command, and what stands below its help."""

    run: Callable[..., None]
    epilog: str


COMMANDS = {
    "verify": Command(
        verify,
        "Examples:\n\nnegfacediff verify out\n\nnegfacediff verify out --sample 5%\n\n"
        "negfacediff verify out --repair",
    ),
    "resume": Command(resume, "Example: negfacediff resume out demo --executor dask"),
    "retry-failed": Command(retry_failed, "Example: negfacediff retry-failed out demo"),
    "gc": Command(gc, "Examples:\n\nnegfacediff gc out\n\nnegfacediff gc out --delete"),
    "logs": Command(logs, "Example: negfacediff logs out samples 00042-000"),
}


def _share(text: str) -> float:
    """Read `5%` or `0.05`; ConfigError unless it is in (0, 1]."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"--sample {text!r} is no share of the units: write 5% or 0.05, at most 100% or 1.")
    return share


def _print_findings(findings: Sequence["Finding"]) -> None:
    """List damage by unit."""
    by_unit = by_units(findings)
    print(damage_text(findings))
    for (stage, unit), found in by_unit.items():
        print(f"  {stage} {unit}".rstrip() if stage else "  the store")
        for finding in found:
            print(f"    {finding.path.removeprefix(f'{stage}/')}: {finding.problem}")


def _repair(store: str, findings: Iterable["Finding"]) -> None:
    for sentence in mend(store, findings):
        print(sentence)


def _print_unit(spec: "StageSpec", unit: "Unit") -> None:
    from datetime import datetime

    from negfacediff_core.store.records import has_record, read_record

    print(f"{spec.path} {unit.name}")
    if has_record(spec, unit):
        record = read_record(spec, unit)
        finished = datetime.fromtimestamp(record.finished).astimezone().isoformat(" ", "seconds")
        facts = {
            "committed": finished,
            "rows": f"{record.rows:,}: {record.ok:,} ok, {record.failed:,} not ok",
            "seconds": ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in record.seconds.items()),
            "host": record.host,
            "device": record.device,
        }
        for label, fact in facts.items():
            print(f"  {label:<10}{fact}")
    else:
        print("  not committed")
    path = f"logs/{unit.name}.txt"
    if spec.location.exists(path):
        print(f"  last failure, {spec.directory}/{path}:")
        for line in spec.location.read_bytes(path).decode(errors="replace").splitlines():
            print(f"    {_harmless(line)}")
    else:
        print("  no failure was logged")


def _harmless(line: str) -> str:
    """Write out what a terminal would obey: whatever a log holds, it is only shown."""
    return "".join(
        char if char.isprintable() or char == "\t" else char.encode("unicode_escape").decode()
        for char in line
    )

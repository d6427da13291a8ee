"""Checking a store and mending it, in words: what `verify` prints and `verify_store` shows."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from flows.words import command_text, count_text, size_text
from negfacediff_core.errors import StoreError

if TYPE_CHECKING:
    from negfacediff_core.store.repair import Repair
    from negfacediff_core.store.verify import Finding

NO_DAMAGE = "No damage was found."


class Examination(NamedTuple):
    """What was checked, in words, and what was found: damage, and files that killed writers left."""

    text: str
    damage: "list[Finding]"
    leftovers: "list[Finding]"


def examine(
    store: str,
    run: str | None,
    share: float,
    seed: int,
    workers: int,
    progress: Callable[[int, int], None],
) -> Examination:
    """Check a share of the units of a store, or of one run; `progress` gets megabytes done and in all.

    Raises StoreError if there is no such store or run, or its place cannot be listed.
    """
    from negfacediff_core.store.status import check_store
    from negfacediff_core.store.verify import Kind, check_units, survey

    check_store(store)
    begun = time.monotonic()
    found = survey(store, run, share, seed)
    findings = list(found.findings)
    findings += check_units(found.units, workers, lambda done, size: progress(*_megabytes(done, size)))
    checked = sum(stored.size for stored in found.units)
    seconds = max(time.monotonic() - begun, 1e-3)
    return Examination(
        f"Checked {count_text(len(found.units), 'unit')}, {size_text(checked)}, in {seconds:.1f} s "
        f"({size_text(round(checked / seconds))}/s).",
        [finding for finding in findings if finding.kind is not Kind.TEMPORARY],
        [finding for finding in findings if finding.kind is Kind.TEMPORARY],
    )


def leftovers_text(checked: Examination) -> str:
    """Count the files that killed writers left."""
    return f"{count_text(len(checked.leftovers), 'file')} that killed writers left"


def by_units(findings: Iterable["Finding"]) -> "dict[tuple[str, str], list[Finding]]":
    """Sort findings by stage directory and unit, each an empty text where a finding belongs to none."""
    sorted_: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        sorted_.setdefault((finding.stage, finding.unit.name if finding.unit else ""), []).append(finding)
    return sorted_


def damage_text(findings: Sequence["Finding"]) -> str:
    """Count damaged files, and the units that they belong to."""
    units = sum(bool(unit) for _, unit in by_units(findings))
    return f"Damage: {count_text(len(findings), 'file')}, of {count_text(units, 'committed unit')}."


def mend(store: str, findings: Iterable["Finding"]) -> list[str]:
    """Repair; return what was done and what comes next, a line each."""
    from negfacediff_core.store.repair import repair
    from negfacediff_core.store.status import unfinished

    done = repair(store, findings)
    said = []
    if done.damaged:
        said.append(f"Pending again: {_total(done.damaged)}, and {_total(done.derived)} made from them.")
    said += _mended(done)
    try:
        lacking = list(unfinished(store))
    except StoreError:  # a record that cannot be read, which is listed above
        lacking = []
    commands = [command_text("resume", store, name) for name in lacking]
    if commands:
        said += ["To make again what is missing:", *(f"  {command}" for command in commands)]
    if done.left or any(path.endswith("stage.json") for path in done.files):
        said.append(f"Then look again: {command_text('verify', store, '--repair')}")
    return said


def _mended(done: "Repair") -> list[str]:
    from negfacediff_core.store.verify import Kind

    advice = {
        Kind.RUN: "build that dataset again, with its preset or file, and the record is written again",
        Kind.STAGE: "the next build of a run that names it writes it again; if none does, remove its folder",
        Kind.UNREADABLE: "it was left as it is; mend what keeps it from being read",
        Kind.UNIT: "it waits until every stage.json is back",
        Kind.ARRAYS: "it waits until everything else that describes its stage can be read",
    }
    return [
        *(f"{'Removed' if path.endswith('stage.json') else 'Written again'}: {path}" for path in done.files),
        *(f"Not mended: {finding.path}: {advice[finding.kind]}" for finding in done.left),
    ]


def _total(units: Mapping[str, Any]) -> str:
    return count_text(sum(map(len, units.values())), "unit")


def _megabytes(done: int, size: int) -> tuple[int, int]:
    """Return bytes done and in all as whole megabytes for a bar; only the last byte fills the last one."""
    total = -(-size // 1_000_000)
    return (total if done == size else done // 1_000_000), total

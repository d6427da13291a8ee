"""Acknowledgement of what the licences of the weights ask of a dataset: before anything is made with them."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Column, Table

from flows.results import licences_of
from negfacediff_core.config import ExecutionConfig, Model
from negfacediff_core.errors import ConfigError
from negfacediff_core.export.licence import Terms, terms_of, terms_of_weights
from negfacediff_core.store.layout import StageSpec
from negfacediff_core.store.runs import read_run, run_names

Licences = Sequence[Mapping[str, str]]
_HOW = (
    "read the licences of the weights (WEIGHTS.md; negfacediff weights check FOLDER), then set "
    "accept_licences (--accept-licences)"
)


class Acknowledgement(Model):
    """What a run's record holds of the terms of its weights: the `licences` that were accepted, and when.

    `licences` have a `part`, a `licence` and a `source` each; `at` is a time in UTC (ISO 8601).
    """

    licences: list[dict[str, str]]
    at: str

    def covers(self, licences: Licences) -> bool:
        """Tell whether all `licences` that ask for more than credit were accepted."""
        accepted = {(one.get("source"), one.get("licence")) for one in self.licences}
        return all(
            (one["source"], one["licence"]) in accepted or terms_of([one["licence"]]).permissive
            for one in licences
        )


def acknowledge_in_terminal(
    builds: Iterable[tuple[str, Mapping[str, StageSpec]]], store: str, execution: ExecutionConfig
) -> ExecutionConfig:
    """Show the terms that `builds`, named stages, will have, and ask where they have not been accepted yet.

    Returns `execution`, which says so where they were. Raises ConfigError if the answer is no, or nobody is
    there to answer.
    """
    by_run = {run: licences_of(specs) for run, specs in builds}
    licences = _each_once(by_run.values())
    terms = terms_of_weights(licences)
    console = Console()
    if terms.permissive:
        console.print(f"Licence: {terms.text}", highlight=False, soft_wrap=True)
        return execution
    console.print(_table(licences))
    console.print(f"\n[bold]What is made with these weights:[/bold] {terms.name}.", highlight=False)
    for condition in terms.conditions:
        console.print(f"- {condition}", highlight=False, soft_wrap=True)
    if execution.accept_licences or all(_recorded(store, run, own) for run, own in by_run.items()):
        console.print("These terms have been accepted.\n")
        return execution
    if not sys.stdin.isatty():
        raise ConfigError(f"nobody is there to accept these terms: {_HOW}")
    if not typer.confirm("Do you accept these terms?"):
        raise ConfigError("the terms of the weights were not accepted; nothing was made")
    return execution.model_copy(update={"accept_licences": True})


def acknowledged(
    store: str, run: str, specs: Mapping[str, StageSpec], execution: ExecutionConfig
) -> Acknowledgement | None:
    """Return the acknowledgement of the terms of a run's weights; None where these ask for credit at most.

    What a run of the store has accepted counts, so that no run that is resumed or grown asks again. Raises
    ConfigError where nobody has accepted them.
    """
    licences = licences_of(specs)
    terms = terms_of_weights(licences)
    if not licences or terms.permissive:
        return None
    if found := _recorded(store, run, licences):
        return found
    if not execution.accept_licences:
        raise ConfigError(_not_accepted(terms))
    return Acknowledgement(licences=licences, at=datetime.now(UTC).isoformat(timespec="seconds"))


def acknowledgement_in(record: Mapping[str, Any], licences: Licences) -> Acknowledgement | None:
    """Return the acknowledgement that a run's record holds, if it is one of these licences."""
    try:
        found = Acknowledgement.model_validate(record.get("acknowledged"))
    except ValidationError:  # there is none, or one that nobody can rely on
        return None
    return found if found.covers(licences) else None


def licence_text(specs: Mapping[str, StageSpec]) -> str:
    """Say in a line what terms a dataset of these stages has, and of which weights."""
    licences = licences_of(specs)
    weights = "; ".join(f"{one['part']}, {one['source']}: {one['licence']}" for one in licences)
    return f"Licence: {terms_of_weights(licences).text} The weights: {weights}"


def _recorded(store: str, run: str, licences: Licences) -> Acknowledgement | None:
    """Return an acknowledgement of these licences: the run's own, or that of another run of the store."""
    for name in dict.fromkeys([run, *run_names(store)]):
        if found := acknowledgement_in(read_run(store, name) or {}, licences):
            return found
    return None


def _not_accepted(terms: Terms) -> str:
    return (
        f"The weights allow a dataset under these terms alone: {terms.text} Nobody has accepted them: {_HOW}"
    )


def _each_once(lists: Iterable[Licences]) -> list[dict[str, str]]:
    entries = (tuple(entry.items()) for licences in lists for entry in licences)
    return [dict(entry) for entry in dict.fromkeys(entries)]


def _table(licences: Licences) -> Table:
    # nothing of a licence is cut off, however long its words are
    columns = (Column(name, overflow="fold") for name in ("part", "weights", "licence"))
    table = Table(*columns, box=None, pad_edge=False)
    for one in licences:
        table.add_row(one["part"], one["source"], one["licence"])
    return table

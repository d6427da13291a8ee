"""The flow `verify_store`: what the command `verify` does, with an artifact of what it found."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, cast

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed
from pydantic import Field

from flows.artifacts import key_of
from flows.examination import NO_DAMAGE, Examination, by_units, damage_text, examine, leftovers_text, mend
from flows.form import STORE, MaybeName
from flows.progress import CallbackBar
from flows.turns import turn
from flows.words import command_text
from negfacediff_core.errors import DamagedError

if TYPE_CHECKING:
    from negfacediff_core.store.verify import Finding

# Units with damage that the artifact lists, and files that are read at a time.
LISTED, READERS = 50, 4


@flow(name="verify-store", flow_run_name="verify {store}")
def verify_store(
    run: MaybeName = "",
    share: Annotated[float, Field(gt=0, le=100)] = 100.0,
    seed: Annotated[int, Field(ge=0)] = 0,
    repair: bool = False,
    store: str = STORE,
) -> dict[str, Any]:
    """Read every file of a store again and compare it with what was committed.

    The artifact `verify` lists what was found. Returns the numbers of `damaged` files and of `leftovers`,
    which killed writers left. Raises DamagedError if something is damaged, even where it has been mended;
    StoreError if there is no such store or run.

    Args:
        run: Check only what this run needs. Empty: the whole store.
        share: Check only this share of the units, in percent. Allowed: above 0 to 100.
        seed: Another seed draws other units, where not all are checked.
        repair: Make damaged units, and what was made from them, pending; resume-failed then makes them again.
        store: The store.
    """
    with CallbackBar("verify", "MB") as bar:
        checked = examine(store, run or None, share / 100, seed, READERS, bar)
    mended: list[str] = []
    if repair and checked.damage:
        with turn(store):
            mended = mend(store, checked.damage)
    create_markdown_artifact(
        _page(store, checked, mended, repair), key_of("verify"), f"Verification of {store}"
    )
    if checked.damage:
        raise DamagedError(f"{damage_text(checked.damage)} The artifact verify lists it.")
    found = {"damaged": 0, "leftovers": len(checked.leftovers)}
    return cast("dict[str, Any]", Completed(message=f"{checked.text} {NO_DAMAGE}", data=found))


def _page(store: str, checked: Examination, mended: Sequence[str], repair: bool) -> str:
    """Write in Markdown what was found, and what was or can be done."""
    parts = [f"## {store}", checked.text]
    if checked.leftovers:
        parts.append(f"{leftovers_text(checked)}: `{command_text('gc', store)}`")
    if not checked.damage:
        return "\n\n".join([*parts, NO_DAMAGE])
    parts += [damage_text(checked.damage), _table(checked.damage)]
    if repair:
        parts.append("### Mended\n\n```\n" + "\n".join(mended) + "\n```")
    else:
        parts.append(
            "To make what is damaged again: run this deployment with **repair**, or "
            f"`{command_text('verify', store, '--repair')}`."
        )
    return "\n\n".join(parts)


def _table(damage: "Sequence[Finding]") -> str:
    """A table of damage, a row a file."""
    units = list(by_units(damage).items())
    rows = [
        f"| {stage or 'the store'} | {unit} | {finding.problem} | `{finding.path}` |"
        for (stage, unit), found in units[:LISTED]
        for finding in found
    ]
    more = [f"\nAnd {len(units) - LISTED:,} more units."] if len(units) > LISTED else []
    return "\n".join(["| stage | unit | what is wrong | file |", "|---|---|---|---|", *rows, *more])

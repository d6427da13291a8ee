"""`negfacediff contexts`: how close the identities of the datasets in a store are to each other."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from negfacediff_core.errors import StoreError

if TYPE_CHECKING:
    from negfacediff_core.store.layout import StageSpec


class Spread(NamedTuple):
    """How close the first `identities` contexts of a run are, and those of a uniform draw of as many."""

    run: str
    source: str
    identities: int
    worst: float
    pair: tuple[int, int]
    mean: float
    uniform_worst: float
    uniform_mean: float
    bound: float


def contexts(
    store: Annotated[str, typer.Argument(help="Folder or fsspec URL of a store.")],
    most: Annotated[
        int, typer.Option(min=2, help="Compare the first identities of each run, at most this many.")
    ] = 10_000,
) -> None:
    """Show how close the identities of every run in a store are to each other, beside a uniform draw.

    worst is the cosine of the closest pair, nearest the mean cosine of an identity to its nearest other one;
    of uniform stands the same of as many contexts drawn uniformly. No arrangement has a worst cosine below
    the bound. Reads what is stored; runs whose contexts are not complete are left out.
    """
    table = Table("run", box=None, pad_edge=False)
    table.add_column("source", no_wrap=True)
    for column in ("identities", "worst", "of uniform", "pair", "nearest", "of uniform", "bound"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in spreads(store, most):
        table.add_row(
            one.run,
            one.source,
            f"{one.identities:,}",
            *(f"{cosine:.3f}" for cosine in (one.worst, one.uniform_worst)),
            "{}, {}".format(*one.pair),
            *(f"{cosine:.3f}" for cosine in (one.mean, one.uniform_mean, one.bound)),
        )
    if not table.row_count:
        raise StoreError(f"No run in {store} has its contexts yet: check the path, or build a dataset first.")
    Console().print(table)


def spreads(store: str, most: int) -> Iterator[Spread]:
    """Yield the spread of every run whose contexts are committed, by the name of the run."""
    import numpy as np

    from negfacediff_core.contexts import closest, lowest_worst_cosine, uniform
    from negfacediff_core.stages.contexts import contexts_of
    from negfacediff_core.store.layout import read_spec
    from negfacediff_core.store.records import committed
    from negfacediff_core.store.runs import read_runs

    for name, run in sorted(read_runs(store).items()):
        place = run["stages"].get("contexts")
        if place is None:
            continue
        spec = read_spec(store, "contexts", place["fingerprint"])
        numbers = np.arange(min(place["identities"], most))
        done = {unit.identity_block for unit in committed(spec)}
        if not done.issuperset(numbers // spec.grid.block_identities):
            continue
        width = spec.config["width"]
        near, even = closest(contexts_of(spec, numbers)), closest(uniform(0, numbers, width))
        first = int(near.cosine.argmax())
        yield Spread(
            run=name,
            source=_source(spec),
            identities=len(numbers),
            worst=float(near.cosine[first]),
            pair=(first, int(near.other[first])),
            mean=float(near.cosine.mean()),
            uniform_worst=float(even.cosine.max()),
            uniform_mean=float(even.cosine.mean()),
            bound=lowest_worst_cosine(len(numbers), width),
        )


def _source(spec: "StageSpec") -> str:
    """The source; of a fitted one, how far its covariance was shrunk if the file is still there."""
    from negfacediff_core.contexts import load_identities

    name, weight = spec.config["source"], spec.weights.get("contexts")
    if name != "fitted" or weight is None or not Path(weight.path).exists():
        return str(name)
    return f"fitted, shrinkage {load_identities(weight.path).shrinkage:.3f}"

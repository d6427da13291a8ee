"""The flow `sweep`: one dataset a setting and seed, from a base preset, and what comes of each."""

import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any, NamedTuple

from prefect import flow
from pydantic import Field, ValidationError

from flows.build import DEFAULT_EXECUTION, build_dataset
from flows.presets import explain, load_build, read_values
from flows.sweep_page import plot_of, table_of
from negfacediff_core.config import BuildConfig, ExecutionConfig, Model, Seed
from negfacediff_core.errors import ConfigError
from negfacediff_core.store.location import locate

#: The fields that a seed of the sweep sets.
SEEDED = ("contexts.seed", "negatives.seed", "samples.seed")


class Variation(Model):
    """One setting of a sweep."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,40}$", description="Names its builds.")
    group: str = Field(description="What it is plotted and listed with.")
    set: dict[str, Any] = Field(default_factory=dict, description="Fields of a build and their values.")


class Sweep(Model):
    """Builds that differ from a base in a few fields each, every one with several seeds."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,15}$", description="Begins the names of its builds.")
    title: str = Field(description="Heads the table and the plot.")
    axis: str = Field(pattern="^(evaluations|w)$", description="What the plot's horizontal axis shows.")
    base: str = Field(description="A preset, or a YAML file.")
    seeds: list[Seed] = Field(min_length=1, description="Each build is made with each of them.")
    set: dict[str, Any] = Field(default_factory=dict, description="Fields of all builds.")
    builds: list[Variation] = Field(min_length=1, description="The settings.")


class Case(NamedTuple):
    """One build of a sweep."""

    variation: Variation
    seed: int
    build: BuildConfig


def sweep_texts() -> dict[str, str]:
    """Return the sweeps that ship: name -> YAML text, sorted by name."""
    found = {item.name: item for item in (files("deployments") / "sweeps").iterdir()}
    return {
        name.removesuffix(".yaml"): found[name].read_text(encoding="utf-8")
        for name in sorted(found)
        if name.endswith(".yaml")
    }


def sweep_text(name: str) -> str:
    """Return the YAML text of the sweep `name`; raises ConfigError."""
    texts = sweep_texts()
    if name not in texts:
        raise ConfigError(
            f"There is no sweep {name!r}: sweeps are {', '.join(texts)}; a file of your own ends in .yaml."
        )
    return texts[name]


def load_sweep(source: str) -> Sweep:
    """Read a shipped sweep by name, or a YAML file; raises ConfigError."""
    values = read_values(source, sweep_text)
    try:
        return Sweep.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, Sweep)}") from error


def cases(sweep: Sweep) -> Iterator[Case]:
    """Yield the builds, setting by setting; raises ConfigError for one that cannot be."""
    for variation in sweep.builds:
        for seed in sweep.seeds:
            fields = {
                **sweep.set,
                **variation.set,
                **dict.fromkeys(SEEDED, seed),
                "name": f"{sweep.name}-{variation.name}-{seed}",
            }
            settings = [f"{field}={json.dumps(value)}" for field, value in fields.items()]
            yield Case(variation, seed, load_build(sweep.base, settings))


@flow(name="sweep", flow_run_name="{sweep.name}")
def run_sweep(
    sweep: Sweep, store: str = "store", out: str = "sweep", execution: ExecutionConfig = DEFAULT_EXECUTION
) -> list[dict[str, Any]]:
    """Build every case in `store`; write rows.json, table.md and the plot to the folder `out` as they come.

    Returns the rows: `variation`, `group`, `seed` and the figures of each build.
    """
    folder = locate(out)
    folder.check_writable()
    rows: list[dict[str, Any]] = []
    for case in cases(sweep):
        figures = build_dataset(case.build, execution, store)["figures"]
        named = {"variation": case.variation.name, "group": case.variation.group, "seed": case.seed}
        rows.append({**named, **figures})
        folder.write_atomic("rows.json", (json.dumps(rows, indent=1) + "\n").encode())
        folder.write_atomic("table.md", table_of(rows).encode())
        for form in ("png", "svg"):
            folder.write_atomic(f"plot.{form}", plot_of(rows, sweep.axis, sweep.title, form))
    return rows

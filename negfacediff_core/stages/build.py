"""The table of stages, and what is done over all of them: planning a build, running a unit of any stage."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.errors import BuildError, NegFaceDiffError, StoreError
from negfacediff_core.stages import (
    aligned,
    contexts,
    embeddings,
    evaluation,
    gallery,
    leakage,
    negatives,
    neighbours,
    samples,
    scores,
)
from negfacediff_core.store.layout import StageSpec, Unit, adopt, read_spec
from negfacediff_core.store.location import locate
from negfacediff_core.store.records import Record, has_record, read_record
from negfacediff_core.store.runs import read_run


class Stage(NamedTuple):
    """A row of the table.

    `plan` describes the stage of a build, given those before it, and checks what it needs without writing;
    `run_unit` makes and commits one unit.
    """

    plan: Callable[[BuildConfig, str, Mapping[str, StageSpec]], StageSpec]
    run_unit: Callable[[StageSpec, Unit, ExecutionConfig], Record]


STAGES: dict[str, Stage] = {
    name: Stage(module.plan, module.run_unit)
    for name, module in (
        ("contexts", contexts),
        ("negatives", negatives),
        ("samples", samples),
        ("aligned", aligned),
        ("embeddings", embeddings),
        ("scores", scores),
        ("evaluation", evaluation),
    )
}

# What runs a unit of any stage: those of a build, and those of a leakage gate.
_RUN_UNIT = {
    **{name: stage.run_unit for name, stage in STAGES.items()},
    "gallery": gallery.run_unit,
    "neighbours": neighbours.run_unit,
    "leakage": leakage.run_unit,
}


def plan_build(build: BuildConfig, store: str) -> list[StageSpec]:
    """Describe every stage of a build as `describe_build`, and check that the store can be written.

    Nothing is written but, at the end, a probe in the store, which is removed. Raises as `describe_build`.
    """
    specs = describe_build(build, store)
    locate(store).check_writable()
    return specs


def describe_build(build: BuildConfig, store: str) -> list[StageSpec]:
    """Describe every stage of a build, in order, after checking all that it needs; writes nothing.

    Weights are found, hashed and loaded, the contexts file is read, settings are tried on the generator, and
    the directories that exist are compared with what this build would make.

    Raises:
        ConfigError, WeightsError, ContextsError: for what the build asks for.
        StoreError: for the place where it should go.
    """
    # A worker elsewhere would take a relative path from its own folder.
    store = locate(store).url
    build = _with_pool(build, store)
    specs: dict[str, StageSpec] = {}
    for name, stage in STAGES.items():
        specs[name] = adopt(stage.plan(build, store, specs))
    _cover(specs)
    return list(specs.values())


def run_unit(spec: StageSpec, unit: Unit, execution: ExecutionConfig) -> Record:
    """Make and commit one unit of any stage; a unit that is committed is left as it is.

    Networks are loaded once a process. Sets the number of torch's threads in this process.

    Raises:
        NegFaceDiffError: of the kind that it was, naming the unit; BuildError for any other error.
    """
    if has_record(spec, unit):
        return read_record(spec, unit)
    torch.set_num_threads(execution.threads_per_worker)
    try:
        return _RUN_UNIT[spec.name](spec, unit, execution)
    except NegFaceDiffError as error:
        raise type(error)(f"{spec.name} {unit.name}: {error}") from error
    except Exception as error:
        raise BuildError(f"{spec.name} {unit.name}: {type(error).__name__}: {error}") from error


def _with_pool(build: BuildConfig, store: str) -> BuildConfig:
    """Set the pool of negatives where the build leaves it open.

    It is that of the run of this name, if that has the same contexts, so that growth moves no negative;
    otherwise the build's own identities.
    """
    if build.negatives.pool:
        return build
    pool = build.identities
    run = read_run(store, build.name)
    drawn = contexts.plan(build, store, {}).fingerprint
    stages = {} if run is None else run["stages"]
    if {"contexts", "negatives"} <= stages.keys() and stages["contexts"]["fingerprint"] == drawn:
        digest = stages["negatives"]["fingerprint"]
        if not locate(store).at(f"negatives/{digest}").exists("stage.json"):
            raise StoreError(
                f"{store}/negatives/{digest} is missing, which tells the pool that the negatives of "
                f"{build.name} were picked from; set negatives.pool to the number of identities of its first "
                "build, and no negative moves."
            )
        pool = read_spec(store, "negatives", digest).config.get("pool", pool)
    return build.model_copy(update={"negatives": build.negatives.model_copy(update={"pool": pool})})


def _cover(specs: dict[str, StageSpec]) -> None:
    """Extend contexts and negatives to the end of the last block of samples.

    A last block is filled beyond the dataset's identities, and its length need not divide that of a block of
    contexts.
    """
    samples = specs["samples"].grid
    end = samples.identities_of(samples.units()[-1]).stop
    for name in ("contexts", "negatives"):
        grid = specs[name].grid
        specs[name] = replace(specs[name], grid=replace(grid, identities=max(grid.identities, end)))

"""Run records: `runs/<name>.json` binds a human name to the stages of one build."""

import re
from dataclasses import replace
from typing import Any

from negfacediff_core.errors import StoreError
from negfacediff_core.store.layout import (
    SCHEMA_VERSION,
    StageSpec,
    damaged,
    read_spec,
    read_versioned,
    write_json,
)
from negfacediff_core.store.location import locate

# A build's name has 63 characters at most; that of what a gate makes of it names the gallery besides, and
# what was kept can be gated again.
_LONGEST = 200
_NAME = re.compile(rf"[a-z0-9][a-z0-9._-]{{0,{_LONGEST - 1}}}")
_AXES = ("identities", "replicates")
# What the run of a dataset has at least.
_OF_A_DATASET = {"samples", "aligned", "embeddings", "evaluation"}
# No build is larger; the units of a damaged record's extent must not fill the memory.
_MOST = 10_000_000
_MOST_SAMPLES = 10_000_000_000


def write_run(store: str, name: str, content: dict[str, Any]) -> None:
    """Write a run record atomically, over an older one of the same name.

    `content` holds at least `stages`: by stage name its `fingerprint`, `identities` and `replicates`.
    """
    write_json(locate(store), _path(name), {"schema": SCHEMA_VERSION, "name": name, **content})


def read_run(store: str, name: str) -> dict[str, Any] | None:
    """Read a run record; None when there is none of that name.

    Raises:
        StoreError: if it is damaged: not JSON, of a newer schema, or without what `write_run` asks for.
    """
    location = locate(store)
    path = _path(name)
    if not location.exists(path):
        return None
    content = read_versioned(location, path)
    stages = content.get("stages")
    if not isinstance(stages, dict) or not all(map(_is_place, stages.values())):
        raise damaged(f"{location.url}/{path}")
    return content


def read_runs(store: str) -> dict[str, dict[str, Any]]:
    """Read all run records of a store by name."""
    return {name: run for name in run_names(store) if (run := read_run(store, name)) is not None}


def run_names(store: str) -> list[str]:
    """Return the names of the run records of a store; files whose names no run can have are passed over."""
    files = [name for name in locate(store).names("runs") if name.endswith(".json")]
    return [name for file in files if _NAME.fullmatch(name := file.removesuffix(".json"))]


def check_run(store: str, name: str) -> None:
    """Raise StoreError, naming the runs that are there, unless a store has a record of this name."""
    names = run_names(store)
    if name not in names:
        raise StoreError(f"There is no run {name} in {store}; runs there: {', '.join(names) or 'none'}.")


def stages_of_run(store: str, run: str) -> dict[str, StageSpec]:
    """Return the stages of a dataset's run as they stand in the store, by name, with the run's extents.

    Neither the weights nor the code that made them are needed.

    Raises:
        StoreError: if there is no such run, or it is not one of a dataset.
    """
    check_run(store, run)
    record = read_run(store, run) or {"stages": {}}
    missing = _OF_A_DATASET - record["stages"].keys()
    if missing:
        raise StoreError(f"The run {run} in {store} has no {', '.join(sorted(missing))}: it is no dataset.")
    return {name: _placed(store, name, place) for name, place in record["stages"].items()}


def _placed(store: str, name: str, place: dict[str, Any]) -> StageSpec:
    spec = read_spec(store, name, place["fingerprint"])
    extent = {axis: place[axis] for axis in _AXES}
    return replace(spec, grid=replace(spec.grid, **extent))


def _is_place(value: Any) -> bool:
    """Tell whether `value` is what a run holds for a stage: its directory and the run's extent in it."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("fingerprint"), str)
        and all(isinstance(value.get(axis), int) and 0 <= value[axis] <= _MOST for axis in _AXES)
        and value[_AXES[0]] * value[_AXES[1]] <= _MOST_SAMPLES
    )


def _path(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise StoreError(
            f"{name!r} cannot name a run; use 1 to {_LONGEST} lower-case letters, digits, dots, dashes and "
            "underscores, the first a letter or a digit."
        )
    return f"runs/{name}.json"

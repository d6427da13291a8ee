"""Where things lie: fingerprints, units, grids of units, and the description of one stage directory.

<store>/<stage>/<fingerprint>/stage.json                  what made it, written once
                              arrays.zarr/                one shard a unit
                              rows/part-<unit>.parquet    one row a sample
                              done/<unit>.json            written last: the unit is complete
<store>/runs/<name>.json                                  binds a name to the stages of one build
"""

import hashlib
import json
import math
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter
from pydantic_core import from_json

from negfacediff_core.errors import DamagedError, StoreError
from negfacediff_core.store.location import Location, locate
from negfacediff_core.store.place import gone

# What the JSON files of a store are written in, and how those of each schema are read: by a function that
# turns their content into that of this schema. A schema that is not in the table is refused.
SCHEMA_VERSION = 1
READERS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: dict}
# Part of every fingerprint. No schema version: a store of an older schema keeps its places.
_PLACES = 1
_EXTENT = ("identities", "replicates")


def fingerprint(content: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits: the start of the SHA-256 of the canonical JSON of `content`."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def code_version() -> str:
    """Return the installed version of this package, or "unknown" when it runs from a bare source tree."""
    try:
        return version("negfacediff")
    except PackageNotFoundError:
        return "unknown"


class Unit(NamedTuple):
    """A block of identities x a block of replicates: what one worker makes and commits at a time.

    Two numbers, because a single running number would rename units whenever either axis grows.
    """

    identity_block: int
    replicate_block: int

    @property
    def name(self) -> str:
        """The name in file names, e.g. `00042-000`."""
        return f"{self.identity_block:05d}-{self.replicate_block:03d}"

    @classmethod
    def parse(cls, name: str) -> "Unit":
        """Read a unit's name back; ValueError for anything else."""
        if not isinstance(name, str):
            raise ValueError(f"{name!r} is not the name of a unit")
        identity_block, replicate_block = name.split("-")
        unit = cls(int(identity_block), int(replicate_block))
        if unit.name != name:
            raise ValueError(f"{name!r} is not the name of a unit")
        return unit


@dataclass(frozen=True)
class Grid:
    """The units that cover `identities` x `replicates`, in blocks that a store never changes.

    The last unit of an axis is a whole block, so that growth never rewrites a committed one; only at
    `limit`, the number of identities that exist at all (a contexts file has an end), a block is cut.
    """

    identities: NonNegativeInt
    replicates: NonNegativeInt
    block_identities: PositiveInt
    block_replicates: PositiveInt
    limit: NonNegativeInt | None = None

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of blocks along identities and along replicates."""
        identity_blocks = math.ceil(self.identities / self.block_identities)
        return identity_blocks, math.ceil(self.replicates / self.block_replicates)

    def units(self) -> list[Unit]:
        """All units of the extent, replicates running fastest."""
        identity_blocks, replicate_blocks = self.blocks
        return [Unit(i, r) for i in range(identity_blocks) for r in range(replicate_blocks)]

    def identities_of(self, unit: Unit) -> range:
        """The identities of a unit."""
        start = unit.identity_block * self.block_identities
        stop = start + self.block_identities
        return range(start, stop if self.limit is None else min(stop, self.limit))

    def replicates_of(self, unit: Unit) -> range:
        """The replicates of a unit."""
        start = unit.replicate_block * self.block_replicates
        return range(start, start + self.block_replicates)


@dataclass(frozen=True)
class Weight:
    """A weight file or folder and the SHA-256 of each file by its role; the path is not fingerprinted."""

    path: str
    sha256: dict[str, str]


@dataclass(frozen=True)
class ArraySpec:
    """One array: `(identity, replicate, *item)`, without `replicate` in a stage that is not per replicate."""

    name: Annotated[str, Field(pattern=r"^\w+$")]
    dtype: str
    item: tuple[PositiveInt, ...]


@dataclass(frozen=True)
class StageSpec:
    """Everything that describes one stage of one build; frozen, picklable, and written to `stage.json`.

    `version` is raised when the code changes what the stage makes. `config` holds only what changes the
    result, `inputs` the fingerprints of the stages that are read, `columns` the names and Arrow types of the
    rows. `grid` holds this build's extent, no part of the fingerprint.
    """

    store: str
    name: str
    version: int
    config: dict[str, Any]
    inputs: dict[str, str]
    grid: Grid
    weights: dict[str, Weight] = field(default_factory=dict)
    arrays: tuple[ArraySpec, ...] = ()
    columns: tuple[tuple[str, str], ...] = ()
    per_replicate: bool = True

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that affects the result and of nothing else."""
        return fingerprint(
            {
                "schema": _PLACES,
                "stage": self.name,
                "version": self.version,
                "config": self.config,
                "inputs": self.inputs,
                "weights": {role: weight.sha256 for role, weight in self.weights.items()},
            }
        )

    @property
    def path(self) -> str:
        """The stage directory, relative to the store."""
        return f"{self.name}/{self.fingerprint}"

    @property
    def directory(self) -> str:
        """The stage directory as a path or URL."""
        return self.location.url

    @cached_property
    def location(self) -> Location:
        """The stage directory as a place to read and write."""
        return locate(self.store).at(self.path)

    def __getstate__(self) -> dict[str, Any]:
        # A location may hold a network client: each process makes its own.
        return {name: value for name, value in self.__dict__.items() if name != "location"}

    def input(self, name: str) -> "StageSpec":
        """Return the input stage `name` as it stands in the store; its grid has no extent.

        Raises:
            PlaceError: if it has gone, so that no unit of this stage could be made; else as `read_spec`.
        """
        digest = self.inputs[name]
        try:
            return read_spec(self.store, name, digest)
        except DamagedError:
            raise
        except StoreError as error:
            there = locate(self.store).at(f"{name}/{digest}")
            if not there.exists("stage.json"):
                raise gone(there.url) from error
            raise


_SPEC = TypeAdapter(StageSpec)


def array_path(spec: StageSpec, array: ArraySpec, unit: Unit) -> str:
    """Return the path of a unit's shard in the stage directory: all shards of an array lie in one folder."""
    position = [unit.identity_block, *([unit.replicate_block] if spec.per_replicate else [])]
    return f"arrays.zarr/{array.name}/c." + ".".join(map(str, [*position, *[0] * len(array.item)]))


def unit_paths(spec: StageSpec, unit: Unit) -> list[str]:
    """Return the paths of the files that every unit of a stage has beside its record: shards and rows."""
    return [*(array_path(spec, array, unit) for array in spec.arrays), part_path(unit)]


def part_path(unit: Unit) -> str:
    """Return the path of a unit's rows, relative to the stage directory."""
    return f"rows/part-{unit.name}.parquet"


def record_path(unit: Unit) -> str:
    """Return the path of a unit's completion record, relative to the stage directory."""
    return f"done/{unit.name}.json"


def read_spec(store: str, name: str, digest: str) -> StageSpec:
    """Read a stage directory's `stage.json`; the grid of the result has its blocks but no extent.

    Raises:
        StoreError: if it is missing, damaged, of a newer schema, or not what its directory's name says.
    """
    if not re.fullmatch(r"[a-z_]+/[0-9a-f]{16}", f"{name}/{digest}"):
        raise StoreError(
            f"{name}/{digest} is no stage directory: its name is a stage and 16 hexadecimal digits."
        )
    location = locate(store).at(f"{name}/{digest}")
    content = read_versioned(location, "stage.json")
    checksum = content.pop("checksum", None)  # those of older versions have none
    try:
        if checksum not in (None, fingerprint(content)):
            raise ValueError("it has another checksum")
        fields = {name: content[name] for name in ("config", "inputs", "weights", "arrays", "columns")}
        spec = _SPEC.validate_python(
            {
                "store": store,
                "name": content["stage"],
                "version": content["stage_version"],
                "grid": {"identities": 0, "replicates": 0, **content["blocks"]},
                "per_replicate": content["per_replicate"],
                **fields,
            }
        )
        if (spec.name, spec.fingerprint) != (name, digest):
            raise ValueError(f"it describes {spec.path}")
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(f"{location.url}/stage.json") from error
    return spec


def adopt(spec: StageSpec) -> StageSpec:
    """Return `spec` with the blocks that its directory already has, if it is there; writes nothing.

    Raises:
        StoreError: if the directory was made with other arrays or columns, or by a newer schema.
    """
    if not spec.location.exists("stage.json"):
        return spec
    existing = read_spec(spec.store, spec.name, spec.fingerprint)
    if replace(existing, grid=spec.grid, weights=spec.weights) != spec:
        raise StoreError(
            f"{spec.directory} was made with other arrays or columns than this version of the code writes; "
            "use the version that made it, or another store."
        )
    blocks = existing.grid
    return replace(
        spec, grid=replace(blocks, identities=spec.grid.identities, replicates=spec.grid.replicates)
    )


def establish(spec: StageSpec) -> None:
    """Write `stage.json` unless it is there already. Hold the stage's lock.

    Raises:
        StoreError: if it is there with other blocks, because another build has just made it.
    """
    if spec.location.exists("stage.json"):
        if adopt(spec).grid != spec.grid:
            raise StoreError(
                f"another build made {spec.directory} with other block sizes meanwhile; "
                "run the same command again."
            )
        return
    blocks = {key: value for key, value in asdict(spec.grid).items() if key not in _EXTENT}
    content = {
        "schema": SCHEMA_VERSION,
        "stage": spec.name,
        "stage_version": spec.version,
        "fingerprint": spec.fingerprint,
        "code": code_version(),
        "config": spec.config,
        "inputs": spec.inputs,
        "weights": {role: asdict(weight) for role, weight in spec.weights.items()},
        "arrays": [asdict(array) for array in spec.arrays],
        "columns": spec.columns,
        "per_replicate": spec.per_replicate,
        "blocks": blocks,
    }
    write_json(spec.location, "stage.json", content | {"checksum": fingerprint(content)})


def read_versioned(location: Location, path: str) -> dict[str, Any]:
    """Read a JSON file of any schema that is in `READERS`; the content is returned in the current one.

    Raises:
        DamagedError: if it is not JSON, or says nothing of its schema.
        StoreError: if it is missing, or of a schema that is newer, or so old that it is no longer read.
    """
    return parse_versioned(location.read_bytes(path), f"{location.url}/{path}")


def parse_versioned(data: bytes, where: str) -> dict[str, Any]:
    """Parse what was read of the JSON file `where`; result and errors as `read_versioned`."""
    content = parse_json(data, where)
    schema = content.get("schema")
    if not isinstance(schema, int) or schema < 1:
        raise damaged(where)
    if schema > SCHEMA_VERSION:
        raise StoreError(
            f"{where} has schema version {schema}, but this version reads up to {SCHEMA_VERSION}; upgrade "
            "negfacediff or use another store."
        )
    if schema not in READERS:
        raise StoreError(
            f"{where} has schema version {schema}, but this version reads {min(READERS)} to "
            f"{SCHEMA_VERSION}; use the older version of negfacediff that made it, or make the dataset anew "
            "in another store: negfacediff build PRESET --store NEW_STORE"
        )
    return READERS[schema](content)


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object that was read of the file `where`; DamagedError for anything else."""
    try:
        # As json.loads, in half the time: a stage may have 100,000 records. What nests too deep is refused.
        content = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise damaged(where) from error
    if not isinstance(content, dict):
        raise damaged(where)
    return content


def write_json(location: Location, path: str, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, readable by people."""
    location.write_atomic(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def repair_command(store: str) -> str:
    """Return the command that mends a store, as one can paste it into a shell."""
    return shlex.join(["negfacediff", "verify", store, "--repair"])


def damaged(where: str) -> DamagedError:
    """Return the error for the file `where`, whose content is not what the project writes."""
    return DamagedError(
        f"{where} is damaged: it is not what was written there; negfacediff verify STORE --repair says what "
        "can be mended, and mends it."
    )

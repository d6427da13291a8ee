"""Completion records: the only truth about what is done."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from negfacediff_core.errors import StoreError
from negfacediff_core.store.layout import (
    SCHEMA_VERSION,
    StageSpec,
    Unit,
    check_schema,
    read_json,
    record_path,
    write_json,
)


@dataclass(frozen=True)
class Record:
    """What is known of a committed unit.

    `ok` and `failed` count the rows by their status (a row without one is ok). `sha256` holds the hash of
    every file of the unit by its path in the stage directory, `seconds` the time of each phase, `started` and
    `finished` unix times.
    """

    unit: Unit
    rows: int
    ok: int
    failed: int
    sha256: dict[str, str]
    seconds: dict[str, float]
    started: float
    finished: float
    host: str
    device: str

    def to_json(self) -> dict[str, Any]:
        """Return the record as it stands in its file."""
        return {"schema": SCHEMA_VERSION, **self.__dict__, "unit": self.unit.name}


def write_record(spec: StageSpec, record: Record) -> None:
    """Write a completion record atomically; this is what makes its unit done."""
    write_json(spec.location, record_path(record.unit), record.to_json())


def read_record(spec: StageSpec, unit: Unit) -> Record:
    """Read a unit's record.

    Raises:
        StoreError: if the unit is not committed, or its record is damaged.
    """
    if not has_record(spec, unit):
        raise StoreError(f"unit {unit.name} of {spec.directory} is not committed; build that stage first.")
    content = read_json(spec.location, record_path(unit))
    check_schema(content, f"{spec.directory}/{record_path(unit)}")
    content.pop("schema")
    try:
        record = Record(**{**content, "unit": Unit.parse(content["unit"])})
        if record.unit != unit:
            raise ValueError(f"a record of unit {record.unit.name}")
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{spec.directory}/{record_path(unit)} is damaged ({error}); delete it and run the build again: "
            "the unit is then made anew."
        ) from error
    return record


def has_record(spec: StageSpec, unit: Unit) -> bool:
    """Tell whether a unit is committed."""
    return spec.location.exists(record_path(unit))


def committed(spec: StageSpec) -> list[Unit]:
    """Return all committed units of a stage directory, whatever the extent of the build that made them.

    Files that other programs left beside the records (copies, notes) are passed over.
    """
    units = []
    for name in spec.location.names("done"):
        with suppress(ValueError):
            unit = Unit.parse(name.removesuffix(".json"))
            if name == f"{unit.name}.json":
                units.append(unit)
    return units


def records(spec: StageSpec) -> list[Record]:
    """Return the records of all committed units of a stage directory."""
    return [read_record(spec, unit) for unit in committed(spec)]


def pending(spec: StageSpec) -> list[Unit]:
    """Return the units of the stage's extent that are not committed, in order; one listing of the disk."""
    done = set(committed(spec))
    return [unit for unit in spec.grid.units() if unit not in done]

"""Completion records: the only truth about what is done."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, FiniteFloat, InstanceOf, TypeAdapter, ValidationError

from negfacediff_core.errors import DamagedError, StoreError
from negfacediff_core.store.layout import (
    SCHEMA_VERSION,
    StageSpec,
    Unit,
    fingerprint,
    parse_versioned,
    record_path,
    repair_command,
)


def _inside(path: str) -> str:
    """Refuse a path that leads out of the stage directory: whoever removes a unit removes these."""
    if not path or path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path!r} is no path of a unit's file")
    return path


Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Path = Annotated[str, AfterValidator(_inside)]


@dataclass(frozen=True)
class Record:
    """What is known of a committed unit.

    `ok` and `failed` count the rows by their status (a row without one is ok). `sha256` holds the hash of
    every file of the unit by its path in the stage directory, `seconds` the time of each phase, `started` and
    `finished` unix times.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    unit: InstanceOf[Unit]
    rows: Count
    ok: Count
    failed: Count
    sha256: dict[Path, str]
    seconds: dict[str, FiniteFloat]
    started: FiniteFloat
    finished: FiniteFloat
    host: str
    device: str

    def to_json(self) -> dict[str, Any]:
        """Return the record as it stands in its file, but for the checksum there."""
        return {"schema": SCHEMA_VERSION, **self.__dict__, "unit": self.unit.name}

    def to_bytes(self) -> bytes:
        """Return the content of the record's file: JSON that people can read, with a checksum of itself."""
        return _sealed(json.dumps(self.to_json(), indent=2, allow_nan=False).encode()[: -len(b"\n}")])


_RECORD = TypeAdapter(Record)
_SEAL = b',\n  "checksum": "'
_NAME = re.compile(r"(\d{5,})-(\d{3,})\.json")


def _sealed(body: bytes) -> bytes:
    """Return the bytes of a record that begins with `body`: its last member is the checksum of all before.

    A checksum of bytes tells that they are whole in a tenth of the time that writing the content again takes.
    """
    return body + _SEAL + hashlib.sha256(body).hexdigest()[:16].encode() + b'"\n}\n'


def write_record(spec: StageSpec, record: Record) -> None:
    """Write a completion record atomically; this is what makes its unit done."""
    spec.location.write_atomic(record_path(record.unit), record.to_bytes())


def read_record(spec: StageSpec, unit: Unit) -> Record:
    """Read a unit's record.

    Raises:
        StoreError: if the unit is not committed; DamagedError if its record is damaged.
    """
    if not has_record(spec, unit):
        raise StoreError(f"unit {unit.name} of {spec.directory} is not committed; build that stage first.")
    return _read(spec, unit)


def _read(spec: StageSpec, unit: Unit) -> Record:
    data = spec.location.read_bytes(record_path(unit))
    content = parse_versioned(data, f"{spec.directory}/{record_path(unit)}")
    content.pop("schema")
    checksum = content.pop("checksum", None)
    try:
        # Older records have a checksum of the content, and the first ones none.
        if data != _sealed(data.rpartition(_SEAL)[0]) and checksum not in (None, fingerprint(content)):
            raise ValueError("it has another checksum")
        if content["unit"] != unit.name:
            raise ValueError("it is of another unit")
        return _RECORD.validate_python({**content, "unit": unit})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(
            f"{spec.directory}/{record_path(unit)} is damaged ({_reason(error)}); "
            f"{repair_command(spec.store)} has the unit made anew, and what was made from it."
        ) from error


def _reason(error: Exception) -> str:
    """Say what is wrong in one line, where pydantic takes several."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)


def forget(spec: StageSpec, unit: Unit) -> None:
    """Make a unit pending: remove its record, and leave its data to be overwritten."""
    spec.location.remove(record_path(unit))


def has_record(spec: StageSpec, unit: Unit) -> bool:
    """Tell whether a unit is committed."""
    return spec.location.exists(record_path(unit))


def committed(spec: StageSpec) -> list[Unit]:
    """Return all committed units of a stage directory, whatever the extent of the build that made them.

    Files that other programs left beside the records (copies, notes) are passed over.
    """
    units = (unit_of(name) for name in spec.location.names("done"))
    return [unit for unit in units if unit is not None]


def unit_of(name: str) -> Unit | None:
    """Return the unit whose record has the file name `name`; None if that is no record's name."""
    match = _NAME.fullmatch(name)
    unit = match and Unit(int(match[1]), int(match[2]))
    return unit if unit and name == f"{unit.name}.json" else None


def records(spec: StageSpec) -> list[Record]:
    """Return the records of all committed units of a stage directory."""
    return list(each_record(spec))


def each_record(spec: StageSpec) -> Iterator[Record]:
    """Yield what `records` returns one by one, for those who keep little of each: there may be 100,000."""
    return (_read(spec, unit) for unit in committed(spec))


def pending(spec: StageSpec) -> list[Unit]:
    """Return the units of the stage's extent that are not committed, in order; one listing of the disk."""
    done = set(committed(spec))
    return [unit for unit in spec.grid.units() if unit not in done]

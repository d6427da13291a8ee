"""Parquet parts of a stage directory: one row a sample, the same fixed columns in every part."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from negfacediff_core.errors import DamagedError, StoreError
from negfacediff_core.store.layout import StageSpec


def schema(spec: StageSpec) -> pa.Schema:
    """Return the Arrow schema of a stage's rows."""
    return pa.schema([pa.field(name, pa.type_for_alias(type_)) for name, type_ in spec.columns])


def rows_of(spec: StageSpec, columns: Mapping[str, Any]) -> pa.Table:
    """Make a table of a stage's rows out of its columns: lists, arrays or Arrow columns."""
    return pa.table(dict(columns), schema=schema(spec))


def encode_part(spec: StageSpec, rows: pa.Table) -> bytes:
    """Return the bytes of a part that holds a unit's rows.

    Raises:
        StoreError: if the columns are not the stage's: readers rely on one schema over all parts.
    """
    if not rows.schema.equals(schema(spec)):
        raise StoreError(f"rows of {spec.path} have the columns {spec.columns}, not {rows.schema.names}.")
    buffer = pa.BufferOutputStream()
    pq.write_table(rows, buffer)
    return buffer.getvalue().to_pybytes()


def parse_part(spec: StageSpec, data: bytes) -> pa.Table:
    """Parse the bytes of a part of the stage.

    Raises:
        DamagedError: if they are no Parquet, or the columns are not the stage's.
    """
    try:
        # told the schema, the reader would fill missing columns and cast others
        rows = pq.read_table(pa.BufferReader(data))
        if not rows.schema.equals(schema(spec)):
            raise ValueError(f"its columns are {', '.join(rows.column_names)}")
        return rows
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        reason, names = " ".join(str(error).split()), ", ".join(name for name, _ in spec.columns)
        raise DamagedError(
            f"rows of {spec.directory} cannot be read ({reason}): a part is Parquet with the columns {names}."
        ) from error

"""Parquet files that Hugging Face's `datasets` loads: an Image feature, a class label, and columns."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from negfacediff_core.export.layout import (
    LABELS,
    Layout,
    Sample,
    Written,
    identity_name,
    label_lines,
    sample_name,
)

# Images of a row group: what a reader that wants one image must read.
_GROUP = 100


def write(piece: int, samples: Sequence[Sample], layout: Layout) -> Written:
    """Make one Parquet file of a piece."""
    path = f"data/train-{piece:05d}-of-{layout.pieces:05d}.parquet"
    keys = [f"{sample_name(sample)}.{layout.suffix}" for sample in samples]
    schema, buffer = _schema(layout), pa.BufferOutputStream()
    # images are compressed already
    compression = {name: "zstd" for name in schema.names if name != "image"}
    compression |= {"image.bytes": "none", "image.path": "zstd"}
    with pq.ParquetWriter(buffer, schema, compression=compression) as file:
        for start in range(0, len(samples), _GROUP):
            group = slice(start, start + _GROUP)
            file.write_table(_table(samples[group], keys[group], schema))
    return Written(
        files={path: buffer.getvalue().to_pybytes()},
        appends={LABELS: label_lines("path", keys, samples, layout)},
    )


def finish(folder: Path, layout: Layout) -> None:
    """Nothing is left to do: every Parquet file is whole."""


def _table(samples: Sequence[Sample], keys: Sequence[str], schema: pa.Schema) -> pa.Table:
    """The rows of a row group."""
    _, labels, identities, replicates, images, facts = zip(*samples, strict=True)
    image = pa.StructArray.from_arrays([pa.array(images, pa.binary()), pa.array(keys)], ["bytes", "path"])
    return pa.table([image, labels, identities, replicates, *zip(*facts, strict=True)], schema=schema)


def _schema(layout: Layout) -> pa.Schema:
    """The Arrow schema, with the features that `datasets` reads from its metadata."""
    numbers = ("identity", "replicate")
    names = [identity_name(identity) for identity in layout.identities.tolist()]
    features = {
        "image": {"_type": "Image"},
        "label": {"names": names, "_type": "ClassLabel"},
        **{name: {"dtype": "int64", "_type": "Value"} for name in numbers},
        **{name: {"dtype": "float32", "_type": "Value"} for name in layout.facts},
    }
    fields = [
        pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        pa.field("label", pa.int64()),
        *(pa.field(name, pa.int64()) for name in numbers),
        *(pa.field(name, pa.float32()) for name in layout.facts),
    ]
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})

"""Parquet files that Hugging Face's `datasets` loads: an Image feature, a class label, and columns."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    images = [{"bytes": one.image, "path": key} for one, key in zip(samples, keys, strict=True)]
    columns: dict[str, Any] = {
        "image": images,
        "label": [sample.label for sample in samples],
        "identity": [sample.identity for sample in samples],
        "replicate": [sample.replicate for sample in samples],
        **{name: [sample.facts[name] for sample in samples] for name in layout.facts},
    }
    buffer = pa.BufferOutputStream()
    # images are compressed already
    compression = {name: "zstd" for name in columns if name != "image"}
    pq.write_table(
        pa.table(columns, schema=_schema(layout)),
        buffer,
        row_group_size=_GROUP,
        compression={**compression, "image.bytes": "none", "image.path": "zstd"},
    )
    return Written(
        files={path: buffer.getvalue().to_pybytes()},
        appends={LABELS: label_lines("path", keys, samples, layout)},
    )


def finish(folder: Path, layout: Layout) -> None:
    """Nothing is left to do: every Parquet file is whole."""


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

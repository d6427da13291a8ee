"""Opening training sets: exports of every format, .rec sets of others, and folders of folders."""

import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv as tables

from negfacediff_core.contexts.images import list_images
from negfacediff_core.errors import ConfigError, ContextsError, DamagedError
from negfacediff_core.export.layout import LABELS
from negfacediff_core.export.read_recordio import HEADER, MAGIC, frame_of, parse_image
from negfacediff_core.recognition.datasets import (
    FileReader,
    Progress,
    Reader,
    SliceReader,
    TrainingSet,
    decode,
    pack,
)
from negfacediff_core.recognition.origins import Origin, origin_of
from negfacediff_core.recognition.tar_members import image_members


class _Labels(NamedTuple):
    """What labels.csv says of the images `(N,)`: where each is, and its label; `numbers` `(N, 2)`."""

    keys: tuple[str, ...]
    labels: NDArray[np.int64]
    numbers: NDArray[np.int64]


def open_set(source: Path, work: Path, progress: Progress) -> TrainingSet:
    """Open an export of any format, a .rec set, or a folder with a sub-folder of crops an identity.

    What cannot be read in any order is packed into the folder `work` first, of which `progress` is told.
    Of what is read where it lies, one crop is looked at: see `unreadable`.

    Raises:
        ConfigError: if there is no training set, or its crops are not of 112x112 pixels.
        StoreError: if a file of it cannot be read (DamagedError), or there is no room to pack (PlaceError).
    """
    if not source.is_dir():
        raise ConfigError(
            f"There is no folder {source}: give an export, a folder with train.rec, or one with a sub-folder "
            "of aligned crops an identity; for a run of a store, the store and the run's name."
        )
    for found, opened in OPENERS:
        if next(iter(source.glob(found)), None) is not None:
            training = opened(source, work, progress)
            break
    else:
        training = _open_folder(source)
    if training.classes < 2:
        raise ConfigError(f"{source} shows {training.classes} identities: training takes two at least.")
    training.read(np.zeros(1, np.int64))
    return training


def _open_exported_folder(source: Path, work: Path, progress: Progress) -> TrainingSet:
    """`images/<identity>/<image>` with labels.csv, as `negfacediff export` writes it."""
    said = _labels(source, "path")
    paths = [source / name for name in said.keys]
    return _numbered(FileReader(paths), said, origin_of(source, paths))


def _open_folder(source: Path) -> TrainingSet:
    """A sub-folder an identity."""
    try:
        listed = list_images(source)
    except ContextsError as error:
        raise ConfigError(f"{source} is no training set: {error}.") from error
    paths = [path for images in listed.images for path in images]
    labels = np.repeat(np.arange(len(listed.images)), [len(images) for images in listed.images])
    names = tuple(str(path.relative_to(source)) for path in paths)
    origin = origin_of(source, paths)
    return TrainingSet(FileReader(paths), names, labels.astype(np.int64), np.arange(len(paths)), origin)


def _open_records(source: Path, work: Path, progress: Progress) -> TrainingSet:
    """`train.rec` and `train.idx` of either variant; labels stand in the images' records."""
    path = source / "train.rec"
    index = _index(source / "train.idx")
    order = np.argsort(index[:, 1])
    keys, offsets = index[order, 0], index[order, 1]
    ends = np.append(offsets[1:], path.stat().st_size)
    with path.open("rb") as file:
        heads = [_record_head(file, int(offset), path) for offset in offsets]
    first = dict(zip(keys.tolist(), heads, strict=True)).get(0)
    if first is not None and len(first) > 1:
        # the header says where the images' keys end
        used = np.flatnonzero((keys >= 1) & (keys < first[0]))
    else:
        used = np.arange(len(keys))
    _, labels = np.unique([heads[one][0] for one in used], return_inverse=True)
    places = np.stack([np.zeros(len(used), np.int64), offsets[used], (ends - offsets)[used]], axis=1)
    names = tuple(str(key) for key in keys[used])
    reader = SliceReader([path], places, unpack_record)
    origin = origin_of(source, [path, source / "train.idx"])
    found = TrainingSet(reader, names, labels.astype(np.int64), np.arange(len(used)), origin)
    if not (source / LABELS).exists():
        return found
    said = _labels(source, "key")
    if said.keys != names:
        raise DamagedError(f"{source / LABELS} does not name the images of {path}: export them anew.")
    return replace(found, numbers=said.numbers)


def _index(path: Path) -> NDArray[np.int64]:
    """Keys and offsets `(N, 2)` of a train.idx."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of an empty file
            index = np.loadtxt(path, np.int64, delimiter="\t", ndmin=2)
        if index.shape[1] != 2:
            raise ValueError(f"a line has {index.shape[1]} numbers")
    except (OSError, ValueError, UserWarning) as error:
        raise DamagedError(
            f"{path} cannot be read ({error}): it stands beside train.rec, with lines of a key, a tab and a "
            "byte offset."
        ) from error
    return index


def _open_tars(source: Path, work: Path, progress: Progress) -> TrainingSet:
    """Tar shards of an export: images lie in them as they are, at offsets that are looked up once."""
    paths, said = sorted(source.glob("shard-*.tar")), _labels(source, "key")
    slices, found = np.empty((len(said.keys), 3), np.int64), 0
    for number, path in enumerate(paths):
        progress(number, len(paths))
        for stem, offset, length in image_members(path):
            # both are in the order of the export
            if found < len(slices) and stem == said.keys[found]:
                slices[found] = number, offset, length
                found += 1
    progress(len(paths), len(paths))
    if found < len(slices):
        raise DamagedError(f"{source} has no image {said.keys[found]}, which its {LABELS} names.")
    return _numbered(SliceReader(paths, slices, _as_it_is), said, origin_of(source, paths))


def _open_tables(source: Path, work: Path, progress: Progress) -> TrainingSet:
    """Parquet files of an export, whose images are packed: rows of a table cannot be read one by one."""
    files, said = sorted((source / "data").glob("*.parquet")), _labels(source, "path")
    origin = origin_of(source, files)
    path = work / f"crops-{origin.digest[:16]}.u8"
    reader = pack(path, len(said.keys), _decoded(files, len(said.keys), progress))
    names = tuple(f"{identity}_{replicate}" for identity, replicate in said.numbers.tolist())
    return _numbered(reader, said._replace(keys=names), origin)


def _decoded(files: list[Path], total: int, progress: Progress) -> Iterator[NDArray[np.uint8]]:
    """The crops of Parquet files, part by part."""
    import pyarrow.parquet as parquet

    done = 0
    for file in files:
        try:
            for batch in parquet.ParquetFile(file).iter_batches(256, columns=["image"]):
                images = [one["bytes"].as_py() for one in batch.column("image")]
                yield np.stack([decode(image, f"an image of {file}") for image in images])
                done += len(images)
                progress(done, total)
        except (OSError, pa.ArrowException) as error:
            raise DamagedError(f"{file} cannot be read ({error}): copy or export it anew.") from error


#: What a folder holds, and how a set with it is opened; tried in this order.
OPENERS: tuple[tuple[str, Callable[[Path, Path, Progress], TrainingSet]], ...] = (
    ("train.rec", _open_records),
    ("shard-*.tar", _open_tars),
    ("data/*.parquet", _open_tables),
    ("labels.csv", _open_exported_folder),
)


def _numbered(reader: Reader, said: _Labels, origin: Origin) -> TrainingSet:
    """A set whose labels.csv is in the order of the crops."""
    return TrainingSet(reader, said.keys, said.labels, np.arange(len(said.keys)), origin, said.numbers)


def _labels(source: Path, key: str) -> _Labels:
    """Read the labels.csv of an export, in which the column `key` tells where images are."""
    path, numbers = source / LABELS, ("label", "identity", "replicate")
    types = {key: pa.string(), **dict.fromkeys(numbers, pa.int64())}
    try:
        table = tables.read_csv(
            path, convert_options=tables.ConvertOptions(include_columns=list(types), column_types=types)
        )
        if any(column.null_count for column in table.columns):
            raise ValueError("a cell is empty")
        if not table.num_rows:
            raise ValueError("it names no image")
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ConfigError(
            f"{path} cannot be read as that of an export ({' '.join(str(error).split())}): it has the "
            f"columns {', '.join(types)}. Export the set anew, or give a folder with a sub-folder of crops "
            f"an identity, and no {LABELS}."
        ) from error
    label, *both = (table.column(name).to_numpy() for name in numbers)
    return _Labels(tuple(table.column(key).to_pylist()), label, np.stack(both, axis=1))


def _as_it_is(content: bytes, name: str) -> bytes:
    return content


def unpack_record(content: bytes, name: str) -> bytes:
    """Take the encoded image out of a record's bytes, whose parts are put together again."""
    parts, at = [], 0
    while at < len(content):
        if content[at : at + 4] != MAGIC:
            raise DamagedError(f"{name}: no record begins there.")
        _, length = frame_of(content[at : at + 8])
        parts.append(content[at + 8 : at + 8 + length])
        at += 8 + length + -length % 4
    return parse_image(MAGIC.join(parts), name).image


def _record_head(file: io.BufferedReader, offset: int, path: Path) -> tuple[float, ...]:
    """The labels of the record at an offset."""
    file.seek(offset)
    head = file.read(8 + HEADER.size + 16)
    if head[:4] != MAGIC:
        raise DamagedError(f"{path}: no record begins at byte {offset}, where its index says so.")
    flag, label, _, _ = HEADER.unpack_from(head, 8)
    if not flag:
        return (label,)
    more = np.frombuffer(head[8 + HEADER.size : 8 + HEADER.size + 4 * min(flag, 4)], "<f4")
    return tuple(more.tolist())

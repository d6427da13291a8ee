"""Opening training sets: exports of every format, .rec sets of others, and folders of folders."""

import csv
import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.contexts.images import list_images
from negfacediff_core.errors import ConfigError, ContextsError, DamagedError
from negfacediff_core.export.layout import LABELS
from negfacediff_core.export.read_recordio import HEADER, MAGIC, frame_of, parse_image
from negfacediff_core.recognition.datasets import (
    CROP,
    FileReader,
    PackedReader,
    Progress,
    Reader,
    SliceReader,
    TrainingSet,
    decode,
    pack,
)


def open_set(source: Path, work: Path, progress: Progress) -> TrainingSet:
    """Open an export of any format, a .rec set, or a folder with a sub-folder of crops an identity.

    What cannot be read in any order is packed into the folder `work` first, of which `progress` is told.

    Raises:
        ConfigError: if there is no training set, or its crops are not of 112x112 pixels.
        DamagedError: if a file of it cannot be read.
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
    rows = _labels(source)
    names = tuple(row["path"] for row in rows)
    return _numbered(FileReader([source / name for name in names]), names, rows)


def _open_folder(source: Path) -> TrainingSet:
    """A sub-folder an identity."""
    try:
        listed = list_images(source)
    except ContextsError as error:
        raise ConfigError(f"{source} is no training set: {error}.") from error
    paths = [path for images in listed.images for path in images]
    labels = np.repeat(np.arange(len(listed.images)), [len(images) for images in listed.images])
    names = tuple(str(path.relative_to(source)) for path in paths)
    return TrainingSet(FileReader(paths), names, labels.astype(np.int64), np.arange(len(paths)))


def _open_records(source: Path, work: Path, progress: Progress) -> TrainingSet:
    """`train.rec` and `train.idx` of either variant; labels stand in the images' records."""
    path = source / "train.rec"
    try:
        index = np.loadtxt(source / "train.idx", np.int64, delimiter="\t", ndmin=2)
    except (OSError, ValueError) as error:
        raise DamagedError(
            f"{source / 'train.idx'} cannot be read ({error}): it stands beside train.rec, with lines of a "
            "key, a tab and a byte offset."
        ) from error
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
    found = TrainingSet(reader, names, labels.astype(np.int64), np.arange(len(used)))
    if not (source / LABELS).exists():
        return found
    numbers = {row["key"]: (int(row["identity"]), int(row["replicate"])) for row in _labels(source)}
    return replace(found, numbers=np.array([numbers[name] for name in names], np.int64))


def _open_tars(source: Path, work: Path, progress: Progress) -> TrainingSet:
    """Tar shards of an export: images lie in them as they are, at offsets that are looked up once."""
    paths = sorted(source.glob("*.tar"))
    places = {}
    for number, path in enumerate(paths):
        progress(number, len(paths))
        with tarfile.open(path) as shard:
            for member in shard:
                places[Path(member.name).stem, Path(member.name).suffix] = (
                    number,
                    member.offset_data,
                    member.size,
                )
    progress(len(paths), len(paths))
    images = {stem: place for (stem, suffix), place in places.items() if suffix in (".png", ".jpg")}
    rows = _labels(source)
    names = tuple(row["key"] for row in rows)
    if missing := [name for name in names if name not in images]:
        raise DamagedError(f"{source} has no image {missing[0]}, which its {LABELS} names.")
    slices = np.array([images[name] for name in names], np.int64)
    return _numbered(SliceReader(paths, slices, _as_it_is), names, rows)


def _open_tables(source: Path, work: Path, progress: Progress) -> TrainingSet:
    """Parquet files of an export, whose images are packed: rows of a table cannot be read one by one."""
    import pyarrow.parquet as parquet

    rows = _labels(source)
    path = work / "crops.u8"

    def parts() -> Iterator[NDArray[np.uint8]]:
        done = 0
        for file in sorted((source / "data").glob("*.parquet")):
            for batch in parquet.ParquetFile(file).iter_batches(256, columns=["image"]):
                images = [one["bytes"].as_py() for one in batch.column("image")]
                yield np.stack([decode(image, f"an image of {file}") for image in images])
                done += len(images)
                progress(done, len(rows))

    if not path.exists() or path.stat().st_size != len(rows) * np.prod(CROP):
        pack(path, parts())
    names = tuple(f"{row['identity']}_{row['replicate']}" for row in rows)
    return _numbered(PackedReader(path), names, rows)


#: What a folder holds, and how a set with it is opened; tried in this order.
OPENERS: tuple[tuple[str, Callable[[Path, Path, Progress], TrainingSet]], ...] = (
    ("train.rec", _open_records),
    ("shard-*.tar", _open_tars),
    ("data/*.parquet", _open_tables),
    ("labels.csv", _open_exported_folder),
)


def _numbered(reader: Reader, names: tuple[str, ...], rows: list[dict[str, str]]) -> TrainingSet:
    """A set whose rows of labels.csv are in the order of the crops."""
    labels = np.array([int(row["label"]) for row in rows], np.int64)
    numbers = np.array([[int(row["identity"]), int(row["replicate"])] for row in rows], np.int64)
    return TrainingSet(reader, names, labels, np.arange(len(rows)), numbers)


def _labels(source: Path) -> list[dict[str, str]]:
    with (source / LABELS).open(newline="") as file:
        return list(csv.DictReader(file))


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

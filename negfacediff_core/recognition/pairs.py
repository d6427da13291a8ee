"""Pair lists beside folders of faces: LFW's `pairs.txt`, and CSV files of path1,path2,same."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.faces.detect import Detector
from negfacediff_core.recognition.crop_lists import encoded_crops
from negfacediff_core.recognition.fold_accuracy import FOLDS, contiguous_folds, even_folds
from negfacediff_core.recognition.pair_sets import (
    ComparisonList,
    PairSet,
    check_pairs,
    digest_of,
    file_stamp,
)

#: Suffixes under which an image of `pairs.txt`, which names none, is looked for, in order.
SUFFIXES = (".jpg", ".png", ".jpeg", ".bmp", ".webp")
_YES, _NO = ("1", "true", "yes"), ("0", "false", "no")


class _Pair(NamedTuple):
    first: Path
    second: Path
    same: bool | None  # None: nobody says


def read_pairs(
    path: Path, images: Path, name: str, detector: Detector | None = None
) -> PairSet | ComparisonList:
    """Read a pair list, `.csv` or in LFW's layout, of faces in the folder `images`: see `encoded_crops`.

    An LFW list that begins with `10<TAB>N` has its folds: ten times N genuine and N impostor pairs. The pairs
    of any other list are divided in ten folds with as many of each kind, in the order of the list. A CSV of
    two cells a line is a `ComparisonList`. Raises NegFaceDiffError, naming the file and line, for a list that
    is malformed or whose images are not there.
    """
    if not images.is_dir():
        raise NegFaceDiffError(
            f"there is no folder {images} with the images of {path}: name it after the list, "
            f"{path},images=FOLDER"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise NegFaceDiffError(f"the pair list {path} cannot be read: {error}") from error
    pairs, has_folds = (
        _csv_pairs(path, text, images) if path.suffix == ".csv" else _lfw_pairs(path, text, images)
    )
    if not pairs:
        raise NegFaceDiffError(f"the pair list {path} holds no pairs")
    told = [pair.same for pair in pairs if pair.same is not None]
    same = np.array(told, bool)
    folds = contiguous_folds(len(same)) if has_folds else even_folds(same)
    if told:
        check_pairs(same, folds, str(path))
    files: dict[Path, int] = {}
    numbered = [[files.setdefault(file, len(files)) for file in (pair.first, pair.second)] for pair in pairs]
    _check_there(list(files), path)
    names = [str(file.relative_to(images)) for file in files]
    crops, places = encoded_crops(list(files), names, str(path), detector), np.array(numbered)
    stamps = (file_stamp(shown, file.stat()) for shown, file in zip(names, files, strict=True))
    digest = digest_of([text.encode(), *stamps])
    if told:
        return PairSet(name, crops, places, same, folds, digest)
    return ComparisonList(name, crops, places, digest)


def _check_there(files: list[Path], path: Path) -> None:
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise NegFaceDiffError(
            f"the pair list {path} names {len(missing):,} images that are not there, of {len(files):,} "
            f"(first: {missing[0]}); name the folder of the images after the list, {path},images=FOLDER"
        )


def _csv_pairs(path: Path, text: str, images: Path) -> tuple[list[_Pair], bool]:
    """Pairs of a CSV of path1,path2,same, or of path1,path2 in all lines.

    A first line whose third cell is no yes or no is a head where the others name no file, as is one that says
    path1,path2.
    """
    rows = [(number, row) for number, row in enumerate(csv.reader(text.splitlines()), start=1) if row]
    cells = 2 if rows and len(rows[0][1]) == 2 else 3
    if rows and rows[0][0] == 1 and _is_head(rows[0][1], images):
        del rows[0]
    return [_csv_pair(path, number, row, cells, images) for number, row in rows], False


def _is_head(row: list[str], images: Path) -> bool:
    if len(row) == 2:
        return [cell.strip().lower() for cell in row] == ["path1", "path2"]
    told = len(row) == 3 and row[2].strip().lower() in _YES + _NO
    # a pair with a mistyped third cell is no head: all lines after it would count as one earlier
    return len(row) == 3 and not told and not any((images / cell.strip()).is_file() for cell in row[:2])


def _csv_pair(path: Path, number: int, row: list[str], cells: int, images: Path) -> _Pair:
    """One line of so many cells; NegFaceDiffError where it is none."""
    said = row[2].strip().lower() if len(row) == 3 else ""
    if len(row) != cells or (cells == 3 and said not in _YES + _NO):
        raise NegFaceDiffError(
            f"{path}, line {number}: {','.join(row)!r} is no pair; expected path1,path2,same, where same is "
            "1 or 0, or path1,path2 in all lines"
        )
    first, second = (images / cell.strip() for cell in row[:2])
    return _Pair(first, second, said in _YES if cells == 3 else None)


def _lfw_pairs(path: Path, text: str, images: Path) -> tuple[list[_Pair], bool]:
    """Pairs of a list in LFW's layout: `name n1 n2` is genuine, `name1 n1 name2 n2` impostor."""
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    head: tuple[int, ...] = ()
    # one number or two; three are a pair of a person whose name is a number
    if lines and len(lines[0][1]) <= 2 and all(word.isdigit() for word in lines[0][1]):
        head = tuple(int(word) for word in lines.pop(0)[1])
    pairs = [_lfw_pair(path, number, words, images) for number, words in lines]
    if head:
        folds, each = (1, *head)[-2:]
        if len(pairs) != 2 * folds * each:
            raise NegFaceDiffError(
                f"{path} holds {len(pairs):,} pairs, and its first line says {2 * folds * each:,} ({folds} "
                f"times {each:,} of the same person and {each:,} of different people): the list is cut short "
                "or damaged"
            )
    return pairs, head[:1] == (FOLDS,) and len(head) == 2


def _lfw_pair(path: Path, number: int, words: list[str], images: Path) -> _Pair:
    """One line; NegFaceDiffError where it is none."""
    faces = [(words[0], words[1]), (words[0], words[2])] if len(words) == 3 else []
    if len(words) == 4:
        faces = [(words[0], words[1]), (words[2], words[3])]
    if not faces or not all(image.isdigit() for _, image in faces):
        raise NegFaceDiffError(
            f"{path}, line {number}: {' '.join(words)!r} is no pair; expected 'name n1 n2' (the same person) "
            "or 'name1 n1 name2 n2' (different people)"
        )
    first, second = (_lfw_file(images, person, int(image)) for person, image in faces)
    return _Pair(first, second, len(words) == 3)


def _lfw_file(images: Path, person: str, number: int) -> Path:
    """The file of an image; that of the first suffix where there is none."""
    files = [images / person / f"{person}_{number:04}{suffix}" for suffix in SUFFIXES]
    return next(filter(Path.is_file, files), files[0])

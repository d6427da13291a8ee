"""Template verification in the layout of IJB-C (and IJB-B): reading it, and pooling images to templates.

A template is a person's set of media, and a medium is a photograph or the frames of a video.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.faces.align import align
from negfacediff_core.recognition.crop_lists import SIDE, CropList, decode
from negfacediff_core.recognition.pair_sets import digest_of, file_stamp

# Pairs that are scored at a time: a few hundred megabytes of gathered templates.
_SCORED = 1 << 16


@dataclass(frozen=True)
class TemplateSet:
    """Templates of crops, and pairs of templates.

    Of each crop, `templates` `(N,)` and `media` `(N,)` number where it belongs (media across all templates)
    and `scores` `(N,)` is the detector's score of its face. `pairs` `(P, 2)` number templates, `same` `(P,)`
    says which pairs are genuine. For `digest` see `PairSet`.
    """

    name: str
    crops: CropList
    templates: NDArray[np.int64]
    media: NDArray[np.int64]
    scores: NDArray[np.float32]
    pairs: NDArray[np.int64]
    same: NDArray[np.bool_]
    digest: str = ""


def is_template_set(folder: Path) -> bool:
    """Tell whether a folder has the layout of IJB-C."""
    return any(folder.glob("meta/*_face_tid_mid.txt"))


def read_templates(folder: Path, name: str) -> TemplateSet:
    """Read `meta/<set>_face_tid_mid.txt`, `<set>_template_pair_label.txt` and `<set>_name_5pts_score.txt`.

    The images lie in `loose_crop/` and are aligned by their five landmarks when they are read. Raises
    NegFaceDiffError, naming the file, for one that is missing or malformed, images that are not there, and
    pairs of templates that have no image.
    """
    where = _one(folder, "meta/*_face_tid_mid.txt")
    label = _one(folder, "meta/*_template_pair_label.txt")
    points = _one(folder, "meta/*_name_5pts_score.txt")
    images, templates, media = _columns(where, [pa.string(), pa.int64(), pa.int64()])
    seen, *coordinates, scores = _columns(points, [pa.string(), *[pa.float32()] * 11])
    first, second, same = _columns(label, [pa.int64()] * 3)
    if list(images) != list(seen):
        odd = next((n for n, (a, b) in enumerate(zip(images, seen, strict=False)) if a != b), len(seen))
        raise NegFaceDiffError(
            f"{where.name} and {points.name} in {folder / 'meta'} do not name the same images in the same "
            f"order (first difference: line {odd + 1}): they belong to different releases; fetch both again"
        )
    if not np.isin(same, (0, 1)).all() or not 0 < same.sum() < len(same):
        raise NegFaceDiffError(f"{label} must say 1 (the same person) of some pairs and 0 of all others")
    known, place = np.unique(templates, return_inverse=True)
    pairs = np.stack([first, second], axis=1)
    strange = np.setdiff1d(pairs, known)
    if len(strange):
        raise NegFaceDiffError(
            f"{label} compares {len(strange):,} templates of which {where.name} has no image (first: "
            f"template {strange[0]})"
        )
    _, medium = np.unique(np.stack([templates, media]), axis=1, return_inverse=True)
    landmarks = np.stack(coordinates, axis=1).reshape(-1, 5, 2)
    crops = _crops(folder / "loose_crop", list(images), landmarks)
    numbered = np.searchsorted(known, pairs)
    columns = [one.tobytes() for one in (templates, media, landmarks, scores, pairs, same)]
    digest = digest_of([*columns, *_stamps(folder / "loose_crop", list(images))])
    return TemplateSet(name, crops, place, medium.ravel(), scores, numbered, same.astype(bool), digest)


def _stamps(folder: Path, images: list[str]) -> Iterator[bytes]:
    """The stamps of the images of a folder, which is listed once: there are half a million."""
    with os.scandir(folder) as entries:
        there = {entry.name: entry for entry in entries}
    for image in images:
        yield file_stamp(image, there[image].stat())


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        listing = ", ".join(path.name for path in found) or "none"
        raise NegFaceDiffError(f"{folder} must hold one file {pattern}, and holds {listing}")
    return found[0]


def _columns(path: Path, types: list[Any]) -> list[NDArray[Any]]:
    """Read the columns of a file without a head, whose cells one space divides."""
    names = [str(number) for number in range(len(types))]
    try:
        table = pa.csv.read_csv(
            path,
            pa.csv.ReadOptions(column_names=names),
            pa.csv.ParseOptions(delimiter=" ", quote_char=False),
            pa.csv.ConvertOptions(column_types=dict(zip(names, types, strict=True)), null_values=[]),
        )
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())
        raise NegFaceDiffError(
            f"{path} is not as IJB-C has it ({reason}): expected lines of {len(types)} cells, divided by "
            "spaces"
        ) from error
    return [column.to_numpy(zero_copy_only=False) for column in table.itercolumns()]


def _crops(folder: Path, images: list[str], landmarks: NDArray[np.float32]) -> CropList:
    """The images of a folder, aligned as they are read; NegFaceDiffError where some are not there."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    missing = [image for image in images if image not in there]
    if missing:
        raise NegFaceDiffError(
            f"{folder} lacks {len(missing):,} of {len(images):,} images that the lists in meta/ name (first: "
            f"{missing[0]})"
        )
    bad = np.flatnonzero(~(np.isfinite(landmarks).all((1, 2)) & (np.ptp(landmarks, axis=1).max(axis=1) > 1)))
    if len(bad):
        raise NegFaceDiffError(
            f"{len(bad):,} images of {folder.parent} have landmarks that are not finite or fall together "
            f"(first: {images[bad[0]]})"
        )

    def read(place: int) -> NDArray[np.uint8]:
        image = decode(folder / images[place], images[place], str(folder))
        return align(image, landmarks[place], SIDE)

    return CropList(images, read, SIDE)


def pool(
    templates: TemplateSet,
    batches: Iterable[tuple[int, NDArray[np.float32]]],
    width: int,
    weigh: bool = True,
) -> NDArray[np.float32]:
    """Pool embeddings to templates: the mean within each medium, the sum over a template's media, at unit
    length.

    Args:
        templates: what belongs where.
        batches: (number of the first crop, embeddings `(n, width)`), not normalised: an embedding that is
            longer, as those of clear faces are, counts for more.
        width: of an embedding.
        weigh: multiply each embedding by the detector's score of its face, as is usual.

    Returns `(T, width)` float32. Raises NegFaceDiffError where the embeddings of a template cancel out.
    """
    counts = np.bincount(templates.media)
    sums = np.zeros((len(counts), width))
    for start, embeddings in batches:
        crops = slice(start, start + len(embeddings))
        weights = templates.scores[crops, None] if weigh else 1.0
        np.add.at(sums, templates.media[crops], embeddings * weights)
    sums /= counts[:, None]
    owner = np.empty(len(counts), np.int64)
    owner[templates.media] = templates.templates
    pooled = np.zeros((int(owner.max()) + 1, width))
    np.add.at(pooled, owner, sums)
    lengths = np.linalg.norm(pooled, axis=1, keepdims=True)
    if not (lengths > 0).all():
        raise NegFaceDiffError(
            f"a template of {templates.name} has no direction: the embeddings of its images cancel out, or "
            "the detector's scores of all its faces are 0"
        )
    return (pooled / lengths).astype(np.float32)


def template_cosines(pooled: NDArray[np.float32], pairs: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the cosine of each pair `(P,)` of the unit templates `(T, width)`."""
    cosines = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), _SCORED):
        part = pairs[start : start + _SCORED]
        cosines[start : start + _SCORED] = np.einsum("pd,pd->p", pooled[part[:, 0]], pooled[part[:, 1]])
    return cosines

"""Lists of aligned face crops that are decoded when they are needed: what a verification set consists of."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.faces.align import similarity_transform, warp
from negfacediff_core.faces.detect import Detector, main_face
from negfacediff_core.recognition.pixels import decode_rgb

#: An encoded image (JPEG, PNG, ...): its bytes, or its file.
Encoded = bytes | Path
#: Pixels along each side of an aligned crop.
SIDE = 112


@dataclass(frozen=True)
class CropList:
    """Crops of `side` x `side` pixels. `read(i)` returns the i-th as `(side, side, 3)` uint8 RGB, from any
    thread.

    `names` are what errors call them. `read` raises NegFaceDiffError for an image that cannot be decoded.
    Where faces are looked for, `faceless` numbers the crops, of those that were read, in which there is none.
    """

    names: Sequence[str]
    read: Callable[[int], NDArray[np.uint8]]
    side: int
    faceless: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.names)


def encoded_crops(
    images: Sequence[Encoded], names: Sequence[str], where: str, detector: Detector | None = None
) -> CropList:
    """List encoded crops. Every header is looked at here, all pixels only when a crop is read.

    With a detector, images that are not all crops of 112x112 are taken for photographs: see
    `aligned_photographs`. Raises NegFaceDiffError, which begins with `where`, for an image that is none, or,
    without a detector, that is not a square as large as the others.
    """
    sizes = [image_size(image, name, where) for image, name in zip(images, names, strict=True)]
    if not sizes:
        raise NegFaceDiffError(f"{where} holds no images")
    if detector is not None and set(sizes) != {(SIDE, SIDE)}:
        return aligned_photographs(images, names, where, detector)
    width, height = sizes[0]
    other = next((place for place, size in enumerate(sizes) if size != (width, width)), None)
    if other is not None:
        shown = "x".join(map(str, sizes[other]))
        wanted = f"as {names[0]} ({width}x{height})" if width == height else "squares"
        raise NegFaceDiffError(
            f"{where}: {names[other]} has {shown} pixels; all images must be aligned crops of one size, "
            f"{wanted}: give a detector (--detector PACK), which finds the faces and aligns them"
        )

    def read(place: int) -> NDArray[np.uint8]:
        return decode(images[place], names[place], where)

    return CropList(names, read, width)


def aligned_photographs(
    images: Sequence[Encoded], names: Sequence[str], where: str, detector: Detector
) -> CropList:
    """List photographs of any size as crops of their main faces, aligned to 112x112 when they are read.

    Where the detector finds no face, the crop is the largest square in the middle of the image, as is usual:
    so the set keeps its pairs. A face is looked for once, however often its crop is read.
    """
    matrices: dict[int, NDArray[np.float64]] = {}
    faceless: set[int] = set()

    def read(place: int) -> NDArray[np.uint8]:
        photograph = decode(images[place], names[place], where, upright=True)
        if place not in matrices:
            found = _face_matrix(photograph, detector)
            if found is None:
                faceless.add(place)
            matrices[place] = _middle_matrix(*photograph.shape[:2]) if found is None else found
        return warp(photograph, matrices[place], SIDE)

    return CropList(names, read, SIDE, faceless)


def _face_matrix(photograph: NDArray[np.uint8], detector: Detector) -> NDArray[np.float64] | None:
    """The `(2, 3)` similarity that aligns the main face; None where there is none."""
    faces = detector.detect(photograph[None])[0]
    if not len(faces.scores):
        return None
    try:
        return similarity_transform(faces.landmarks[main_face(faces, *photograph.shape[:2])])
    except NegFaceDiffError:  # landmarks that no face has
        return None


def _middle_matrix(height: int, width: int) -> NDArray[np.float64]:
    """The `(2, 3)` map of the largest square in the middle of an image to a crop, edge to edge."""
    scale = SIDE / min(height, width)
    shift = (SIDE - 1 - scale * (np.array([width, height]) - 1)) / 2
    return np.column_stack([scale * np.eye(2), shift])


def image_size(image: Encoded, name: str, where: str) -> tuple[int, int]:
    """Return width and height, as the header says; NegFaceDiffError where it is no image's, or no file's."""
    try:
        with Image.open(_file(image)) as opened:
            return opened.size
    except Exception as error:  # pillow raises a dozen unrelated types for a damaged file
        raise _unreadable(name, where, error) from error


def decode(image: Encoded, name: str, where: str, upright: bool = False) -> NDArray[np.uint8]:
    """Decode an image to `(H, W, 3)` uint8 RGB as it is stored: a crop is upright, whatever EXIF says.

    `upright` turns it as EXIF says, as photographs need. Raises NegFaceDiffError.
    """
    try:
        if not upright:
            return decode_rgb(image if isinstance(image, bytes) else image.read_bytes())
        with Image.open(_file(image)) as opened:
            return np.array(ImageOps.exif_transpose(opened).convert("RGB"))
    except Exception as error:  # as above
        raise _unreadable(name, where, error) from error


def _file(image: Encoded) -> Path | io.BytesIO:
    return io.BytesIO(image) if isinstance(image, bytes) else image


def _unreadable(name: str, where: str, error: Exception) -> NegFaceDiffError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return NegFaceDiffError(f"{where}: {name} cannot be read as an image ({reason}); fetch the set again")

"""Lists of aligned face crops that are decoded when they are needed: what a verification set consists of."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from negfacediff_core.errors import NegFaceDiffError

#: An encoded image (JPEG, PNG, ...): its bytes, or its file.
Encoded = bytes | Path


@dataclass(frozen=True)
class CropList:
    """Crops of `side` x `side` pixels. `read(i)` returns the i-th as `(side, side, 3)` uint8 RGB, from any
    thread.

    `names` are what errors call them. `read` raises NegFaceDiffError for an image that cannot be decoded.
    """

    names: Sequence[str]
    read: Callable[[int], NDArray[np.uint8]]
    side: int

    def __len__(self) -> int:
        return len(self.names)


def encoded_crops(images: Sequence[Encoded], names: Sequence[str], where: str) -> CropList:
    """List encoded crops. Every header is looked at here, all pixels only when a crop is read.

    Raises NegFaceDiffError, which begins with `where`, for an image that is none, or that is not a square as
    large as the others.
    """
    sizes = [image_size(image, name, where) for image, name in zip(images, names, strict=True)]
    if not sizes:
        raise NegFaceDiffError(f"{where} holds no images")
    width, height = sizes[0]
    other = next((place for place, size in enumerate(sizes) if size != (width, width)), None)
    if other is not None:
        shown = "x".join(map(str, sizes[other]))
        wanted = f"as {names[0]} ({width}x{height})" if width == height else "squares"
        raise NegFaceDiffError(
            f"{where}: {names[other]} has {shown} pixels; all images must be aligned crops of one size, "
            f"{wanted}: align the faces first (five points, 112x112)"
        )

    def read(place: int) -> NDArray[np.uint8]:
        return decode(images[place], names[place], where)

    return CropList(names, read, width)


def image_size(image: Encoded, name: str, where: str) -> tuple[int, int]:
    """Return width and height, as the header says; NegFaceDiffError where it is no image's, or no file's."""
    try:
        with Image.open(_file(image)) as opened:
            return opened.size
    except Exception as error:  # pillow raises a dozen unrelated types for a damaged file
        raise _unreadable(name, where, error) from error


def decode(image: Encoded, name: str, where: str) -> NDArray[np.uint8]:
    """Decode an image to `(H, W, 3)` uint8 RGB as it is stored: a crop is upright, whatever EXIF says."""
    try:
        with Image.open(_file(image)) as opened:
            return np.array(opened.convert("RGB"))
    except Exception as error:  # as above
        raise _unreadable(name, where, error) from error


def _file(image: Encoded) -> Path | io.BytesIO:
    return io.BytesIO(image) if isinstance(image, bytes) else image


def _unreadable(name: str, where: str, error: Exception) -> NegFaceDiffError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return NegFaceDiffError(f"{where}: {name} cannot be read as an image ({reason}); fetch the set again")

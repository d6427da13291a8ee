"""Where the images lie in the tar files of an export, read header by header: of millions, in seconds."""

import mmap
from collections.abc import Iterator
from pathlib import Path

from negfacediff_core.errors import DamagedError

_BLOCK = 512
_NAME, _SIZE, _KIND, _MAGIC = slice(0, 100), slice(124, 135), slice(156, 157), slice(257, 262)
_IMAGES = (".png", ".jpg")


def image_members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield the images of a tar file of an export: name without its ending, byte offset, and length.

    Raises DamagedError for what `negfacediff export` has not written so, or where the file ends too early.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if not size:  # which cannot be mapped
            raise _damaged(path, 0)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield from _images(path, content)


def _images(path: Path, content: mmap.mmap) -> Iterator[tuple[str, int, int]]:
    at = 0
    while (head := content[at : at + _BLOCK])[:1] != b"\0":
        if head[_MAGIC] != b"ustar" or head[_KIND] not in (b"0", b"\0"):
            raise _damaged(path, at)
        try:
            name, length = head[_NAME].rstrip(b"\0").decode("ascii"), int(head[_SIZE], 8)
        except ValueError as error:
            raise _damaged(path, at) from error
        start = at + _BLOCK
        at = start + length + -length % _BLOCK
        if at > len(content):
            raise _damaged(path, start)
        if name.endswith(_IMAGES):
            yield name[:-4], start, length


def _damaged(path: Path, at: int) -> DamagedError:
    return DamagedError(
        f"{path} is not as negfacediff export writes it, from byte {at} on: it is damaged, or of another "
        "program. Copy or export it anew; of other sets, unpack the images into a folder an identity."
    )

"""Files of tensors: reading what `torch.save` and safetensors wrote, and replacing files in one piece."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

from negfacediff_core.explained import explained


def read_tensors(path: Path, device: str | None = None) -> Any:
    """Read tensors, numbers, text and containers of these; never run code from the file.

    A name that ends in `.safetensors` is a flat dict of tensors in that format, any other what `torch.save`
    wrote. Tensors come to `device`; None leaves them on the device that they were saved from. For a damaged
    or foreign file torch raises whatever its reader stumbles over (KeyError, IndexError, AttributeError,
    ...), so callers catch Exception and name the file; a file that asks for code is a
    `pickle.UnpicklingError`.
    """
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path, device=device or "cpu")
    with warnings.catch_warnings():
        # of a file that is no checkpoint, where the error that follows says more
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        return torch.load(path, map_location=device, weights_only=True)


def write_tensors(path: Path, state: Any) -> None:
    """`torch.save`, `replacing` the file: a crash leaves the one that was there, or the new one."""
    with replacing(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # which torch raises over the disk's own error, where the disk took a part of the file
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` at the end: temporary, fsync, rename.

    Folders are made as needed. Where the block raises, `path` stays as it was and nothing is left behind.
    Raises StoreError where it cannot be written: a PlaceError if the disk is full or read-only.
    """
    partial = path.with_name(path.name + ".partial")
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            with suppress(OSError):  # the one above says more
                partial.unlink()
            raise

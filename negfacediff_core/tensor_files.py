"""Reading files that `torch.save` wrote."""

import warnings
from pathlib import Path
from typing import Any

import torch


def read_tensors(path: Path, device: str | None = None) -> Any:
    """Read tensors, numbers, text and containers of these; never run code from the file.

    Tensors come to `device`; None leaves them on the device that they were saved from. For a damaged or
    foreign file torch raises whatever its reader stumbles over (KeyError, IndexError, AttributeError, ...),
    so callers catch Exception and name the file; a file that asks for code is a `pickle.UnpicklingError`.
    """
    with warnings.catch_warnings():
        # of a file that is no checkpoint, where the error that follows says more
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        return torch.load(path, map_location=device, weights_only=True)

"""Pairs of a generated and a real image side by side, as PNG bytes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.evaluation.plots import FAINT, INK, draw

# In pixels.
_DPI = 100
_SIDE, _GAP, _MARGIN, _CAPTION, _TITLE = 112, 18, 14, 34, 40
_COLUMNS = 4


class Pair(NamedTuple):
    """One pair: images `(H, W, 3)` uint8 RGB of any size, what each is, and their cosine."""

    generated: NDArray[np.uint8]
    real: NDArray[np.uint8]
    sample: str
    name: str
    cosine: float


def pair_sheet(pairs: Sequence[Pair], title: str) -> bytes:
    """Show pairs row by row, the generated image left and the real one right, with their cosine below."""
    if not pairs:
        raise NegFaceDiffError("there is no pair to draw: no generated image could be compared")
    columns = min(_COLUMNS, len(pairs))
    rows = -(-len(pairs) // columns)
    cell = 2 * _SIDE + _GAP
    width = 2 * _MARGIN + columns * cell - _GAP
    height = _TITLE + rows * (_SIDE + _CAPTION) + _MARGIN
    canvas = np.full((height, width, 3), 255, np.uint8)
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    for number, pair in enumerate(pairs):
        top = _TITLE + number // columns * (_SIDE + _CAPTION)
        left = _MARGIN + number % columns * cell
        canvas[top : top + _SIDE, left : left + _SIDE] = _fitted(pair.generated)
        canvas[top : top + _SIDE, left + _SIDE : left + 2 * _SIDE] = _fitted(pair.real)
        below = 1 - (top + _SIDE + 4) / height
        words = f"{pair.sample}   cosine {pair.cosine:.3f}\n{_clipped(pair.name)}"
        figure.text(left / width, below, words, color=FAINT, fontsize=7, va="top", linespacing=1.3)
    figure.text(_MARGIN / width, 1 - 14 / height, title, color=INK, fontsize=9, va="top")
    figure.figimage(canvas, origin="upper")
    return draw(figure)


def _fitted(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Scale an image into the middle of a white square, aspect kept."""
    height, width = image.shape[:2]
    scale = _SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    square = np.full((_SIDE, _SIDE, 3), 255, np.uint8)
    left, top = (_SIDE - size[0]) // 2, (_SIDE - size[1]) // 2
    square[top : top + size[1], left : left + size[0]] = np.array(Image.fromarray(image).resize(size))
    return square


def _clipped(name: str, most: int = 40) -> str:
    return name if len(name) <= most else f"...{name[3 - most :]}"

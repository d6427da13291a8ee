"""The contact sheet: datasets side by side, one cell a sample, as PNG bytes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from numpy.typing import NDArray

from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.evaluation.plots import FAINT, INK, draw

_UNDETECTED = (213, 94, 0)
# In pixels.
_DPI = 100
_LEAST_CELL, _CELL_GAP, _PANEL_GAP, _MARGIN = 64, 2, 22, 12
_LABEL_WIDTH, _TITLE_HEIGHT, _NOTE_HEIGHT, _LEAST_WIDTH = 44, 44, 22, 460
# In points.
_TITLE_SIZE = 11


class SheetPanel(NamedTuple):
    """One dataset of a sheet: `images` `(I, R, H, W, 3)` uint8 RGB, in which a face was `detected` `(I, R)`
    (None: in all), and which were `taken_out` `(I, R)` of the dataset (None: none).
    """

    label: str
    images: NDArray[np.uint8]
    detected: NDArray[np.bool_] | None = None
    taken_out: NDArray[np.bool_] | None = None


def contact_sheet(panels: Sequence[SheetPanel]) -> bytes:
    """Show datasets side by side, pixel for pixel: rows are identities, columns replicates, cells aligned.

    All panels have as many identities and replicates, so that one place in each panel is one sample. Images
    in which no face was found are framed, and the places of those that were taken out are white; notes under
    the sheet say so. Small images are enlarged by a whole factor to about 64 pixels, and
    those of one panel to the size of another's.
    """
    extents = {panel.images.shape[:2] for panel in panels}
    if len(extents) != 1 or any(panel.images.ndim != 5 for panel in panels):
        raise NegFaceDiffError(
            "a contact sheet takes images (identities, replicates, height, width, 3) of as many identities "
            "and replicates, got " + (", ".join(str(panel.images.shape) for panel in panels) or "none")
        )
    heights = [panel.images.shape[2] for panel in panels]
    side = max(height * max(1, _LEAST_CELL // height) for height in heights)
    mosaics = [_mosaic(panel, side) for panel in panels]
    height, width = mosaics[0].shape[:2]
    notes = _notes(panels)
    lefts = [_MARGIN + _LABEL_WIDTH + number * (width + _PANEL_GAP) for number in range(len(panels))]
    sheet_width = max(_LEAST_WIDTH, lefts[-1] + width + _MARGIN)
    sheet_height = _TITLE_HEIGHT + height + _NOTE_HEIGHT * len(notes) + _MARGIN
    canvas = np.full((sheet_height, sheet_width, 3), 255, dtype=np.uint8)
    for left, mosaic in zip(lefts, mosaics, strict=True):
        canvas[_TITLE_HEIGHT : _TITLE_HEIGHT + height, left : left + width] = mosaic
    figure = Figure(figsize=(sheet_width / _DPI, sheet_height / _DPI), dpi=_DPI, facecolor="white")
    figure.figimage(canvas, origin="upper")
    _label_sheet(figure, panels, lefts, width, height)
    for above, note in enumerate(reversed(notes)):
        up = (_MARGIN + above * _NOTE_HEIGHT) / sheet_height
        figure.text(lefts[0] / sheet_width, up, note, color=FAINT, fontsize=8, va="bottom")
    return draw(figure)


def _notes(panels: Sequence[SheetPanel]) -> list[str]:
    """Say what frames and white places mean, where there are any."""
    notes = []
    if any(panel.detected is not None and not panel.detected.all() for panel in panels):
        notes.append("framed: no face was found; these images are left out of the figures")
    if any(panel.taken_out is not None and panel.taken_out.any() for panel in panels):
        notes.append("white: taken out of the dataset, for they leak or lie outside the band")
    return notes


def _mosaic(panel: SheetPanel, side: int) -> NDArray[np.uint8]:
    """One panel's cells, `side` pixels high, with gaps of white: `(height, width, 3)`."""
    identities, _, height, width, _ = panel.images.shape
    down, across = (np.arange(length * side // height) * height // side for length in (height, width))
    cells = panel.images[:, :, down][:, :, :, across]
    if panel.detected is not None:
        frame = np.ones(cells.shape[2:4], dtype=bool)
        frame[3:-3, 3:-3] = False
        row, column = np.nonzero(~panel.detected)
        for identity, replicate in zip(row, column, strict=True):
            cells[identity, replicate][frame] = _UNDETECTED
    if panel.taken_out is not None:
        cells[panel.taken_out] = 255
    gap = ((0, 0), (0, 0), (0, _CELL_GAP), (0, _CELL_GAP), (0, 0))
    tiled = np.pad(cells, gap, constant_values=255).transpose(0, 2, 1, 3, 4)
    mosaic = tiled.reshape(identities * (side + _CELL_GAP), -1, 3)
    return mosaic[:-_CELL_GAP, :-_CELL_GAP]


def _label_sheet(
    figure: Figure, panels: Sequence[SheetPanel], lefts: Sequence[int], width: int, height: int
) -> None:
    """Titles above the panels, replicate numbers above the columns, identity numbers left of the rows."""
    identities, replicates = panels[0].images.shape[:2]
    sheet_width, sheet_height = figure.get_size_inches() * _DPI

    def text(x: float, from_top: float, words: str, **style: Any) -> None:
        figure.text(x / sheet_width, 1 - from_top / sheet_height, words, **style)

    # the last may reach to the edge of the sheet, which is wider than a narrow panel
    ends = [*(after - _PANEL_GAP for after in lefts[1:]), sheet_width - _MARGIN]
    for left, end, panel in zip(lefts, ends, panels, strict=True):
        title = _fitting(panel.label, end - left)
        text(left, _TITLE_HEIGHT - 22, title, color=INK, fontsize=_TITLE_SIZE, fontweight="bold", va="bottom")
        for replicate in range(replicates):
            x = left + (replicate + 0.5) * (width + _CELL_GAP) / replicates
            text(x, _TITLE_HEIGHT - 5, str(replicate), color=FAINT, fontsize=7.5, ha="center", va="bottom")
    text(lefts[0] - 8, _TITLE_HEIGHT - 5, "identity", color=FAINT, fontsize=7.5, ha="right", va="bottom")
    for identity in range(identities):
        y = _TITLE_HEIGHT + (identity + 0.5) * (height + _CELL_GAP) / identities
        text(lefts[0] - 8, y, str(identity), color=FAINT, fontsize=8, ha="right", va="center")


def _fitting(title: str, width: float) -> str:
    """A panel's title; one wider than `width` pixels is cut in its middle, as both ends tell runs apart."""
    font = FontProperties(weight="bold", size=_TITLE_SIZE)

    def wide(words: str) -> float:
        # text paths are in points
        return float(TextPath((0, 0), words or " ", prop=font).get_extents().width) * _DPI / 72

    kept, shown = len(title), title
    while wide(shown) > width and kept > 2:
        kept -= 1
        shown = f"{title[: kept // 2]}…{title[-(kept - kept // 2) :]}"
    return shown

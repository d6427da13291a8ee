"""Pictures of a dataset, as PNG bytes: the score histogram and the contact sheet.

Only matplotlib's object interface is used (no pyplot), so that threads and callers share no figure state.
"""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.evaluation.metrics import separability
from negfacediff_core.evaluation.scores import Distribution

#: Okabe and Ito's palette, told apart by colour-blind readers; in the order in which datasets take them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
_UNDETECTED = (213, 94, 0)
_DASHES = (0, (3, 1.5))
_INK, _FAINT = "#222222", "#777777"

# Contact sheet, in pixels.
_DPI = 100
_CELL_GAP, _PANEL_GAP, _MARGIN = 2, 22, 12
_LABEL_WIDTH, _TITLE_HEIGHT, _NOTE_HEIGHT, _LEAST_WIDTH = 44, 44, 22, 460


class ScorePanel(NamedTuple):
    """One dataset of a histogram: its label and its two kinds of scores."""

    label: str
    genuine: Distribution
    impostor: Distribution


class SheetPanel(NamedTuple):
    """One dataset of a sheet: `images` `(I, R, H, W, 3)` uint8 RGB; `detected` `(I, R)` (None: all)."""

    label: str
    images: NDArray[np.uint8]
    detected: NDArray[np.bool_] | None = None


def score_histogram(panels: Sequence[ScorePanel]) -> bytes:
    """Overlay the genuine (filled) and impostor (dashed) scores of 1 to 7 datasets, FDR and EER in the
    legend.
    """
    if not 1 <= len(panels) <= len(COLOURS):
        raise NegFaceDiffError(f"a histogram shows 1 to {len(COLOURS)} datasets, got {len(panels)}")
    figure = Figure(figsize=(8.4, 4.6), dpi=150, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    edges = _edges(panels)
    centres = (edges[:-1] + edges[1:]) / 2
    handles: list[Patch | Line2D] = []
    for colour, panel in zip(COLOURS, panels, strict=False):
        genuine, impostor = _density(panel.genuine, edges), _density(panel.impostor, edges)
        axes.fill_between(centres, genuine, color=colour, alpha=0.20, linewidth=0)
        axes.plot(centres, genuine, color=colour, linewidth=1.8)
        axes.plot(centres, impostor, color=colour, linewidth=1.5, linestyle=_DASHES)
        figures = separability(panel.genuine, panel.impostor)
        text = f"{panel.label}:  FDR {figures.fdr:.2f},  EER {figures.eer:.1%}"
        handles.append(Patch(facecolor=colour, edgecolor=colour, label=text))
    handles.append(Line2D([], [], color=_FAINT, linewidth=1.8, label="same identity (genuine)"))
    handles.append(
        Line2D([], [], color=_FAINT, linewidth=1.5, linestyle=_DASHES, label="across identities (impostor)")
    )
    axes.set_xlim(centres[0], centres[-1])
    axes.set_ylim(bottom=0)
    axes.margins(y=0.06)
    axes.set_xlabel("cosine similarity of two images", color=_INK)
    axes.set_ylabel("density of pairs", color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False, fontsize=9.5)
    return _png(figure)


def _edges(panels: Sequence[ScorePanel]) -> NDArray[np.float64]:
    """Common bin edges over all scores, by Scott's rule, 3.49 sd n^(-1/3), for the kind that needs most."""
    kinds = [kind for panel in panels for kind in (panel.genuine, panel.impostor)]
    width = max(0.01, round(max(3.49 * kind.std * kind.size ** (-1 / 3) for kind in kinds), 2))
    low = min(kind.levels[0] for kind in kinds)
    high = max(kind.levels[-1] for kind in kinds)
    return np.arange(np.floor(low / width) - 2, np.ceil(high / width) + 3) * width


def _density(scores: Distribution, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.histogram(scores.levels, bins=edges, weights=scores.counts, density=True)[0]


def contact_sheet(panels: Sequence[SheetPanel]) -> bytes:
    """Show datasets side by side, pixel for pixel: rows are identities, columns replicates, cells aligned.

    All panels have the same identities, replicates and image size, so that one place in each panel is one
    sample. Images in which no face was found are framed. Small images are enlarged by a whole factor to about
    64 pixels.
    """
    shape = panels[0].images.shape if panels else ()
    if len(shape) != 5 or any(panel.images.shape != shape for panel in panels):
        raise NegFaceDiffError(
            "a contact sheet takes datasets of equal shape (identities, replicates, height, width, 3), got "
            + ", ".join(str(panel.images.shape) for panel in panels)
        )
    mosaics = [_mosaic(panel) for panel in panels]
    height, width = mosaics[0].shape[:2]
    framed = any(panel.detected is not None and not panel.detected.all() for panel in panels)
    lefts = [_MARGIN + _LABEL_WIDTH + number * (width + _PANEL_GAP) for number in range(len(panels))]
    sheet_width = max(_LEAST_WIDTH, lefts[-1] + width + _MARGIN)
    sheet_height = _TITLE_HEIGHT + height + (_NOTE_HEIGHT if framed else 0) + _MARGIN
    canvas = np.full((sheet_height, sheet_width, 3), 255, dtype=np.uint8)
    for left, mosaic in zip(lefts, mosaics, strict=True):
        canvas[_TITLE_HEIGHT : _TITLE_HEIGHT + height, left : left + width] = mosaic
    figure = Figure(figsize=(sheet_width / _DPI, sheet_height / _DPI), dpi=_DPI, facecolor="white")
    figure.figimage(canvas, origin="upper")
    _label_sheet(figure, panels, lefts, width, height)
    if framed:
        note = "framed: no face was found; these images are left out of the figures"
        figure.text(
            lefts[0] / sheet_width, _MARGIN / sheet_height, note, color=_FAINT, fontsize=8, va="bottom"
        )
    return _png(figure)


def _mosaic(panel: SheetPanel) -> NDArray[np.uint8]:
    """One panel's cells with gaps of white, `(height, width, 3)`."""
    identities, _, height, *_ = panel.images.shape
    factor = max(1, 64 // height)
    cells = panel.images.repeat(factor, axis=2).repeat(factor, axis=3)
    if panel.detected is not None:
        cells = cells.copy()
        frame = np.ones(cells.shape[2:4], dtype=bool)
        frame[3:-3, 3:-3] = False
        row, column = np.nonzero(~panel.detected)
        for identity, replicate in zip(row, column, strict=True):
            cells[identity, replicate][frame] = _UNDETECTED
    gap = ((0, 0), (0, 0), (0, _CELL_GAP), (0, _CELL_GAP), (0, 0))
    tiled = np.pad(cells, gap, constant_values=255).transpose(0, 2, 1, 3, 4)
    mosaic = tiled.reshape(identities * (height * factor + _CELL_GAP), -1, 3)
    return mosaic[:-_CELL_GAP, :-_CELL_GAP]


def _label_sheet(
    figure: Figure, panels: Sequence[SheetPanel], lefts: Sequence[int], width: int, height: int
) -> None:
    """Titles above the panels, replicate numbers above the columns, identity numbers left of the rows."""
    identities, replicates = panels[0].images.shape[:2]
    sheet_width, sheet_height = figure.get_size_inches() * _DPI

    def text(x: float, from_top: float, words: str, **style: Any) -> None:
        figure.text(x / sheet_width, 1 - from_top / sheet_height, words, **style)

    for left, panel in zip(lefts, panels, strict=True):
        text(left, _TITLE_HEIGHT - 22, panel.label, color=_INK, fontsize=11, fontweight="bold", va="bottom")
        for replicate in range(replicates):
            x = left + (replicate + 0.5) * (width + _CELL_GAP) / replicates
            text(x, _TITLE_HEIGHT - 5, str(replicate), color=_FAINT, fontsize=7.5, ha="center", va="bottom")
    text(lefts[0] - 8, _TITLE_HEIGHT - 5, "identity", color=_FAINT, fontsize=7.5, ha="right", va="bottom")
    for identity in range(identities):
        y = _TITLE_HEIGHT + (identity + 0.5) * (height + _CELL_GAP) / identities
        text(lefts[0] - 8, y, str(identity), color=_FAINT, fontsize=8, ha="right", va="center")


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    return file.getvalue()

"""Plots of datasets' scores, as PNG or SVG bytes: the score histogram and the DET curves.

Only matplotlib's object interface is used (no pyplot), so that threads and callers share no figure state.
"""

import io
import threading
from collections.abc import Sequence
from typing import Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.evaluation.metrics import error_rates, separability
from negfacediff_core.evaluation.scores import Distribution

#: Okabe and Ito's palette, told apart by colour-blind readers; in the order in which datasets take them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
INK, FAINT, GRID = "#222222", "#777777", "#e6e6e6"
_DASHES = (0, (3, 1.5))
# What a page's style sheet may set in an SVG, and what holds where none does.
_STYLED = {INK: "currentColor", FAINT: f"var(--faint, {FAINT})", GRID: f"var(--line, {GRID})"}
# matplotlib takes how an SVG is written from settings of the whole process.
_SVG_SETTINGS = threading.Lock()


class ScorePanel(NamedTuple):
    """One dataset of a histogram: its label and its two kinds of scores."""

    label: str
    genuine: Distribution
    impostor: Distribution


def draw(figure: Figure, form: str = "png") -> bytes:
    """Return a figure as PNG on white, or as SVG whose text is text and whose ink is the page's colour.

    The same figure gives the same bytes.
    """
    file = io.BytesIO()
    # straight to the canvas: `savefig` draws everything twice, for bounding boxes that nobody asks for
    if form == "png":
        FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
        return file.getvalue()
    # the salt names the parts of the drawing, which must differ between drawings of one page
    with (
        _SVG_SETTINGS,
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": figure.get_label() or "figure"}),
    ):
        figure.set_facecolor("none")
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    text = file.getvalue().decode()
    for colour, styled in _STYLED.items():
        text = text.replace(colour, styled)
    return text[text.index("<svg") :].encode()


def score_histogram(panels: Sequence[ScorePanel], form: str = "png") -> bytes:
    """Overlay the genuine (filled) and impostor (dashed) scores of 1 to 7 datasets, FDR and EER in the
    legend; `form` is png or svg.
    """
    figure, axes = _canvas(panels, "a histogram", "histogram")
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
    handles += [
        Line2D([], [], color=FAINT, linewidth=1.7, label="same identity (genuine)"),
        Line2D([], [], color=FAINT, linewidth=1.7, linestyle=_DASHES, label="across identities (impostor)"),
    ]
    axes.set_xlim(centres[0], centres[-1])
    axes.set_ylim(bottom=0)
    axes.margins(y=0.06)
    finish(axes, "cosine similarity of two images", "density of pairs")
    _legend(figure, handles)
    return draw(figure, form)


def det_curves(panels: Sequence[ScorePanel], form: str = "png") -> bytes:
    """Draw the detection error trade-off of 1 to 7 datasets: FNMR over FMR as the threshold moves.

    Both axes are logarithmic, as in the reports of NIST's face recognition tests; the dotted line is where
    both rates are equal. `form` is png or svg.
    """
    figure, axes = _canvas(panels, "a plot of DET curves", "det")
    lowest = np.ones(2)
    for colour, panel in zip(COLOURS, panels, strict=False):
        rates = error_rates(panel.genuine, panel.impostor)
        shown = (rates.fmr > 0) & (rates.fnmr > 0)
        curve = _thinned(np.stack([rates.fmr[shown], rates.fnmr[shown]]))
        axes.plot(*curve, color=colour, linewidth=1.8, drawstyle="steps-post")
        lowest = np.minimum(lowest, curve.min(axis=1, initial=1.0))
    # whole powers of ten, no fewer than two of them and no more than six
    left, bottom = 10.0 ** np.floor(np.log10(lowest.clip(1e-6, 0.09)))
    axes.plot([max(left, bottom), 1], [max(left, bottom), 1], color=FAINT, linewidth=1, linestyle=":")
    axes.set(xscale="log", yscale="log", xlim=(left, 1), ylim=(bottom, 1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda rate, _: f"{100 * rate:g}%")
    finish(axes, "FMR: impostor pairs that match", "FNMR: genuine pairs that do not", grid="both")
    _legend(
        figure,
        [
            Patch(facecolor=colour, edgecolor=colour, label=panel.label)
            for colour, panel in zip(COLOURS, panels, strict=False)
        ],
    )
    return draw(figure, form)


def _thinned(curve: NDArray[np.float64]) -> NDArray[np.float64]:
    """Leave out the points `(2, K)` of a curve that lie within a hundredth of a decade of the one before."""
    place = np.round(100 * np.log10(curve))
    moved = np.ones(curve.shape[1], dtype=bool)
    moved[1:-1] = (place[:, 1:-1] != place[:, :-2]).any(axis=0)
    return curve[:, moved]


def finish(axes: Axes, across: str, up: str, grid: Literal["both", "x", "y"] = "y") -> None:
    """Label the axes and give them the look that all plots have."""
    axes.set_xlabel(across, color=INK)
    axes.set_ylabel(up, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(FAINT)
    axes.tick_params(which="both", colors=INK)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")  # the page shines through


def _canvas(panels: Sequence[ScorePanel], what: str, label: str) -> tuple[Figure, Axes]:
    if not 1 <= len(panels) <= len(COLOURS):
        raise NegFaceDiffError(f"{what} shows 1 to {len(COLOURS)} datasets, got {len(panels)}")
    figure = Figure(figsize=(8.4, 4.6), dpi=150, facecolor="white", layout="constrained", label=label)
    return figure, figure.add_subplot()


def _legend(figure: Figure, handles: Sequence[Patch | Line2D]) -> None:
    figure.legend(
        handles=handles, loc="outside upper left", ncols=2, frameon=False, fontsize=9.5, labelcolor=INK
    )


def _edges(panels: Sequence[ScorePanel]) -> NDArray[np.float64]:
    """Common bin edges over all scores, by Scott's rule, 3.49 sd n^(-1/3), for the kind that needs most."""
    kinds = [kind for panel in panels for kind in (panel.genuine, panel.impostor)]
    width = max(0.01, round(max(3.49 * kind.std * kind.size ** (-1 / 3) for kind in kinds), 2))
    low = min(kind.levels[0] for kind in kinds)
    high = max(kind.levels[-1] for kind in kinds)
    return np.arange(np.floor(low / width) - 2, np.ceil(high / width) + 3) * width


def _density(scores: Distribution, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.histogram(scores.levels, bins=edges, weights=scores.counts, density=True)[0]

"""Small plots of how the numbers of a dataset's images are distributed."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.evaluation.plots import COLOURS, draw, finish

#: What each distribution of a report is called on its axis, in the order in which they are drawn.
LABELS = {
    "context_cosine": "cosine to the own context",
    "quality": "quality",
    "score": "detection score",
    "yaw": "yaw, ° (right of the image > 0)",
    "pitch": "pitch, ° (up > 0)",
    "roll": "roll, ° (clockwise > 0)",
    "age": "age, years",
}
_COLUMNS = 3
_FILL: dict[str, Any] = {"color": COLOURS[0], "alpha": 0.55}


def distribution_plots(summaries: Mapping[str, Mapping[str, Any]], form: str = "png") -> bytes:
    """Draw the histogram of each of `summaries` (by name, see `summaries.summarise`) in a panel of its own.

    Empty bins at both ends are left out, and bins put together where images are few; a dotted line marks the
    median. `form` is png or svg. Raises NegFaceDiffError where there is nothing to draw.
    """
    names = [name for name in LABELS if name in summaries]
    if not names:
        raise NegFaceDiffError(
            f"no distribution to draw among {sorted(summaries)}; there are {sorted(LABELS)}"
        )
    rows = -(-len(names) // _COLUMNS)
    figure = Figure(
        figsize=(8.4, 2.2 * rows), dpi=150, facecolor="white", layout="constrained", label="distributions"
    )
    for place, name in enumerate(names):
        axes, summary = figure.add_subplot(rows, _COLUMNS, place + 1), summaries[name]
        edges = np.linspace(summary["low"], summary["high"], len(summary["counts"]) + 1)
        filled = np.flatnonzero(summary["counts"])
        first, end = filled[0], filled[-1] + 1
        # no more bins than the square root of the images, as many as tell something
        step = max(1, math.ceil((end - first) / max(4.0, math.sqrt(summary["count"]))))
        starts = np.arange(first, end, step)
        counts = np.add.reduceat(summary["counts"][:end], starts)
        axes.stairs(
            counts, [*edges[starts], edges[min(starts[-1] + step, len(edges) - 1)]], fill=True, **_FILL
        )
        axes.axvline(summary["quantiles"][2], color=COLOURS[1], linewidth=1.2, linestyle=":")
        axes.locator_params(nbins=4)
        finish(axes, LABELS[name], "images" if place % _COLUMNS == 0 else "")
    return draw(figure, form)

"""The curves of a training, as a table and as a picture."""

import csv
import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from negfacediff_core.evaluation.plots import COLOURS, FAINT, INK, draw, finish
from negfacediff_core.tensor_files import replacing

TABLE, PICTURE = "curves.csv", "curves.svg"
#: Columns of the table: of each epoch, counted from 1.
COLUMNS = (
    "epoch",
    "loss",
    "accuracy",
    "learning_rate",
    "eer",
    "fmr100",
    "fdr",
    "seconds",
    "images_per_second",
    "waited",
)


def write_table(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write `curves.csv`, in one piece: epochs with the keys COLUMNS.

    `accuracy` is the share of training images whose own identity is the most probable, `waited` the share of
    the time in which no batch was there.
    """
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows({key: f"{row[key]:.6g}" for key in COLUMNS} for row in rows)
    with replacing(folder / TABLE) as file:
        file.write(text.getvalue().encode())


def write_picture(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw `curves.svg` of the same, in one piece."""
    with replacing(folder / PICTURE) as file:
        file.write(_picture(rows))


def _picture(rows: Sequence[dict[str, Any]]) -> bytes:
    """Loss above, EER of held-out identities below; lines stand where the learning rate fell to a tenth."""
    figure = Figure(figsize=(8.4, 5.2), dpi=150, facecolor="white", layout="constrained", label="curves")
    upper, lower = figure.subplots(2, sharex=True)
    epochs = [row["epoch"] for row in rows]
    best = min(rows, key=lambda row: (row["eer"], -row["fdr"]))
    upper.plot(epochs, [row["loss"] for row in rows], color=COLOURS[0], linewidth=1.8, marker=".")
    lower.plot(epochs, [row["eer"] for row in rows], color=COLOURS[1], linewidth=1.8, marker=".")
    lower.plot(best["epoch"], best["eer"], "o", markersize=9, fillstyle="none", color=INK)
    for before, row in pairwise(rows):
        if row["learning_rate"] < 0.2 * before["learning_rate"]:
            for axes in (upper, lower):
                axes.axvline(row["epoch"] - 0.5, color=FAINT, linewidth=1, linestyle=":")
    upper.set_ylim(bottom=0)
    lower.set_ylim(bottom=0)
    lower.yaxis.set_major_formatter(lambda rate, _: f"{100 * rate:g}%")
    lower.xaxis.get_major_locator().set_params(integer=True)
    finish(upper, "", "training loss")
    finish(lower, f"epoch (circle: the best, {best['epoch']:g})", "EER, held-out identities")
    return draw(figure, "svg")

"""What a sweep leaves to read: a table and a plot of its figures over the seeds of every setting."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from negfacediff_core.evaluation.plots import COLOURS, INK, draw, finish

# Groups take one after the other: of as many colours as these no two have the look of the first.
_COLOURS, _MARKERS = (*COLOURS, "#882255"), "osD^v<X"
# Points (1/72 inch) that settings of one place are drawn apart: so few that none seems to lie elsewhere.
_BESIDE = 1.0


class Measure(NamedTuple):
    """A figure of a sweep: its key, its title, its form as text and, where it is plotted, how it is read.

    The axis of a share with `begins` starts there or below and ends at 1: what fills a narrower one is noise.
    """

    key: str
    title: str
    form: str
    read: str = ""
    begins: float | None = None


#: What is set against the axis.
MEASURES = (
    Measure("fdr", "FDR", ".2f", "more is better"),
    Measure("eer", "EER", ".1%", "less is better"),
    Measure("detected_fraction", "faces found", ".2%", "more is better", begins=0.95),
    Measure("embedding_diversity", "diversity of embeddings", ".3f", "1 − cosine; more varied is higher"),
)
#: What the table has besides.
LISTED = (Measure("fmr100", "FMR100", ".1%"), Measure("seconds", "seconds of work", ",.0f"))
EVALUATIONS = "network evaluations an image"
AXES = {"evaluations": ("network_evaluations", EVALUATIONS), "w": ("w", "negative weight w")}

Row = Mapping[str, Any]


def table_of(rows: Sequence[Row]) -> str:
    """Return a Markdown table: a line a setting, with the mean over its seeds, the lowest and the highest."""
    measures = (*MEASURES, *LISTED)
    weights = len({row["w"] for row in rows}) > 1
    head = ["setting", "group", *["w"] * weights, EVALUATIONS]
    head += [*(measure.title for measure in measures), "seeds"]
    lines = [head, ["---"] * len(head)]
    for group, variations in _grouped(rows).items():
        for name, chosen in variations.items():
            cells = (_spread_text(_values(chosen, measure.key), measure.form) for measure in measures)
            evaluations = f"{chosen[0]['network_evaluations']:,}"
            weight = [f"{chosen[0]['w']:g}"] * weights
            lines.append([name, group, *weight, evaluations, *cells, str(len(chosen))])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def plot_of(rows: Sequence[Row], axis: str, title: str, form: str = "png") -> bytes:
    """Plot every measure against `axis` (of AXES): means over seeds, bars from the lowest to the highest.

    Groups of a single setting that share its place with others are drawn a little beside it. Where the axis
    is w, lines begin at the setting of w = 0, in which all of them are one.
    """
    key, label = AXES[axis]
    figure = Figure(figsize=(10, 7.2), dpi=130, facecolor="white", layout="constrained", label="sweep")
    groups = _grouped(rows)
    looks: list[dict[str, Any]] = [
        {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
        for number in range(len(groups))
    ]
    shifts = shifts_of([[chosen[0][key] for chosen in variations.values()] for variations in groups.values()])
    for axes, measure in zip(figure.subplots(2, 2).flat, MEASURES, strict=True):
        unweighted = _values([row for row in rows if axis == "w" and not row["w"]], measure.key)
        for look, variations, shift in zip(looks, groups.values(), shifts, strict=True):
            points = sorted(
                (chosen[0][key], values)
                for chosen in variations.values()
                if (values := _values(chosen, measure.key))
            )
            _draw_group(axes, points, shift, look)
            if unweighted and len(points) > 1 and points[0][0]:
                first, values = points[0]
                ends = statistics.mean(unweighted), statistics.mean(values)
                axes.plot([0, first], ends, color=look["color"], linewidth=1.4, linestyle=":")
        if axis == "evaluations":
            axes.set_xscale("log")
            ticks = sorted({row[key] for row in rows})
            axes.set_xticks(_apart(ticks), [f"{tick:,}" for tick in _apart(ticks)])
            axes.minorticks_off()
        if measure.form.endswith("%"):
            axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
        if measure.begins is not None:
            bottom = min(measure.begins, axes.get_ylim()[0])
            axes.set_ylim(bottom, 1 + (1 - bottom) / 20)
        finish(axes, label, f"{measure.title}\n({measure.read})")
    handles = [
        Line2D([], [], **look, linewidth=1.4, label=group) for look, group in zip(looks, groups, strict=True)
    ]
    figure.suptitle(title, color=INK, fontsize=12)
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, labelcolor=INK)
    return draw(figure, form)


def shifts_of(places: Sequence[Sequence[float]]) -> list[float]:
    """How far to the right each group is drawn of its `places` on the axis, in points.

    A group of several places is a line, which stays; those of one that is taken, by a line or another one,
    are put beside it, right and left in turn.
    """
    # lines that cross are told apart by their course, and take one place together
    taken = Counter({place for group in places if len(group) > 1 for place in group})
    shifts = []
    for group in places:
        number = taken[group[0]] if len(group) == 1 else 0
        taken[group[0]] += len(group) == 1
        shifts.append(_BESIDE * ((number + 1) // 2) * (1 if number % 2 else -1))
    return shifts


def _draw_group(
    axes: Axes, points: Sequence[tuple[float, Sequence[float]]], shift: float, look: Mapping[str, Any]
) -> None:
    """Draw places and their values over seeds, `shift` points to the right."""
    if not points:
        return
    means = [statistics.mean(values) for _, values in points]
    below = [mean - min(values) for mean, (_, values) in zip(means, points, strict=True)]
    above = [max(values) - mean for mean, (_, values) in zip(means, points, strict=True)]
    drawn = axes.errorbar(
        [place for place, _ in points],
        means,
        yerr=[below, above],
        **look,
        markersize=5,
        linewidth=1.4,
        capsize=2.5,
    )
    # in points, and after the limits of the axis are known: on a logarithmic one a distance is no number
    beside = ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    for part in drawn.get_children():
        part.set_transform(axes.transData + beside)


def _grouped(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Rows by group and setting, in the order in which they come."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        groups.setdefault(row["group"], {}).setdefault(row["variation"], []).append(row)
    return groups


def _values(rows: Sequence[Row], key: str) -> list[float]:
    """The figure of each row that has it."""
    return [row[key] for row in rows if row.get(key) is not None]


def _spread_text(values: Sequence[float], form: str) -> str:
    if not values:
        return "n/a"
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def _apart(ticks: Sequence[float]) -> list[float]:
    """Leave out ticks that lie within a third above the one before: their numbers would overlap."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or tick > 1.35 * kept[-1]:
            kept.append(tick)
    return kept

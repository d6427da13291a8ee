"""Numbers of a report as text, and the cell of a figure: value, interval, difference to the first dataset."""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from negfacediff_core.evaluation.figures import Figure


def exists(value: object) -> TypeGuard[float]:
    """Tell whether `value` is a finite number: a figure that could not be computed is None."""
    return isinstance(value, int | float) and math.isfinite(value)


def number_text(value: float, form: str) -> str:
    """Format a number with a minus sign, not a hyphen; what rounds to 0 has no sign."""
    text = f"{value:{form}}"
    return text.replace("-", "−") if any(digit in text for digit in "123456789") else text.lstrip("+-")


def figure_cell(figure: Figure, dataset: Mapping[str, Any], first: Mapping[str, Any], coloured: bool) -> str:
    """Return, as HTML, a value, its interval if there is one, and the difference to the first dataset.

    A difference is `coloured` as better or worse where it has an interval, which does not hold 0, and does
    not round to 0: of any other it is not known whether chance alone explains it.
    """
    value, reference = dataset.get(figure.key), first.get(figure.key)
    if not exists(value):
        return "n/a"
    cell = number_text(value, figure.form)
    interval = dataset.get(f"{figure.key}_interval")
    if interval and all(map(exists, interval)):
        cell += f'<span class="interval">{_limits(interval, figure.form)}</span>'
    if dataset is not first and exists(reference):
        limits = dataset.get(f"{figure.key}_difference")
        kind = _kind(figure, value - reference, limits) if coloured else ""
        cell += f'<span class="difference{kind}">{_difference(value - reference, limits, figure.form)}</span>'
    return cell


def _kind(figure: Figure, change: float, limits: tuple[float, float] | None) -> str:
    """The class of a difference: better, worse, or neither."""
    if limits is None or limits[0] <= 0 <= limits[1]:
        return ""
    if not figure.better or _signed(change, figure.form)[0] not in "+−":
        return ""
    return " better" if change * figure.better > 0 else " worse"


def _difference(change: float, limits: tuple[float, float] | None, form: str) -> str:
    """A difference and its interval; those of shares are in points of a percent."""
    words = _signed(change, form)
    if limits:
        # no break within the brackets: in a narrow column they stand on a line of their own
        words += " [" + ",\N{NO-BREAK SPACE}".join(_signed(limit, form) for limit in limits) + "]"
    return words + " points" * form.endswith("%")


def _signed(change: float, form: str) -> str:
    if form.endswith("%"):
        change, form = 100 * change, f"{form[:-1]}f"
    return number_text(change, f"+{form}")


def _limits(interval: tuple[float, float], form: str) -> str:
    return f"[{', '.join(number_text(limit, form) for limit in interval)}]"

"""Tables of verification figures, as papers have them: a row a recogniser, a column a set."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

#: Columns of a template set in the first table: TAR at these FARs.
SHOWN_FARS = ("1e-5", "1e-4")
_FIGURE_NAMES = {"accuracy": "accuracy", "eer": "EER", "tar_1e-3": "TAR@1e-3"}


class Table(NamedTuple):
    """A `title`, the heads of the columns, and rows of cells; the first `names` columns hold names."""

    title: str
    head: list[str]
    rows: list[list[str]]
    names: int


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Return the tables of results, as `results.json` has them; one without rows is left out.

    Numbers are percents. A figure that is not there yet is a dash.
    """
    made = [_accuracies(results), _rates(results), _differences(results)]
    return [table for table in made if table.rows and len(table.head) > table.names]


def _accuracies(results: Mapping[str, Any]) -> Table:
    """Accuracy by set and its average, then IJB-C's columns."""
    pairs, templates = _names(results, "pairs"), _names(results, "templates")
    head = ["recogniser", *pairs, *(["average"] if len(pairs) > 1 else [])]
    head += [f"{name} @{far}" for name in templates for far in SHOWN_FARS]
    rows = []
    for recogniser in results["recognisers"]:
        figures = results["figures"].get(recogniser["name"], {})
        cells = [_accuracy(figures.get(name)) for name in pairs]
        if len(pairs) > 1:
            average = average_accuracy(figures, pairs)
            cells.append("-" if average is None else _percent(average))
        for name in templates:
            tar = figures.get(name, {}).get("tar", {})
            cells += [_percent(tar[far]) if far in tar else "-" for far in SHOWN_FARS]
        rows.append([recogniser["name"], *cells])
    titles = ["accuracy, mean ± deviation over ten folds (%)"] if pairs else []
    titles += [f"{', '.join(templates)}: TAR at FAR (%)"] if templates else []
    return Table("; ".join(["Verification", *titles]).replace("; ", ": ", 1), head, rows, 1)


def average_accuracy(figures: Mapping[str, Any], pairs: Sequence[str]) -> float | None:
    """Return the mean accuracy over the sets of pairs; None while one is not there."""
    found = [figures[name]["accuracy"] for name in pairs if name in figures]
    return sum(found) / len(found) if found and len(found) == len(pairs) else None


def _rates(results: Mapping[str, Any]) -> Table:
    """TAR@FAR, EER and AUC, a row a set and recogniser."""
    shown = [
        (name, recogniser["name"], results["figures"][recogniser["name"]][name])
        for name in results["sets"]
        for recogniser in results["recognisers"]
        if name in results["figures"].get(recogniser["name"], {})
    ]
    fars = sorted({far for *_, figures in shown for far in figures["tar"]}, key=float, reverse=True)
    head = ["set", "recogniser", "pairs", "EER", "AUC", *(f"TAR@{far}" for far in fars)]
    rows = [
        [
            name,
            recogniser,
            f"{figures['genuine'] + figures['impostor']:,}",
            _percent(figures["eer"]),
            _percent(figures["auc"]),
            *(_tar(figures, far) for far in fars),
        ]
        for name, recogniser, figures in shown
    ]
    return Table("EER, AUC, and TAR at a FAR of at most ... (%)", head, rows, 2)


def _tar(figures: Mapping[str, Any], far: str) -> str:
    """A rate; with a star where there are too few impostor pairs for one of them to be falsely accepted."""
    if far not in figures["tar"]:
        return "-"
    return _percent(figures["tar"][far]) + ("*" if figures["impostor"] * float(far) < 1 else "")


def _differences(results: Mapping[str, Any]) -> Table:
    """How the other recognisers differ from the first, with intervals."""
    rows = [
        [name, recogniser, *(_difference(sets[name][figure]) for figure in _FIGURE_NAMES)]
        for name in results["sets"]
        for recogniser, sets in results["differences"].items()
        if name in sets
    ]
    first = results["recognisers"][0]["name"]
    head = ["set", "recogniser", *_FIGURE_NAMES.values()]
    return Table(f"Difference to {first}, with 95% interval over pairs (percentage points)", head, rows, 2)


def _difference(found: Mapping[str, float]) -> str:
    low, high = 100 * found["low"], 100 * found["high"]
    return f"{100 * found['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"


def _names(results: Mapping[str, Any], kind: str) -> list[str]:
    return [name for name, one in results["sets"].items() if one["kind"] == kind]


def _accuracy(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return "-"
    return f"{_percent(figures['accuracy'])} ± {_percent(figures['accuracy_std'])}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def notes(results: Mapping[str, Any]) -> list[str]:
    """Return what one must know to read the tables."""
    said = []
    figures = [one for sets in results["figures"].values() for one in sets.values()]
    said.append("TAR: share of the genuine pairs that are accepted. FAR: share of the impostor pairs.")
    if any(one["impostor"] * float(far) < 1 for one in figures for far in one["tar"]):
        said.append("* Fewer than 1/FAR impostor pairs: the TAR at which none is accepted.")
    form = "the sum of the embeddings of image and mirror image" if results["flip"] else "of the image alone"
    said.append(f"Embeddings: {form}.")
    for name, counts in results["faceless"].items():
        said.append(
            f"{name}: no face found in {counts['faceless']:,} of {counts['images']:,} images; their middle "
            "was taken."
        )
    if "frcsyn" in results:
        frcsyn = results["frcsyn"]
        limits = ", ".join(
            f"{system} ({name}) {frcsyn['thresholds'][name]:.3f}"
            for name, system in frcsyn["systems"].items()
        )
        said.append(
            f"FRCSyn: decision 1 where the cosine is above the threshold that judges the pairs of "
            f"{frcsyn['threshold_pairs']} best: {limits}."
        )
    return said


def markdown(results: Mapping[str, Any]) -> str:
    """Write the tables and notes in Markdown."""
    parts = []
    for table in tables(results):
        lines = [
            table.head,
            ["---" if n < table.names else "---:" for n in range(len(table.head))],
            *table.rows,
        ]
        parts.append(f"### {table.title}")
        parts.append("\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines))
    return "\n\n".join([*parts, *notes(results)]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def plain_text(results: Mapping[str, Any]) -> str:
    """Write the tables and notes in columns of plain text."""
    parts = []
    for table in tables(results):
        widths = [max(map(len, column)) for column in zip(table.head, *table.rows, strict=True)]
        lines = [
            "  ".join(_aligned(line, widths, table.names)).rstrip() for line in (table.head, *table.rows)
        ]
        parts.append("\n".join([table.title, "", *lines]))
    return "\n\n".join([*parts, "\n".join(notes(results))]) + "\n"


def _aligned(cells: Sequence[str], widths: Sequence[int], names: int) -> list[str]:
    """Cells as wide as their columns, names to the left and numbers to the right."""
    return [
        cell.ljust(width) if number < names else cell.rjust(width)
        for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]

"""The report of one or several datasets as one self-contained HTML page, light or dark, without scripts."""

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeGuard

from negfacediff_core.evaluation.figures import FIGURES, GROUPS, SETTINGS, Figure, check_report

_CAPTIONS = {
    "histogram": "Similarity of image pairs. The further the filled genuine scores stand from the dashed "
    "impostor scores, the better the identities are told apart.",
    "det": "Detection error trade-off. Lower is better; the dotted line is where both errors are equal.",
    "distributions": "Numbers of the images, by which the dataset's variety shows; the dotted line is the "
    "median. Angles are estimates from five landmarks.",
    "contact_sheet": "Rows are identities, columns replicates. The same place in each panel is the same "
    "identity and replicate. Click or tap to enlarge.",
}

_STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")


def render_report(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Render `report` (see `figures`) and `pictures` by file name (PNG, SVG) as a page.

    Of a picture in both forms the SVG is shown. Raises NegFaceDiffError where a required key is missing.
    """
    check_report(report)
    datasets = report["datasets"]
    title = escape(str(report.get("title", "Synthetic face dataset")))
    sections = [
        f"<h1>{title}</h1>",
        _lead(datasets),
        _about(report),
        "<h2>Figures</h2>",
        _figures_table(datasets),
        *(_picture(name, pictures) for name in _ordered(pictures)),
        "<h2>Settings</h2>",
        _settings_table(datasets),
        _lineage(datasets),
        _licences(report.get("licences", ())),
        "<h2>What the figures mean</h2>",
        _definitions(datasets),
        "<h2>Versions</h2>",
        _plain_table(
            ["tool", "version"],
            [[_text(tool), _text(report["versions"][tool])] for tool in report["versions"]],
        ),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return escape(f"{value:g}" if isinstance(value, float) else str(value))


def _label(dataset: Mapping[str, Any]) -> str:
    return _text(dataset.get("name") or f"{dataset['rule']}, w = {dataset['w']:g}")


def _exists(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _table(head: Sequence[str], groups: Mapping[str, Sequence[Sequence[str]]]) -> str:
    """A table of HTML fragments, its rows grouped under names; the first cell of a row is its header."""
    heading = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    bodies = []
    for group, rows in groups.items():
        body = "".join(
            f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>\n"
            for first, *rest in rows
        )
        name = f'<tr class="group"><th colspan="{len(head)}" scope="rowgroup">{group}</th></tr>\n'
        bodies += [f"<tbody>\n{name * bool(group)}{body}</tbody>"] if rows else []
    head_row = f"<thead><tr>{heading}</tr></thead>"
    return '<div class="scroll"><table>\n' + "\n".join([head_row, *bodies]) + "\n</table></div>"


def _plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return _table(head, {"": rows})


def _lead(datasets: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on what came out."""
    first, last = datasets[0], datasets[-1]
    if len(datasets) < 2 or not (_exists(first["fdr"]) and _exists(last["fdr"]) and first["fdr"]):
        return ""
    return (
        f'<p class="lead">From {_label(first)} to {_label(last)}, FDR goes from {first["fdr"]:.2f} to '
        f"{last['fdr']:.2f} (×{last['fdr'] / first['fdr']:.2f}) and EER from {first['eer']:.1%} to "
        f"{last['eer']:.1%}.</p>"
    )


def _about(report: Mapping[str, Any]) -> str:
    parts = [f"{report['seconds']:.0f} s of work on {_text(report['device'])}"]
    if "judge" in report:
        parts.append(f"judged by {_text(report['judge'])}")
    return f'<p class="about">{"; ".join(parts)}.</p>'


def _figures_table(datasets: Sequence[Mapping[str, Any]]) -> str:
    """One table, in which every group of figures that the datasets have stands under its name."""
    groups = {
        group: [
            [_term(figure), *(_figure_cell(figure, dataset, datasets[0]) for dataset in datasets)]
            for figure in _shown(datasets)
            if figure.group == group
        ]
        for group in GROUPS
    }
    return _table(["", *map(_label, datasets)], groups)


def _shown(datasets: Sequence[Mapping[str, Any]]) -> list[Figure]:
    return [figure for figure in FIGURES if any(figure.key in dataset for dataset in datasets)]


def _term(figure: Figure) -> str:
    """The figure's title: its definition shows when pointed at, and is where the link leads."""
    return f'<a href="#{figure.key}" title="{escape(figure.definition)}">{escape(figure.title)}</a>'


def _figure_cell(figure: Figure, dataset: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """A value, its interval if there is one, and the difference to the first dataset."""
    value, reference = dataset.get(figure.key), first.get(figure.key)
    if not _exists(value):
        return "n/a"
    cell = f"{value:{figure.form}}"
    interval = dataset.get(f"{figure.key}_interval")
    if interval and all(map(_exists, interval)):
        low, high = (f"{bound:{figure.form}}" for bound in interval)
        cell += f'<span class="interval">[{low}, {high}]</span>'
    if dataset is not first and _exists(reference):
        change = value - reference
        kind = {1: " better", -1: " worse", 0: ""}[figure.better * (int(change > 0) - int(change < 0))]
        words = _difference(change, figure.form)
        limits = dataset.get(f"{figure.key}_difference")
        if limits:
            words += f" [{', '.join(_difference(limit, figure.form) for limit in limits)}]"
        cell += f'<span class="difference{kind}">{words.replace(" points [", " [")}</span>'
    return cell


def _difference(change: float, form: str) -> str:
    if form.endswith("%"):
        return f"{100 * change:+{form[:-1]}f} points"
    return f"{change:+{form}}"


def _ordered(pictures: Mapping[str, bytes]) -> list[str]:
    """Names without their endings: known pictures in the order of their captions, then the others."""
    names = dict.fromkeys(name.rpartition(".")[0] for name in pictures)
    return [name for name in _CAPTIONS if name in names] + [name for name in names if name not in _CAPTIONS]


def _picture(name: str, pictures: Mapping[str, bytes]) -> str:
    words = escape(name.replace("_", " "))
    caption = f"<figcaption>{escape(_CAPTIONS.get(name, name.replace('_', ' ')))}</figcaption>"
    drawing = pictures.get(f"{name}.svg")
    if drawing is not None:
        svg = drawing.decode().replace("<svg ", f'<svg role="img" aria-label="{words}" ', 1)
        return f'<figure><div class="plot">{svg}</div>{caption}</figure>'
    data = base64.b64encode(pictures[f"{name}.png"]).decode("ascii")
    image = f'<img alt="{words}" src="data:image/png;base64,{data}">'
    # a box that is ticked enlarges what follows it, without a script
    return (
        f'<figure><label class="zoom"><input type="checkbox" aria-label="enlarge the {words}">'
        f"<span>{image}</span></label>{caption}</figure>"
    )


def _settings_table(datasets: Sequence[Mapping[str, Any]]) -> str:
    described = [
        {key: dataset[key] for key in SETTINGS} | dict(dataset.get("settings", {})) for dataset in datasets
    ]
    keys = dict.fromkeys(key for settings in described for key in settings)
    rows = [[_text(key), *(_text(settings.get(key, "")) for settings in described)] for key in keys]
    return _plain_table(["", *map(_label, datasets)], rows)


def _lineage(datasets: Sequence[Mapping[str, Any]]) -> str:
    """Stage fingerprints; equal ones are the same data, made once."""
    stages = dict.fromkeys(stage for dataset in datasets for stage in dataset.get("lineage", {}))
    if not stages:
        return ""
    rows = [
        [_text(stage), *(f"<code>{_text(d.get('lineage', {}).get(stage, ''))}</code>" for d in datasets)]
        for stage in stages
    ]
    note = (
        '<p class="about">Fingerprints of the stages. Where two are equal, the datasets share that data.</p>'
    )
    return "<h2>Lineage</h2>\n" + note + _plain_table(["stage", *map(_label, datasets)], rows)


def _licences(licences: Sequence[Mapping[str, Any]]) -> str:
    if not licences:
        return ""
    rows = [[_text(entry.get(key, "")) for key in ("part", "licence", "source")] for entry in licences]
    note = '<p class="about">A dataset inherits the conditions of everything that it was made with.</p>'
    return "<h2>Licences</h2>\n" + note + _plain_table(["part", "licence", "source"], rows)


def _definitions(datasets: Sequence[Mapping[str, Any]]) -> str:
    entries = "".join(
        f'<dt id="{figure.key}">{escape(figure.title)}</dt><dd>{escape(figure.definition)}</dd>\n'
        for figure in _shown(datasets)
    )
    return f"<dl>\n{entries}</dl>"

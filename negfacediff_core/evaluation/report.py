"""The report of one or several datasets as one self-contained HTML page, without scripts or links."""

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, TypeGuard

from negfacediff_core.evaluation.figures import FIGURES, SETTINGS, Figure, check_report

_CAPTIONS = {
    "histogram": "Similarity of image pairs. The further the filled genuine scores stand from the dashed "
    "impostor scores, the better the identities are told apart.",
    "contact_sheet": "Rows are identities, columns replicates. The same place in each panel is the same "
    "identity and replicate.",
}

_STYLE = """
:root { color-scheme: light; --ink: #1f2328; --faint: #667; --line: #d8dbe0;
  --better: #00664b; --worse: #a03c00; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 68rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; }
p.lead { font-size: 1.1rem; margin: .2rem 0 0; }
p.about, figcaption, .difference, .interval { color: var(--faint); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .38rem .9rem .38rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--ink); }
tbody th { font-weight: 500; white-space: nowrap; }
.difference, .interval { font-size: .85em; margin-left: .6em; white-space: nowrap; }
.better { color: var(--better); } .worse { color: var(--worse); }
figure { margin: 1.6rem 0; } img { max-width: 100%; height: auto; border: 1px solid var(--line); }
figcaption { font-size: .92rem; margin-top: .4rem; }
dt { font-weight: 600; margin-top: .6rem; } dd { margin: 0; }
code { font: .86em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
@media (max-width: 34rem) { body { padding: 1.2rem .8rem 3rem; } th, td { padding-right: .4rem; }
  tbody th { white-space: normal; } .interval, .difference { display: block; margin: 0; } }
@media print { body { padding: 0; max-width: none; font-size: 11px; } figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; } }
"""


def render_report(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Render `report` (see `figures`) and PNG `pictures` by name as a page; histogram and contact_sheet lead.

    Raises NegFaceDiffError where a required key is missing.
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
        *(_picture(name, pictures[name]) for name in _ordered(pictures)),
        "<h2>Settings</h2>",
        _settings_table(datasets),
        _lineage(datasets),
        _licences(report.get("licences", ())),
        "<h2>What the figures mean</h2>",
        _definitions(datasets),
        "<h2>Versions</h2>",
        _table(
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


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of HTML fragments; the first cell of a row is its header."""
    heading = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>\n"
        for first, *rest in rows
    )
    head_row = f"<thead><tr>{heading}</tr></thead>"
    return f'<div class="scroll"><table>\n{head_row}\n<tbody>\n{body}</tbody>\n</table></div>'


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
    rows = [
        [escape(figure.title), *(_figure_cell(figure, dataset, datasets[0]) for dataset in datasets)]
        for figure in FIGURES
        if any(figure.key in dataset for dataset in datasets)
    ]
    return _table(["", *map(_label, datasets)], rows)


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
        cell += f'<span class="difference{kind}">{_difference(change, figure.form)}</span>'
    return cell


def _difference(change: float, form: str) -> str:
    if form.endswith("%"):
        return f"{100 * change:+{form[:-1]}f} points"
    return f"{change:+{form}}"


def _ordered(pictures: Mapping[str, bytes]) -> list[str]:
    """Known pictures in the order of their captions, then the others as given."""
    return [name for name in _CAPTIONS if name in pictures] + [
        name for name in pictures if name not in _CAPTIONS
    ]


def _picture(name: str, png: bytes) -> str:
    data = base64.b64encode(png).decode("ascii")
    words = escape(name.replace("_", " "))
    caption = escape(_CAPTIONS.get(name, name.replace("_", " ")))
    image = f'<img alt="{words}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _settings_table(datasets: Sequence[Mapping[str, Any]]) -> str:
    described = [
        {key: dataset[key] for key in SETTINGS} | dict(dataset.get("settings", {})) for dataset in datasets
    ]
    keys = dict.fromkeys(key for settings in described for key in settings)
    rows = [[_text(key), *(_text(settings.get(key, "")) for settings in described)] for key in keys]
    return _table(["", *map(_label, datasets)], rows)


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
    return "<h2>Lineage</h2>\n" + note + _table(["stage", *map(_label, datasets)], rows)


def _licences(licences: Sequence[Mapping[str, Any]]) -> str:
    if not licences:
        return ""
    rows = [[_text(entry.get(key, "")) for key in ("part", "licence", "source")] for entry in licences]
    note = '<p class="about">A dataset inherits the conditions of everything that it was made with.</p>'
    return "<h2>Licences</h2>\n" + note + _table(["part", "licence", "source"], rows)


def _definitions(datasets: Sequence[Mapping[str, Any]]) -> str:
    entries = "".join(
        f"<dt>{escape(figure.title)}</dt><dd>{escape(figure.definition)}</dd>\n"
        for figure in FIGURES
        if any(figure.key in dataset for dataset in datasets)
    )
    return f"<dl>\n{entries}</dl>"

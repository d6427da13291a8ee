"""The report of one or several datasets as one self-contained HTML page, light or dark, without scripts."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from negfacediff_core.evaluation.cells import exists, figure_cell, number_text
from negfacediff_core.evaluation.figures import FIGURES, GROUPS, SETTINGS, Figure
from negfacediff_core.evaluation.schema import check_report

_CAPTIONS = {
    "histogram": "Similarity of image pairs. The further the filled genuine scores stand from the dashed "
    "impostor scores, the better the identities are told apart.",
    "det": "Detection error trade-off. Lower is better; the dotted line is where both errors are equal.",
    "distributions": "Numbers of the images, by which the dataset's variety shows; the dotted line is the "
    "median. Angles are estimates from five landmarks.",
    "contact_sheet": "Rows are identities, columns replicates. Click or tap to enlarge.",
}

#: What stands in the glossary beside the figures: anchor, title and meaning.
_INTERVAL = (
    "interval",
    "[low, high]",
    "95% interval by the bootstrap over identities: identities are drawn anew with replacement, because the "
    "pairs of one identity move together, and the interval holds 95% of the results. Of large sets a few "
    "disjoint subsets are resampled to the size of the whole: bag of little bootstraps (arXiv 1112.5016).",
)
_DIFFERENCE = (
    "difference",
    "+ and − beneath a value",
    "Difference to the first dataset and, where both drew the same identities, its 95% interval by the "
    "paired bootstrap. Green is better and orange worse than the first, beyond what chance explains. Without "
    "colour are differences without an interval, those whose interval holds 0, and figures of which neither "
    "direction is better.",
)

_STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")


def render_report(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Render `report` (see `schema`) and `pictures` by file name (PNG, SVG) as a page.

    Of a picture in both forms the SVG is shown. Raises NegFaceDiffError where a required key is missing.
    """
    check_report(report)
    datasets, warnings = report["datasets"], report.get("warnings", ())
    title = escape(str(report.get("title", "Synthetic face dataset")))
    sections = [
        f"<h1>{title}</h1>",
        *(f'<p class="warning">{_text(words)}</p>' for words in warnings),
        "" if warnings else _lead(datasets),
        _about(report),
        *(_picture(name, pictures, report.get("captions", {})) for name in _ordered(pictures)),
        "<h2>Figures</h2>",
        _figures_table(datasets, coloured=not warnings),
        *(f'<p class="about">{_text(words)}</p>' for words in report.get("notes", ())),
        _operating_points(datasets),
        _attributes(datasets),
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


def _table(head: Sequence[str], groups: Mapping[str, Sequence[Sequence[str]]]) -> str:
    """A table of HTML fragments, its rows grouped under names; the first cell of a row is its header."""
    heading = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    bodies = []
    for group, rows in groups.items():
        body = "".join(
            f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>\n"
            for first, *rest in rows
        )
        name = (
            f'<tr class="group"><th colspan="{len(head)}" scope="rowgroup"><span>{group}</span></th></tr>\n'
        )
        bodies += [f"<tbody>\n{name * bool(group)}{body}</tbody>"] if rows else []
    head_row = f"<thead><tr>{heading}</tr></thead>"
    return '<div class="scroll"><table>\n' + "\n".join([head_row, *bodies]) + "\n</table></div>"


def _plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return _table(head, {"": rows})


def _lead(datasets: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on what came out: the first dataset against the other, or the best of several others."""
    first = datasets[0]
    known = [dataset for dataset in datasets if exists(dataset["fdr"])]
    if len(datasets) < 2 or len(known) < 2 or not exists(first["fdr"]) or not first["fdr"]:
        return ""
    best = datasets[1] if len(datasets) == 2 else max(known, key=lambda dataset: dataset["fdr"])
    if best is first:
        words = (
            f"Of {len(datasets)} datasets {_label(first)}, the first, has the highest FDR: "
            f"{first['fdr']:.2f}, with an EER of {first['eer']:.1%}."
        )
    else:
        which = f"From {_label(first)} to {_label(best)}"
        which += f", the best by FDR of {len(datasets)} datasets" * (len(datasets) > 2)
        words = (
            f"{which}, FDR goes from {first['fdr']:.2f} to {best['fdr']:.2f} "
            f"(×{best['fdr'] / first['fdr']:.2f}) and EER from {first['eer']:.1%} to {best['eer']:.1%}."
        )
    return f'<p class="lead">{words}</p>'


def _about(report: Mapping[str, Any]) -> str:
    parts = [_text(report["made"])] if "made" in report else []
    parts.append(f"{report['seconds']:.0f} s of work on {_text(report['device'])}")
    if "judge" in report:
        parts.append(f"judged by {_text(report['judge'])}")
    return f'<p class="about">{"; ".join(parts)}.</p>'


def _figures_table(datasets: Sequence[Mapping[str, Any]], coloured: bool) -> str:
    """One table, in which every group of figures that the datasets have stands under its name."""
    groups = {
        group: [
            [_term(figure), *(figure_cell(figure, dataset, datasets[0], coloured) for dataset in datasets)]
            for figure in _shown(datasets)
            if figure.group == group
        ]
        for group in GROUPS
    }
    return _table(["", *map(_label, datasets)], groups)


def _operating_points(datasets: Sequence[Mapping[str, Any]]) -> str:
    """FNMR and threshold of every dataset where its FMR is at most each of the rates of `at_fmr`."""
    points = [{point["fmr_at_most"]: point for point in d.get("at_fmr", ())} for d in datasets]
    rates = sorted({rate for of_one in points for rate in of_one}, reverse=True)
    if not rates:
        return ""
    rows = [[f"{100 * rate:g}%", *(_point(of_one.get(rate), rate) for of_one in points)] for rate in rates]
    note = (
        '<p class="about">Share of genuine pairs missed (FNMR) where at most the share of impostor pairs on '
        "the left match (FMR); beneath it the lowest cosine from which that is so.</p>"
    )
    return "<h2>Operating points</h2>\n" + note + _plain_table(["FMR", *map(_label, datasets)], rows)


def _point(point: Mapping[str, Any] | None, rate: float) -> str:
    if point is None:
        return "n/a"
    if not exists(point["fnmr"]):
        return f'n/a<span class="interval">fewer than {1 / rate:,.0f} impostor pairs</span>'
    threshold = point["threshold"]
    words = f"from {number_text(threshold, '.3f')}" if exists(threshold) else "none matches"
    return f'{number_text(point["fnmr"], ".2%")}<span class="interval">{words}</span>'


def _attributes(datasets: Sequence[Mapping[str, Any]]) -> str:
    """Images of each class of the attribute, and their share."""
    counts = [dataset.get("attributes") or {} for dataset in datasets]
    names = dict.fromkeys(name for of_one in counts for name in of_one)
    if not names:
        return ""
    rows = [[_text(name), *(_share(of_one.get(name, 0), of_one) for of_one in counts)] for name in names]
    note = '<p class="about">Images of each class, as the attribute network sees them.</p>'
    return "<h2>Attribute</h2>\n" + note + _plain_table(["class", *map(_label, datasets)], rows)


def _share(count: int, counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    return f"{count:,} ({count / total:.1%})" if total else "n/a"


def _shown(datasets: Sequence[Mapping[str, Any]]) -> list[Figure]:
    return [figure for figure in FIGURES if any(figure.key in dataset for dataset in datasets)]


def _term(figure: Figure) -> str:
    """The figure's title: its definition shows when pointed at, and is where the link leads."""
    return f'<a href="#{figure.key}" title="{escape(figure.definition)}">{escape(figure.title)}</a>'


def _ordered(pictures: Mapping[str, bytes]) -> list[str]:
    """Names without their endings: known pictures in the order of their captions, then the others."""
    names = dict.fromkeys(name.rpartition(".")[0] for name in pictures)
    return [name for name in _CAPTIONS if name in names] + [name for name in names if name not in _CAPTIONS]


def _picture(name: str, pictures: Mapping[str, bytes], captions: Mapping[str, str]) -> str:
    words = escape(name.replace("_", " "))
    sentences = [_CAPTIONS.get(name, name.replace("_", " ")), captions.get(name, "")]
    caption = f"<figcaption>{_text(' '.join(filter(None, sentences)))}</figcaption>"
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
    shown = _shown(datasets)
    entries = [(figure.key, figure.title, figure.definition) for figure in shown]
    if any(f"{figure.key}_interval" in dataset for figure in shown for dataset in datasets):
        entries.append(_INTERVAL)
    if len(datasets) > 1:
        entries.append(_DIFFERENCE)
    lines = (
        f'<dt id="{key}">{escape(name)}</dt><dd>{escape(meaning)}</dd>\n' for key, name, meaning in entries
    )
    return f"<dl>\n{''.join(lines)}</dl>"

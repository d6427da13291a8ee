"""The flow `compare`: finished runs of one store side by side, in figures, plots and pictures."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prefect import flow
from prefect.runtime import flow_run

from flows.artifacts import publish
from flows.results import figures_of, json_bytes, judge_of, protocol_of, report_of, seconds_of
from flows.words import command_text, count_text
from negfacediff_core.errors import ConfigError, StoreError
from negfacediff_core.evaluation.plots import COLOURS, det_curves, score_histogram
from negfacediff_core.evaluation.report import render_report
from negfacediff_core.evaluation.sheets import contact_sheet
from negfacediff_core.stages.evaluation import RESAMPLES, difference_intervals, score_panel, sheet_panel
from negfacediff_core.store.layout import StageSpec
from negfacediff_core.store.location import locate
from negfacediff_core.store.records import pending, read_record
from negfacediff_core.store.runs import stages_of_run

#: Identities and images of each that the contact sheet shows.
SHEET = (8, 6)


class Dataset(NamedTuple):
    """A finished run and its stages."""

    run: str
    stages: Mapping[str, StageSpec]


def _title() -> str:
    """Name the flow run that this is called in after the runs that it compares."""
    return title_of(flow_run.parameters["runs"])


@flow(name="compare", flow_run_name=_title)
def compare(store: str, runs: Sequence[str], out: str = "comparison") -> dict[str, Any]:
    """Compare finished runs of `store` with the first of them; write report and pictures to the folder `out`.

    Returns the report, as `report.json` has it. ConfigError for a selection that cannot be compared,
    StoreError where a run is missing or not finished.

    Args:
        store: Folder or fsspec URL of the store.
        runs: Names of 2 to 7 finished runs; the others are compared with the first.
        out: Folder or fsspec URL for the report and the pictures.
    """
    datasets = read_datasets(store, runs)
    return write_comparison(title_of(runs), datasets, out)


def title_of(runs: Sequence[str]) -> str:
    """Name a comparison: `one, two and three`."""
    return " and ".join(filter(None, (", ".join(runs[:-1]), *runs[-1:])))


def read_datasets(store: str, runs: Sequence[str]) -> dict[str, Dataset]:
    """Return finished runs by name; raises ConfigError and StoreError as `compare` does."""
    if len(set(runs)) != len(runs) or not 2 <= len(runs) <= len(COLOURS):
        raise ConfigError(
            f"A comparison takes 2 to {len(COLOURS)} different runs, not {', '.join(runs) or 'none'}: "
            f"{command_text('status', store)} lists them."
        )
    datasets = {}
    for run in runs:
        stages = stages_of_run(store, run)
        lacking = sum(len(pending(spec)) for spec in stages.values())
        if lacking:
            raise StoreError(
                f"The run {run} is not finished, it lacks {count_text(lacking, 'unit')}: "
                f"{command_text('resume', store, run)}"
            )
        datasets[run] = Dataset(run, stages)
    return datasets


def write_comparison(title: str, datasets: Mapping[str, Dataset], out: str) -> dict[str, Any]:
    """Write report.html, report.json and the pictures of datasets, by label, to `out`; return the report.

    The differences are those to the first dataset.
    """
    figures = [{**figures_of(*dataset), "name": label} for label, dataset in datasets.items()]
    first, *others = datasets
    unpaired: dict[str, list[str]] = {}
    for label, shown in zip(others, figures[1:], strict=True):
        why = _why_unpaired(datasets[label].stages["evaluation"], datasets[first].stages["evaluation"])
        if why:
            unpaired.setdefault(why, []).append(label)
        else:
            shown |= _differences(datasets[label], datasets[first])
    stages = [dataset.stages for dataset in datasets.values()]
    report = {
        **report_of(title, figures, stages, seconds_of(spec for one in stages for spec in one.values())),
        "warnings": _warnings(datasets),
        "notes": [
            *_crowding_note(figures),
            *(
                f"Without an interval of the difference to {first}: {', '.join(labels)}, because {why}."
                for why, labels in unpaired.items()
            ),
        ],
        "captions": {"contact_sheet": _what_sheets_share(stages)},
    }
    pictures = _pictures(datasets)
    page = render_report(report, pictures)
    folder = locate(out)
    folder.check_writable()  # makes it where it is not there
    for name, content in pictures.items():
        folder.write_atomic(name, content)
    folder.write_atomic("report.html", page.encode())
    folder.write_atomic("report.json", json_bytes(report))
    publish(title, report, pictures, f"{folder.url}/report.html")
    return report


def _warnings(datasets: Mapping[str, Dataset]) -> list[str]:
    """Say what keeps the figures from being compared: judges or protocols that are not the same."""
    stages = {label: dataset.stages for label, dataset in datasets.items()}
    judges = [_judge_key(one) for one in stages.values()]
    warnings = []
    if any(judge != judges[0] for judge in judges):
        warnings.append(_not_comparable("judges", {label: judge_of(one) for label, one in stages.items()}))
    protocols = {label: protocol_of(one) for label, one in stages.items()}
    if len(set(protocols.values())) > 1:
        warnings.append(_not_comparable("protocols", protocols))
    return warnings


def _crowding_note(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say that how distinct identities are does not compare, unless all were matched at one threshold."""
    thresholds = {shown["name"]: shown.get("match_cosine") for shown in figures}
    if len(set(thresholds.values())) == 1:
        return []
    listed = "; ".join(
        f"{label}: {'none' if cosine is None else f'{cosine:.3f}'}" for label, cosine in thresholds.items()
    )
    return [
        "Distinct identities, their share and capacity do not compare, for the match thresholds differ "
        f"({listed}); evaluation.match_cosine sets one for all."
    ]


def _judge_key(stages: Mapping[str, StageSpec]) -> tuple[Mapping[str, str], bool]:
    """What makes two judges the same, wherever their files lie."""
    embedded = stages["embeddings"]
    return embedded.weights["judge"].sha256, bool(embedded.config.get("flip"))


def _not_comparable(what: str, names: Mapping[str, str]) -> str:
    listed = "; ".join(f"{label}: {name}" for label, name in names.items())
    return f"These figures are not comparable, for the {what} differ. {listed}."


def _why_unpaired(spec: StageSpec, first: StageSpec) -> str:
    """Say why the difference of two evaluations has no interval, to follow "because"; "" where it has one."""
    one, two = spec.config, first.config
    fields = {
        "protocol": "protocol",
        "identities": "identities",
        "images": "images of each",
        "bootstrap": "draws",
        "seed": "seed",
    }
    differing = [
        f"{words} ({_setting(one[name])} and {_setting(two[name])})"
        for name, words in fields.items()
        if one[name] != two[name]
    ]
    if not (one["bootstrap"] and two["bootstrap"]):
        return "evaluation.bootstrap is 0, so that no identities were drawn"
    if differing:
        return f"their evaluations have other {', '.join(differing)}"
    for each in (spec, first):
        (unit,) = each.grid.units()
        if RESAMPLES not in read_record(each, unit).sha256:
            return "a run was evaluated by an older version, which kept no draws; build it again"
    return ""


def _setting(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _what_sheets_share(stages: Sequence[Mapping[str, StageSpec]]) -> str:
    """Say what one place of the contact sheet's panels has in common."""
    if len({one["contexts"].fingerprint for one in stages}) > 1:
        return "The datasets have other contexts: the same place in two panels need not be one identity."
    if len({one["samples"].config["seed"] for one in stages}) > 1:
        return "The same place in each panel is the same identity; the noise is another."
    return "The same place in each panel is the same identity and replicate, from the same noise."


def _differences(dataset: Dataset, first: Dataset) -> dict[str, Any]:
    """Intervals of the differences to the first dataset, by figure."""
    intervals = difference_intervals(dataset.stages["evaluation"], first.stages["evaluation"])
    return {f"{name}_difference": list(limits) for name, limits in intervals.items()}


def _pictures(datasets: Mapping[str, Dataset]) -> dict[str, bytes]:
    """Draw the datasets in one contact sheet and, where pairs can be scored, histogram and DET curves."""
    evaluations = {label: dataset.stages["evaluation"] for label, dataset in datasets.items()}
    shown = tuple(
        min(size, *(spec.config[axis] for spec in evaluations.values()))
        for size, axis in zip(SHEET, ("identities", "images"), strict=True)
    )
    sheets = [sheet_panel(spec, label, *shown) for label, spec in evaluations.items()]
    pictures = {"contact_sheet.png": contact_sheet(sheets)}
    scores = [score_panel(spec, label) for label, spec in evaluations.items()]
    if all(panel.genuine.size and panel.impostor.size for panel in scores):
        for form in ("png", "svg"):
            pictures[f"histogram.{form}"] = score_histogram(scores, form)
            pictures[f"det.{form}"] = det_curves(scores, form)
    return pictures

"""What a finished build leaves besides its stages: run record, figures and report page."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from negfacediff_core.config import BuildConfig, Model
from negfacediff_core.evaluation.figures import FIGURES, GROUPS, SETTINGS
from negfacediff_core.evaluation.report import render_report
from negfacediff_core.stages.models import PROJECT
from negfacediff_core.store.layout import StageSpec, Unit, Weight
from negfacediff_core.store.records import read_record, records
from negfacediff_core.store.runs import read_run, write_run
from negfacediff_core.store.shards import read_file, read_rows
from negfacediff_core.store.status import rate, seconds_worked
from negfacediff_core.weights import licence_of
from tasks.machine import installed_versions

PICTURES = (".png", ".svg")
#: The data of the page of a built dataset, beside its `report.html`.
PAGE = "page.json"


def record_run(
    build: BuildConfig,
    specs: Mapping[str, StageSpec],
    store: str,
    seconds: float | None = None,
    joules: float | None = None,
    acknowledged: Model | None = None,
) -> None:
    """Write `runs/<name>.json`: what the name stands for.

    `seconds` is None until the build is complete; `joules` is what the machine used meanwhile, None where
    that is not known. `acknowledged` is which licences were accepted when, None where they did not need it.
    """
    write_run(
        store,
        build.name,
        {
            "config": _settled(build, specs),
            "stages": _places(specs),
            "licences": licences_of(specs),
            "acknowledged": None if acknowledged is None else acknowledged.model_dump(),
            "versions": installed_versions(),
            "seconds": seconds,
            "joules": joules,
            "timings": {name: _timings(spec) for name, spec in specs.items()},
        },
    )


def recorded_energy(build: BuildConfig, specs: Mapping[str, StageSpec], store: str) -> float | None:
    """Return the joules in the record of a build that has been made already; None if it says nothing."""
    run = read_run(store, build.name)
    return run.get("joules") if run and run["stages"] == _places(specs) else None


def _places(specs: Mapping[str, StageSpec]) -> dict[str, dict[str, Any]]:
    """Where the stages of a run lie, and how much of them is its own."""
    return {
        name: {
            "fingerprint": spec.fingerprint,
            "identities": spec.grid.identities,
            "replicates": spec.grid.replicates,
        }
        for name, spec in specs.items()
    }


def _settled(build: BuildConfig, specs: Mapping[str, StageSpec]) -> dict[str, Any]:
    """Return a build's settings, with those that it left open as they were chosen when it was planned."""
    config = build.model_dump(mode="json")
    for section, field, stage in (
        ("negatives", "pool", "negatives"),
        ("negatives", "pool", "samples"),
        ("contexts", "count", "contexts"),
    ):
        if not config[section][field]:
            config[section][field] = specs[stage].config.get(field, config[section][field])
    blocks = specs["samples"].grid
    return config | {
        "block_identities": blocks.block_identities,
        "block_images": blocks.block_replicates,
    }


def seconds_of(specs: Iterable[StageSpec]) -> float:
    """Return the time that work on the units of the stages took, shared stages once, from their records."""
    return seconds_worked(
        record for spec in {spec.path: spec for spec in specs}.values() for record in records(spec)
    )


def licences_of(specs: Mapping[str, StageSpec]) -> list[dict[str, str]]:
    """Return what the weights of the stages say of their licence: `part`, `licence` and `source` of each."""
    weights = {
        weight.path: (f"{name}: {role}", weight)
        for name, spec in specs.items()
        for role, weight in spec.weights.items()
    }
    return [
        {"part": part, "licence": licence_of(Path(path)) or _NO_LICENCE, "source": _source(weight)}
        for path, (part, weight) in weights.items()
    ]


def _source(weight: Weight) -> str:
    """Name weights to a reader elsewhere: where they lie in their folder, and the start of their hash."""
    path = Path(weight.path)
    place = path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else Path(*path.parts[-2:])
    digest = next(iter(weight.sha256.values()))
    return f"{place} (SHA-256 {digest[:12]}...)"


_NO_LICENCE = "not stated; a dataset inherits the conditions of its weights"


def failed_images(samples: StageSpec) -> dict[Unit, int]:
    """Return how many images failed to be sampled, by unit, in order, from the records of the extent."""
    wanted = set(samples.grid.units())
    failed = {record.unit: record.failed for record in records(samples) if record.failed}
    return {unit: failed[unit] for unit in sorted(wanted.intersection(failed))}


def why_failed(samples: StageSpec, unit: Unit) -> str:
    """Say which image of a unit with failed images was the first to fail, and why."""
    row = next(row for row in read_rows(samples, unit).to_pylist() if row["status"] == "failed")
    return f"image {row['replicate']} of identity {row['identity']}: {row['error']}"


def _timings(spec: StageSpec) -> dict[str, float]:
    """Return the seconds that the committed units of a stage took, by phase, summed over workers."""
    totals: Counter[str] = Counter()
    for record in records(spec):
        totals.update(record.seconds)
    return {phase: round(seconds, 3) for phase, seconds in totals.items()}


def figures_of(run: str, specs: Mapping[str, StageSpec]) -> dict[str, Any]:
    """Return a built dataset's settings and figures as in `report.json`, with what it took to make it."""
    evaluation = specs["evaluation"]
    figures = json.loads(read_file(evaluation, evaluation.grid.units()[0], "report.json"))
    lineage = {stage: spec.fingerprint for stage, spec in specs.items()}
    joules = (read_run(evaluation.store, run) or {}).get("joules")
    return {
        "name": run,
        **figures,
        "settings": _settings(specs),
        "images_per_second": rate(records(specs["samples"])),
        "seconds": round(seconds_of(specs.values()), 1),
        **({} if joules is None else {"watt_hours": joules / 3600}),
        "lineage": lineage,
    }


def _settings(specs: Mapping[str, StageSpec]) -> dict[str, Any]:
    """What a page says of how a dataset was made, beside its rule, weight and sampler."""
    contexts, negatives, samples = (specs[name].config for name in ("contexts", "negatives", "samples"))
    shown = {
        "generator": _source(specs["samples"].weights["generator"]),
        "judge": judge_of(specs),
        "protocol": protocol_of(specs),
        "contexts": contexts["source"],
        "images of each": specs["samples"].grid.replicates,
    }
    if negatives.get("pool"):
        shown |= {"pool": negatives["pool"], "negatives of each": negatives.get("count", 1)}
    return shown | {name: value for name, value in samples.items() if name not in SETTINGS}


def judge_of(specs: Mapping[str, StageSpec]) -> str:
    """Name the recogniser that a dataset's figures are by, and how it looks at the images."""
    mirrored = specs["embeddings"].config.get("flip")
    return _source(specs["embeddings"].weights["judge"]) + ", mirrored images, too" * bool(mirrored)


def protocol_of(specs: Mapping[str, StageSpec]) -> str:
    """Name the pairs that a dataset's figures are from; those of the paper's protocol go by a seed."""
    settings = specs["evaluation"].config
    paper = settings["protocol"] == "paper"
    return f"{settings['protocol']}, seed {settings['seed']}" if paper else str(settings["protocol"])


def report_of(
    title: str,
    datasets: Sequence[Mapping[str, Any]],
    runs: Sequence[Mapping[str, StageSpec]],
    seconds: float,
) -> dict[str, Any]:
    """Return the report of datasets that were made in `seconds`; `runs` are the stages of each."""
    newest = max(record.finished for specs in runs for spec in specs.values() for record in records(spec))
    devices = {record.device for specs in runs for record in records(specs["samples"])}
    return {
        "title": title,
        "datasets": list(datasets),
        "made": datetime.fromtimestamp(newest, UTC).date().isoformat(),
        "seconds": round(seconds, 1),
        "licences": _merged_licences(runs),
        "judge": "; ".join(dict.fromkeys(map(judge_of, runs))),
        "device": ", ".join(sorted(devices)),
        "versions": installed_versions(),
    }


def _merged_licences(runs: Sequence[Mapping[str, StageSpec]]) -> list[dict[str, str]]:
    """What the weights of all runs say of their licences, each part once."""
    entries = (tuple(entry.items()) for specs in runs for entry in licences_of(specs))
    return [dict(entry) for entry in dict.fromkeys(entries)]


def write_page(specs: Mapping[str, StageSpec], report: Mapping[str, Any]) -> dict[str, bytes]:
    """Write `report.html` and its data, `page.json`, beside the evaluation; return the pictures by file name.

    The evaluation's own `report.json` is committed with it, and holds no more than the figures.
    """
    evaluation = specs["evaluation"]
    unit = evaluation.grid.units()[0]
    names = [name for name in read_record(evaluation, unit).sha256 if name.endswith(PICTURES)]
    pictures = {name: read_file(evaluation, unit, name) for name in names}
    evaluation.location.write_atomic("report.html", render_report(report, pictures).encode())
    evaluation.location.write_atomic(PAGE, json_bytes(report))
    return pictures


def json_bytes(report: Mapping[str, Any]) -> bytes:
    """The data of a page as a JSON file, which `docs/report.schema.json` describes."""
    return (json.dumps(report, indent=2, allow_nan=False) + "\n").encode()


def figure_rows(datasets: Sequence[Mapping[str, Any]], *groups: str) -> list[list[str]]:
    """Return the table of figures as text: a row a figure, its title first, then a cell for each dataset.

    `groups` are the headings whose figures are meant; none: all.
    """
    return [
        [figure.title, *(_cell(dataset.get(figure.key), figure.form) for dataset in datasets)]
        for figure in FIGURES
        if any(figure.key in dataset for dataset in datasets) and figure.group in (groups or GROUPS)
    ]


def _cell(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)

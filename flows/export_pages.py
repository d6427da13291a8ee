"""What an export says of itself: where it comes from, and its pages."""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.results import figure_rows, figures_of, licences_of
from negfacediff_core.export.about import About
from negfacediff_core.export.card import card
from negfacediff_core.export.croissant import croissant
from negfacediff_core.export.datasheet import datasheet
from negfacediff_core.export.licence import terms_of
from negfacediff_core.export.manifest import FileSum
from negfacediff_core.stages.exported import Job
from negfacediff_core.store.layout import StageSpec, code_version
from negfacediff_core.store.records import each_record
from negfacediff_core.store.runs import read_run, stages_of_run

PAGES = {"README.md": card, "DATASHEET.md": datasheet, "croissant.json": croissant}


def lineage_of(store: str, run: str, job: Job) -> dict[str, Any]:
    """Return all that an export's images were made from, in JSON types.

    The same run and settings give the same: no path of this machine stands in it, and no time but that of the
    newest image.
    """
    stages, record = stages_of_run(store, run), read_run(store, run) or {}
    newest = max(one.finished for one in each_record(stages["samples"]))
    return {
        "run": run,
        "made": datetime.fromtimestamp(newest, UTC).date().isoformat(),
        "negfacediff": code_version(),
        "versions": record.get("versions", {}),
        "export": job.settings.model_dump(mode="json", exclude={"filter"}),
        "filter": _filter(job.settings.filter),
        "identities": len(job.layout.identities),
        "images": job.layout.images,
        "gate": _gate(record),
        "licences": _licences(store, record, stages),
        "stages": {name: _stage(spec) for name, spec in stages.items()},
    }


def pages_of(store: str, job: Job, lineage: Mapping[str, Any], files: Sequence[FileSum]) -> dict[str, str]:
    """Return the pages of an export by their names; `files` are its others."""
    run = lineage["run"]
    figures = figures_of(run, stages_of_run(store, run))
    about = About(
        run=run,
        made=lineage["made"],
        version=lineage["negfacediff"],
        layout=job.layout,
        settings=lineage["export"],
        method=_method(figures),
        figures={row[0]: row[1] for row in figure_rows([figures])},
        licences=lineage["licences"],
        terms=terms_of(one["licence"] for one in lineage["licences"]),
        gate=lineage["gate"],
        files=files,
    )
    return {name: page(about) for name, page in PAGES.items()}


def _filter(path: str) -> str | None:
    """The SHA-256 of a filter that chose the images; where it lies says nothing."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None


def _licences(store: str, record: Mapping[str, Any], stages: Mapping[str, StageSpec]) -> list[dict[str, str]]:
    """The licences as they were when the run was built: the weights may lie elsewhere by now."""
    if "gate" in record:
        record = read_run(store, record["gate"]["run"]) or {}
    recorded = {one["part"]: one["licence"] for one in record.get("licences", [])}
    return [{**one, "licence": recorded.get(one["part"], one["licence"])} for one in licences_of(stages)]


def _gate(record: Mapping[str, Any]) -> str | None:
    """Say what a leakage gate took out of the run."""
    if "gate" not in record:
        return None
    rate = record["gate"]["settings"]["fmr"]
    return (
        "A leakage gate took out every image that is more like a person of a gallery of real faces than "
        f"different people are to each other at a false match rate of {rate:g}."
    )


def _stage(spec: StageSpec) -> dict[str, Any]:
    return {
        "fingerprint": spec.fingerprint,
        "version": spec.version,
        "config": spec.config,
        "inputs": spec.inputs,
        "weights": {role: weight.sha256 for role, weight in spec.weights.items()},
        "identities": spec.grid.identities,
        "replicates": spec.grid.replicates,
    }


def _method(figures: Mapping[str, Any]) -> dict[str, str]:
    """How the images were made, by what a report's page says of it."""
    settings = {
        "negative": figures["rule"],
        "weight of the negative": figures["w"],
        "sampler": f"{figures['sampler']}, {figures['steps']} steps",
        **figures["settings"],
    }
    return {name: str(value) for name, value in settings.items()}

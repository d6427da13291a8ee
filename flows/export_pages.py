"""What an export says of itself: where it comes from, and its pages."""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

from flows.acknowledgement import acknowledgement_in
from flows.results import figure_rows, figures_of, licences_of
from negfacediff_core.errors import StoreError
from negfacediff_core.export.about import About
from negfacediff_core.export.card import LICENCE_PAGE, card, licence_page
from negfacediff_core.export.croissant import croissant
from negfacediff_core.export.datasheet import datasheet
from negfacediff_core.export.licence import terms_of_weights
from negfacediff_core.export.manifest import FileSum
from negfacediff_core.stages.exported import Job
from negfacediff_core.store.layout import StageSpec, code_version, read_versioned
from negfacediff_core.store.records import each_record
from negfacediff_core.store.runs import read_run, stages_of_run

PAGES = {
    "README.md": card,
    LICENCE_PAGE: licence_page,
    "DATASHEET.md": datasheet,
    "croissant.json": croissant,
}


def lineage_of(store: str, run: str, job: Job) -> dict[str, Any]:
    """Return all that an export's images were made from, in JSON types.

    The same run and settings give the same: no path of this machine stands in it, and no time but that of the
    newest image, and when the terms of the weights were accepted. `negfacediff` is the version that exports;
    that which made it stands with each stage.
    """
    stages, record = stages_of_run(store, run), read_run(store, run) or {}
    # what a gate has kept has the terms of the run that it looked at
    built = (read_run(store, record["gate"]["run"]) or {}) if "gate" in record else record
    licences = _licences(built, stages)
    accepted = acknowledgement_in(built, licences)
    newest = max(one.finished for one in each_record(stages["samples"]))
    return {
        "run": run,
        "made": datetime.fromtimestamp(newest, UTC).date().isoformat(),
        "negfacediff": code_version(),
        "versions": built.get("versions", {}),
        "export": job.settings.model_dump(mode="json", exclude={"filter"}),
        "filter": _filter(job.settings.filter),
        "identities": len(job.layout.identities),
        "images": job.layout.images,
        "gate": _gate(record, stages),
        "licences": licences,
        "acknowledged": None if accepted is None else accepted.model_dump(),
        "stages": {name: _stage(spec) for name, spec in stages.items()},
    }


def pages_of(store: str, job: Job, lineage: Mapping[str, Any], files: Sequence[FileSum]) -> dict[str, str]:
    """Return the pages of an export by their names; `files` are its others."""
    run, gate, accepted = lineage["run"], lineage["gate"], lineage["acknowledged"]
    filter_ = lineage["filter"]
    figures = figures_of(run, stages_of_run(store, run))
    about = About(
        run=run,
        made=lineage["made"],
        version=lineage["negfacediff"],
        layout=job.layout,
        settings={**lineage["export"], "filter": filter_ and f"SHA-256 {filter_}"},
        method=_method(figures),
        figures={row[0]: row[1] for row in figure_rows([figures])},
        licences=lineage["licences"],
        terms=terms_of_weights(lineage["licences"]),
        acknowledged=accepted and accepted["at"][: len("2000-01-01")],
        gate=gate and gate["summary"],
        files=files,
    )
    return {name: page(about) for name, page in PAGES.items()}


def _filter(path: str) -> str | None:
    """The SHA-256 of a filter that chose the images; where it lies says nothing."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None


def _licences(built: Mapping[str, Any], stages: Mapping[str, StageSpec]) -> list[dict[str, str]]:
    """The licences as they were when the run was built: the weights may lie elsewhere by now."""
    recorded = {one["part"]: one["licence"] for one in built.get("licences", [])}
    return [{**one, "licence": recorded.get(one["part"], one["licence"])} for one in licences_of(stages)]


def _gate(record: Mapping[str, Any], stages: Mapping[str, StageSpec]) -> dict[str, Any] | None:
    """What a leakage gate took out of the run, and by which stages; None where none did."""
    if "gate" not in record:
        return None
    settings = record["gate"]["settings"]
    name, rate = PurePath(settings["gallery"]).name, settings["fmr"]
    return {
        "summary": "A leakage gate took out every image that is more like a person of a gallery of real "
        f"faces ({name}) than different people are to each other at a false match rate of {rate:g}.",
        "run": record["gate"]["run"],
        "gallery": name,
        "policy": settings["policy"],
        "fmr": rate,
        "versions": record.get("versions", {}),
        "stages": {spec.name: _made(spec) for spec in _stages_of_gate(stages["embeddings"])},
    }


def _stages_of_gate(embeddings: StageSpec) -> list[StageSpec]:
    """The stages by which images were marked: gallery, neighbours and counts; none if they have gone."""
    try:
        counts = embeddings.input("leakage")
        return [counts.input("gallery"), counts.input("neighbours"), counts]
    except (KeyError, StoreError):
        return []


def _stage(spec: StageSpec) -> dict[str, Any]:
    return {**_made(spec), "identities": spec.grid.identities, "replicates": spec.grid.replicates}


def _made(spec: StageSpec) -> dict[str, Any]:
    """What made a stage; `code` is the version of this package that did."""
    return {
        "fingerprint": spec.fingerprint,
        "version": spec.version,
        "code": read_versioned(spec.location, "stage.json").get("code"),
        "config": spec.config,
        "inputs": spec.inputs,
        "weights": {role: weight.sha256 for role, weight in spec.weights.items()},
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

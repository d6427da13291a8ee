"""The JSON Schema of report.json, made from the tables of `figures`."""

from typing import Any

from negfacediff_core.evaluation.figures import FIGURES, SETTINGS, Figure

_NUMBER = {"type": ["number", "null"]}
_TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": _TEXT}
_COUNT = {"type": "integer", "minimum": 0}
_LIMITS = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
_SETTING_TYPES = {
    "rule": _TEXT,
    "w": {"type": "number"},
    "sampler": _TEXT,
    "steps": _COUNT,
    "identities": _COUNT,
    "images": _COUNT,
}


def report_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a report as `figures` describes it.

    What a later version adds is no error: objects may have further members.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "report.json of negfacediff",
        "description": "Datasets with their settings and figures; the first is what the others differ from.",
        "type": "object",
        "properties": {
            "title": _TEXT,
            "datasets": {"type": "array", "items": {"$ref": "#/$defs/dataset"}, "minItems": 1},
            "made": {**_TEXT, "format": "date", "description": "Day of the newest data, in UTC."},
            "seconds": {"type": "number", "minimum": 0, "description": "Work on all datasets."},
            "device": _TEXT,
            "versions": {"type": "object", "additionalProperties": _TEXT},
            "judge": _TEXT,
            "licences": {"type": "array", "items": _object(part=_TEXT, licence=_TEXT, source=_TEXT)},
            "warnings": {**_TEXTS, "description": "Why the figures of the datasets are not comparable."},
            "notes": {**_TEXTS, "description": "Sentences on the figures."},
            "captions": {"type": "object", "additionalProperties": _TEXT},
        },
        "required": ["datasets", "seconds", "device", "versions"],
        "$defs": {"dataset": _dataset()},
    }


def _dataset() -> dict[str, Any]:
    names = "|".join(figure.key for figure in FIGURES)
    point = {"threshold": _NUMBER, "fmr": {"type": "number"}, "fnmr": {"type": "number"}}
    return {
        "type": "object",
        "properties": {
            "name": _TEXT,
            **{key: _SETTING_TYPES[key] for key in SETTINGS},
            **{figure.key: _figure(figure) for figure in FIGURES},
            "settings": {"type": "object"},
            "lineage": {"type": "object", "additionalProperties": {**_TEXT, "pattern": "^[0-9a-f]{16}$"}},
            "at_fmr": {"type": "array", "items": _object(fmr_at_most={"type": "number"}, **point)},
            "at_threshold": {"type": "array", "items": _object(**point)},
            "distributions": {"type": "object", "additionalProperties": {"type": "object"}},
            "attributes": {"type": "object", "additionalProperties": _COUNT},
        },
        "patternProperties": {f"^({names})_(interval|difference)$": _LIMITS},
        "required": [*SETTINGS, *(figure.key for figure in FIGURES if not figure.optional)],
    }


def _figure(figure: Figure) -> dict[str, Any]:
    """A figure that could not be computed is null."""
    return {**_NUMBER, "title": figure.title, "description": figure.definition}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}

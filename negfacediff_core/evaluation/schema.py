"""What the data of a page holds, and its JSON Schema, which is made from the tables of `figures`.

The file (`page.json` of a build, `report.json` of a comparison) holds, in JSON types only:

- `datasets`: a list; each has SETTINGS and the figures of FIGURES that are not optional. It may have `name`,
  `settings` {field: value}, `lineage` {stage: fingerprint}, and for any figure an interval,
  `<figure>_interval` [low, high], and that of its difference to the first dataset, `<figure>_difference`;
  `at_fmr` and `at_threshold`, lists of operating points; `distributions` {name: what `summaries.summarise`
  returns} and `attributes` {class: images}.
- `seconds`, `device`, `versions` {tool: version} for the whole. Optional are `title`, `judge`, `licences`
  [{`part`, `licence`, `source`}], the date `made` of the newest data (ISO 8601), `warnings` (why the datasets
  do not compare), `notes` on the figures, and `captions` {picture: a sentence more}.

A figure that could not be computed is null.
"""

from collections.abc import Mapping
from typing import Any

from negfacediff_core.errors import NegFaceDiffError
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
    """Return the JSON Schema (2020-12) of a report.

    What a later version adds is no error: objects may have further members.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "The data of a page of negfacediff",
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


def check_report(report: Mapping[str, Any]) -> None:
    """Raise NegFaceDiffError, naming the missing keys, unless `report` has what the module lists."""
    missing = [key for key in ("datasets", "seconds", "device", "versions") if key not in report]
    wanted = [*SETTINGS, *(figure.key for figure in FIGURES if not figure.optional)]
    for number, dataset in enumerate(report.get("datasets", ())):
        missing += [f"datasets[{number}].{key}" for key in wanted if key not in dataset]
    if missing or not report["datasets"]:
        raise NegFaceDiffError(
            f"the report lacks {', '.join(missing) or 'any dataset'}: evaluate the dataset again"
        )


def _dataset() -> dict[str, Any]:
    names = "|".join(figure.key for figure in FIGURES)
    point = dict.fromkeys(("threshold", "fmr", "fnmr"), _NUMBER)
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

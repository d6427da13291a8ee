"""croissant.json: the dataset to machines, in Croissant 1.1 with the fields of responsible AI (RAI 1.0)."""

import json
from typing import Any

from negfacediff_core.export.about import LIMITS, NO_REAL_PEOPLE, NOT_FOR, About, checked_for_leakage
from negfacediff_core.export.images import SUFFIXES
from negfacediff_core.export.layout import LABELS

CROISSANT, RAI = "http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"
_TERMS = (
    "arrayShape citeAs column containedIn equivalentProperty extract field fileProperty fileObject fileSet "
    "format includes isArray isLiveDataset jsonPath key md5 parentField path recordSet references regex "
    "repeated replace samplingRate separator source subField transform"
)
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
    **{term: f"cr:{term}" for term in _TERMS.split()},
}
# The files of a format that are of a set, by their pattern; all others are listed one by one. Those of
# WebDataset are inside of its shards, and RecordIO has none: Croissant cannot read it.
_SETS = {"imagefolder": "images/*/*", "webdataset": "*", "huggingface": "data/*.parquet"}
_TYPES = {
    "csv": "text/csv",
    "txt": "text/plain",
    "tsv": "text/tab-separated-values",
    "json": "application/json",
    "tar": "application/x-tar",
}
_KEYS = {"imagefolder": "path", "rec": "key", "webdataset": "key", "huggingface": "path"}


def croissant(about: About) -> str:
    """Return the JSON-LD, indented."""
    terms = about.terms
    content = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": [CROISSANT, RAI],
        "name": about.run,
        "description": f"{about.size}. {NO_REAL_PEOPLE}",
        "version": "1.0.0",
        "license": terms.url or f"{terms.name}: {' '.join(terms.conditions)}",
        "dateCreated": about.made,
        "datePublished": about.made,
        "keywords": ["synthetic", "faces", "face recognition", "diffusion"],
        "isLiveDataset": False,
        **_responsible(about),
        "distribution": _distribution(about),
        "recordSet": [_records(about), *_images(about)],
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _responsible(about: About) -> dict[str, Any]:
    """The RAI fields."""
    method = "; ".join(f"{name}: {value}" for name, value in about.method.items() if value)
    return {
        "rai:hasSyntheticData": True,
        "rai:dataCollection": f"Computed by a diffusion model; no photographs were taken. {method}",
        "rai:dataCollectionType": ["Synthetic"],
        "rai:dataAnnotationProtocol": [
            "The label is the identity that an image was made for; no people labelled."
        ],
        "rai:machineAnnotationTools": [
            f"{one['part']}: {one['source']}"
            for one in about.licences
            if not one["part"].startswith("samples")
        ],
        "rai:dataLimitations": [LIMITS],
        "rai:dataBiases": ["Those of the generator's training images; not adjusted."],
        "rai:dataUseCases": [about.uses, f"Not for: {NOT_FOR}", *about.terms.conditions],
        "rai:dataSocialImpact": "Recognisers can be trained without photographs of people who were not "
        "asked; they can be misused as any can.",
        "rai:personalSensitiveInformation": [
            f"None is intended. {NO_REAL_PEOPLE} {checked_for_leakage(about)}"
        ],
    }


def _distribution(about: About) -> list[dict[str, Any]]:
    """Single files with their SHA-256, and a set for what a format has many of."""
    form = about.settings["format"]
    pattern = _SETS.get(form)
    own = pattern.split("*")[0] if pattern else ""
    listed = [
        {
            "@type": "cr:FileObject",
            "@id": one.path,
            "name": one.path,
            "contentUrl": one.path,
            "contentSize": f"{one.size} B",
            "encodingFormat": _TYPES.get(one.path.rpartition(".")[2], "application/octet-stream"),
            "sha256": one.sha256,
        }
        for one in about.files
        if not (own and one.path.startswith(own))
    ]
    if pattern is None:
        return listed
    encoding = {suffix: name for name, suffix in SUFFIXES.items()}[about.layout.suffix]
    files: dict[str, Any] = {
        "@type": "cr:FileSet",
        "@id": "data",
        "name": "data",
        "description": "The images; manifest.json lists every file with its SHA-256.",
        "encodingFormat": "application/x-parquet" if form == "huggingface" else f"image/{encoding}",
        "includes": pattern,
    }
    if form == "webdataset":
        files["includes"] += f".{about.layout.suffix}"
        files["containedIn"] = [{"@id": one["@id"]} for one in listed if one["@id"].endswith(".tar")]
    return [*listed, files]


def _records(about: About) -> dict[str, Any]:
    """A record an image, from labels.csv."""
    key = _KEYS[about.settings["format"]]
    columns = {key: "sc:Text", **_columns(about)}
    return {
        "@type": "cr:RecordSet",
        "@id": "labels",
        "name": "labels",
        "description": "A record an image: where it is, who it shows, and what is known of it.",
        "key": {"@id": f"labels/{key}"},
        "field": [
            _field("labels", name, type_, {"fileObject": {"@id": LABELS}, "extract": {"column": name}})
            for name, type_ in columns.items()
        ],
    }


def _images(about: About) -> list[dict[str, Any]]:
    """A record an image with the image itself: with its labels, or with what leads to them."""
    form = about.settings["format"]
    if form not in _SETS:
        return []
    data = {"fileSet": {"@id": "data"}}
    if form == "huggingface":
        image = {"extract": {"column": "image"}, "transform": {"jsonPath": "bytes"}}
        others = [
            _field("images", name, type_, {**data, "extract": {"column": name}})
            for name, type_ in _columns(about).items()
        ]
    else:
        image, key = {"extract": {"fileProperty": "content"}}, _KEYS[form]
        place: dict[str, Any] = {**data, "extract": {"fileProperty": "fullpath"}}
        if form == "webdataset":
            place["transform"] = {"regex": r"(?:.*/)?([^/.]+)"}
        others = [
            {
                **_field("images", key, "sc:Text", place),
                "references": {"field": {"@id": f"labels/{key}"}},
            }
        ]
    return [
        {
            "@type": "cr:RecordSet",
            "@id": "images",
            "name": "images",
            "description": "The images.",
            "field": [_field("images", "image", "sc:ImageObject", {**data, **image}), *others],
        }
    ]


def _columns(about: About) -> dict[str, str]:
    """What is known of an image besides where it is, and the type of each."""
    numbers = dict.fromkeys(("label", "identity", "replicate"), "sc:Integer")
    return numbers | dict.fromkeys(about.layout.facts, "sc:Float")


def _field(records: str, name: str, type_: str, source: dict[str, Any]) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"{records}/{name}",
        "name": name,
        "description": _MEANINGS[name],
        "dataType": type_,
        "source": source,
    }


_MEANINGS = {
    "image": "The image.",
    "path": "Path or name of the image.",
    "key": "Key of the image.",
    "label": "Class, from 0.",
    "identity": "Number of the identity in the store that made it.",
    "replicate": "Which of the identity's images in that store it is.",
    "detection_score": "Score of the face detector.",
    "norm": "Norm of the embedding by the recogniser that judged the images.",
    "quality": "Quality, higher for a better picture.",
    "context_cosine": "Cosine of the image's embedding to the context that it was made for.",
}

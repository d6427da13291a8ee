"""README.md: the dataset's card, with the YAML that Hugging Face reads."""

import json
import re
from collections.abc import Mapping

from negfacediff_core.export.about import LIMITS, NO_REAL_PEOPLE, NOT_FOR, About, checked_for_leakage
from negfacediff_core.export.challenges import CHALLENGES

# How each format is read, by whoever has it.
READING = {
    "imagefolder": """```python
from torchvision.datasets import ImageFolder
train = ImageFolder("images")        # labels follow the order of the folders, as in labels.csv
```

`labels.csv` has a row an image, `list.txt` lines of path and label.""",
    "rec": """insightface and AdaFace take this folder as it is. `train.rec` is MXNet's
RecordIO, `train.idx` its index, `property` holds classes, height and width; `labels.csv` has a row
an image, by its key.""",
    "webdataset": """```python
import webdataset
train = webdataset.WebDataset("shard-{000000..LAST}.tar").decode("rgb").to_tuple("SUFFIX", "cls", "json")
```

`labels.csv` has a row an image, by its key.""",
    "huggingface": """```python
from datasets import load_dataset
train = load_dataset(".", split="train")         # this folder, also offline
```

`labels.csv` has the same columns without the images.""",
}
# Which files Hugging Face loads.
_DATA_FILES = {
    "imagefolder": "images/**",
    "webdataset": "shard-*.tar",
    "huggingface": "data/train-*.parquet",
}
# Hugging Face's words for numbers of three digits at most, of four, of five ...
_SIZES = (
    "n<1K",
    *("1K<n<10K", "10K<n<100K", "100K<n<1M"),
    *("1M<n<10M", "10M<n<100M", "100M<n<1B"),
    *("1B<n<10B", "10B<n<100B", "100B<n<1T"),
    "n>1T",
)
LICENCE_PAGE = "LICENSE.md"


def card(about: About) -> str:
    """Return the card in Markdown, behind its YAML."""
    form = about.settings["format"]
    shards = max((one.path for one in about.files if one.path.startswith("shard-")), default="")
    reading = READING[form].replace("LAST", shards.removeprefix("shard-").removesuffix(".tar"))
    sections = (
        f"# {about.title}",
        f"{about.size}; {about.images_each} images each.{_challenge(about)}",
        NO_REAL_PEOPLE,
        "Every image says so itself: IPTC's DigitalSourceType `trainedAlgorithmicMedia` stands in its XMP.",
        f"## Reading it\n\n{reading.replace('SUFFIX', about.layout.suffix)}",
        f"## Licence\n\n{_licence(about)}",
        f"## Uses\n\n**For:** {about.uses}\n\n**Not for:** {NOT_FOR}",
        f"## Limits\n\n{LIMITS}\n\n**Real people among the faces:** {checked_for_leakage(about)}",
        f"## How it was made\n\n{table(('', ''), about.method)}",
        "## Figures\n\nBy the evaluation of the whole run, of which this may be a selection.\n\n"
        + table(("figure", "value"), about.figures),
        "## Files\n\n`manifest.json` lists every file with its SHA-256, and what all was made from; "
        "`negfacediff verify-export .` in this folder tells whether all of it is there. `DATASHEET.md` "
        "answers the usual questions; `croissant.json` says the same to machines.",
    )
    return f"---\n{_front_matter(about)}---\n\n" + "\n\n".join(sections) + "\n"


def licence_page(about: About) -> str:
    """Return LICENSE.md: the terms of the dataset, for those who look for a file of that name."""
    return f"# Licence of {about.title}\n\n{_licence(about)}\n"


def table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    """Return a Markdown table of two columns."""
    cells = (f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *cells])


def licence_table(about: About) -> str:
    """Return the licences of the weights as a Markdown table."""
    rows = (
        "| " + " | ".join(_cell(one[name]) for name in ("part", "source", "licence")) + " |"
        for one in about.licences
    )
    return "\n".join(["| part | weights | licence |", "|---|---|---|", *rows])


def _challenge(about: About) -> str:
    limits = CHALLENGES.get(about.settings["challenge"])
    return "" if limits is None else f" Within the limits of {limits.title}."


def _licence(about: About) -> str:
    name = f"[{about.terms.name}]({about.terms.url})" if about.terms.url else about.terms.name
    said = f"**{name}**: it follows from the licences of the weights that made the images. No legal advice."
    conditions = "\n".join(f"- {condition}" for condition in about.terms.conditions)
    parts = (said, conditions, about.accepted, licence_table(about))
    return "\n\n".join(part for part in parts if part)


def _front_matter(about: About) -> str:
    """The YAML; strings are written as JSON, which is YAML, so that none can end it."""
    terms, form = about.terms, about.settings["format"]
    size = _SIZES[max(0, len(str(about.layout.images)) - 3)]
    lines = [f"license: {terms.identifier}"]
    if terms.identifier == "other":
        name = re.sub("[^a-z0-9.]+", "-", terms.name.lower())
        lines += [f"license_name: {json.dumps(name)}", f"license_link: {terms.url or LICENCE_PAGE}"]
    lines += [
        f"pretty_name: {json.dumps(about.title)}",
        "task_categories:\n- image-classification",
        "tags:\n- synthetic\n- faces\n- face-recognition\n- diffusion\n- negfacediff",
        f"size_categories:\n- {size}",
    ]
    if form in _DATA_FILES:
        lines.append(
            "configs:\n- config_name: default\n  data_files:\n  - split: train\n"
            f"    path: {json.dumps(_DATA_FILES[form])}"
        )
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")

"""The flow `study_recognition`: datasets of equal size, the same recogniser on each, and what it is worth."""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from pydantic import Field, ValidationError

from flows.artifacts import key_of
from flows.build import DEFAULT_EXECUTION, build_dataset
from flows.presets import explain, read_values
from flows.progress import CallbackBar
from flows.recipes import load_recipe
from flows.sweep import Case, Sweep, cases
from flows.train_recogniser import DEFAULT_EXECUTION as DEFAULT_TRAINING
from flows.train_recogniser import train_in
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import ConfigError
from negfacediff_core.faces.embed import load_embedder
from negfacediff_core.recognition.datasets import TrainingSet
from negfacediff_core.recognition.embedding import Embedding
from negfacediff_core.recognition.pair_sets import PairSet
from negfacediff_core.recognition.recipe import TrainingExecution
from negfacediff_core.recognition.rendered_pairs import rendered_pairs
from negfacediff_core.recognition.training_job import owned
from negfacediff_core.recognition.verify import verify
from negfacediff_core.stages.training_set import training_set_of
from negfacediff_core.store.location import locate
from negfacediff_core.store.runs import stages_of_run

#: Rendered people of the study begin here: none is in the sets that the demo pack was made from.
FIRST_PERSON, PICTURES = 3_000_000, 8
# What the table shows: the key of a row, its title, and its form.
SHOWN = (
    ("accuracy", "accuracy", ".2%"),
    ("eer", "EER", ".2%"),
    ("tar_1e-3", "TAR at FAR 1e-3", ".1%"),
    ("held_out_eer", "EER of held-out generated people", ".1%"),
)


class Study(Sweep):
    """Builds with several seeds, as a sweep has them, each of which trains a recogniser."""

    axis: str = "w"
    images: int = Field(ge=2, le=10_000, description="Crops of each identity that are trained on.")
    recipe: str = Field(default="small", description="A recipe, or a YAML file.")
    recipe_set: dict[str, Any] = Field(default_factory=dict, description="Fields of the recipe.")
    people: int = Field(default=300, ge=20, le=100_000, description="Rendered people to verify with.")


def load_study(source: str) -> Study:
    """Read a study that ships by name, or a YAML file; raises ConfigError."""
    values = read_values(source, _study_text)
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, Study)}") from error


def check_study(study: Study) -> None:
    """Raise ConfigError if the recipe is none, or nothing can be rendered here."""
    _recipe_of(study, 0)
    if find_spec("numba") is None:
        raise ConfigError("Rendering people takes the extra render: pip install 'negfacediff[render]'.")


@flow(name="study-recognition", flow_run_name="{study.name}")
def study_recognition(
    study: Study,
    store: str = "store",
    out: str = "study",
    execution: ExecutionConfig = DEFAULT_EXECUTION,
    training: TrainingExecution = DEFAULT_TRAINING,
) -> list[dict[str, Any]]:
    """Build every case in `store`, train on crops of the same number of each, and verify on rendered people.

    Running it again goes on where it stopped. Writes rows.json and table.md to `out` as they come, and one
    folder a training. Returns the rows: `variation`, `group`, `seed`, `images`, and the figures.
    """
    check_study(study)
    folder = locate(out)
    folder.check_writable()
    pairs = _people(study, Path(out))
    rows: list[dict[str, Any]] = []
    for seed in study.seeds:
        chosen = [case for case in cases(study) if case.seed == seed]
        for case in chosen:
            build_dataset(case.build, execution, store)
        sets = equal_sets([_crops_of(case, store, Path(out)) for case in chosen], study.images)
        for case, crops in zip(chosen, sets, strict=True):
            rows.append(_row(study, case, crops, pairs, Path(out), training))
            folder.write_atomic("rows.json", (json.dumps(rows, indent=1) + "\n").encode())
            folder.write_atomic("table.md", table_of(study, rows).encode())
    create_markdown_artifact(table_of(study, rows), key_of("study", study.name), study.title)
    return rows


def equal_sets(sets: Sequence[TrainingSet], images: int) -> list[TrainingSet]:
    """Leave of each set the first `images` of the identities that have as many in all of them.

    Raises ConfigError where there is no such identity.
    """
    enough = []
    for crops in sets:
        assert crops.numbers is not None  # they come from a store
        identities, counts = np.unique(crops.numbers[:, 0], return_counts=True)
        enough.append(identities[counts >= images])
    common = reduce(np.intersect1d, enough)
    if not len(common):
        raise ConfigError(f"No identity has {images} usable crops in all sets: ask for fewer, or build more.")
    equal = []
    for crops in sets:
        assert crops.numbers is not None
        places = [np.flatnonzero(crops.numbers[:, 0] == identity)[:images] for identity in common]
        equal.append(crops.chosen(np.concatenate(places)))
    return equal


def table_of(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table: a line a setting, with the mean over seeds and their standard deviation."""
    lines = [
        f"## {study.title}\n",
        "| setting | images | " + " | ".join(title for _, title, _ in SHOWN) + " | seeds |",
        "|---" * (len(SHOWN) + 3) + "|",
    ]
    for variation in study.builds:
        own = [row for row in rows if row["variation"] == variation.name]
        if own:
            cells = [_spread([row[key] for row in own], form) for key, _, form in SHOWN]
            counts = sorted({row["images"] for row in own})
            sizes = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
            lines.append(f"| {variation.group} | {sizes} | {' | '.join(cells)} | {len(own)} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float], form: str) -> str:
    if len(values) < 2:
        return format(values[0], form)
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}"


def _row(
    study: Study, case: Case, crops: TrainingSet, pairs: PairSet, out: Path, training: TrainingExecution
) -> dict[str, Any]:
    """Train on a set, and verify."""
    begun = time.monotonic()
    place = (out / case.build.name).absolute()
    with owned(place):
        result = train_in(place, crops, _recipe_of(study, case.seed), training)
    figures = verify(pairs, Embedding(load_embedder(result["pack"]))).figures
    return {
        "variation": case.variation.name,
        "group": case.variation.group,
        "seed": case.seed,
        "images": len(crops),
        "identities": crops.classes,
        "accuracy": figures["accuracy"],
        "eer": figures["eer"],
        **{f"tar_{far}": tar for far, tar in figures["tar"].items()},
        "held_out_eer": result["eer"],
        "epoch": result["epoch"],
        "seconds": time.monotonic() - begun,
    }


def _recipe_of(study: Study, seed: int) -> Any:
    fields = {**study.recipe_set, "seed": seed}
    return load_recipe(study.recipe, [f"{name}={json.dumps(value)}" for name, value in fields.items()])


def _crops_of(case: Case, store: str, out: Path) -> TrainingSet:
    name = case.build.name
    with owned((out / name).absolute()), CallbackBar("read", "units") as bar:
        return training_set_of(stages_of_run(store, name), name, out / name, bar)


def _people(study: Study, out: Path) -> PairSet:
    """Render people, once, and draw pairs of them."""
    from negfacediff_core.renders.dataset import load_render_set, render_set

    people = range(FIRST_PERSON, FIRST_PERSON + study.people)
    with CallbackBar("render", "people") as bar:
        render_set(out / "people", 0, people, PICTURES, progress=bar)
    found = load_render_set(out / "people")
    return replace(rendered_pairs(found, seed=0), name="rendered people")


def _study_text(name: str) -> str:
    folder = files("deployments") / "studies"
    texts = {
        item.name.removesuffix(".yaml"): item for item in folder.iterdir() if item.name.endswith(".yaml")
    }
    if name not in texts:
        raise ConfigError(
            f"There is no study {name!r}: studies are {', '.join(sorted(texts))}; a file of your own ends in "
            ".yaml."
        )
    return texts[name].read_text(encoding="utf-8")

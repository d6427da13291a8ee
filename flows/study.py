"""The flow `study_recognition`: datasets of equal size, the same recogniser on each, and what it is worth."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import reduce
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
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
from flows.train_recogniser import licences_behind, train_in
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import ConfigError
from negfacediff_core.faces.embed import load_embedder
from negfacediff_core.recognition.datasets import TrainingSet
from negfacediff_core.recognition.embedding import Embedding
from negfacediff_core.recognition.people import (
    People,
    found_people,
    orl_folder,
    orl_photographs,
    rendered_people,
    verify_people,
)
from negfacediff_core.recognition.recipe import TrainingExecution
from negfacediff_core.recognition.training_job import owned
from negfacediff_core.stages.models import detector_of, network_weight
from negfacediff_core.stages.training_set import training_set_of
from negfacediff_core.store.location import locate, without_credentials
from negfacediff_core.store.runs import stages_of_run
from tasks.machine import usable_cores

#: Rendered people of the study begin here: none is in the sets that the demo pack was made from.
FIRST_PERSON, PICTURES = 3_000_000, 8
# What the table shows: the key of a row, its title, and its form.
SHOWN = (
    ("accuracy", "accuracy", ".2%"),
    ("eer", "EER", ".2%"),
    ("tar_1e-3", "TAR at FAR 1e-3", ".1%"),
    ("tar_1e-4", "TAR at FAR 1e-4", ".1%"),
    ("orl_accuracy", "ORL accuracy", ".1%"),
    ("orl_eer", "ORL EER", ".1%"),
    ("orl_tar_1e-2", "ORL TAR at FAR 1e-2", ".1%"),
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
    """Raise ConfigError if recipe or extents make no sense, or nothing can be rendered here."""
    _recipe_of(study, 0)
    for case in cases(study):
        if study.images > case.build.images:
            raise ConfigError(
                f"images is {study.images}: of each identity the build {case.build.name} makes "
                f"{case.build.images} images."
            )
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

    Where the ORL photographs are installed (extra `orl`), on these as well. Running it again goes on where it
    stopped. Writes rows.json and table.md to `out` as they come, and one folder a training. Returns the rows:
    `variation`, `group`, `seed`, `images`, and the figures; `seconds` since the last start that built,
    trained and verified this.
    """
    check_study(study)
    folder = locate(out)
    folder.check_writable()
    people = _people(study, Path(out))
    rows: list[dict[str, Any]] = []
    for seed in study.seeds:
        chosen = [case for case in cases(study) if case.seed == seed]
        built = [_seconds_of(build_dataset, case.build, execution, store) for case in chosen]
        sets = equal_sets([_crops_of(case, store, Path(out)) for case in chosen], study.images)
        for case, crops, seconds in zip(chosen, sets, built, strict=True):
            begun = time.monotonic()
            row = _row(study, case, store, crops, people, Path(out), training)
            rows.append({**row, "seconds": seconds + time.monotonic() - begun})
            folder.write_atomic("rows.json", (json.dumps(rows, indent=1) + "\n").encode())
            folder.write_atomic("table.md", table_of(study, rows).encode())
    create_markdown_artifact(table_of(study, rows), key_of("study", study.name), study.title)
    return rows


def _seconds_of(work: Callable[..., Any], *arguments: Any) -> float:
    begun = time.monotonic()
    work(*arguments)
    return time.monotonic() - begun


def equal_sets(sets: Sequence[TrainingSet], images: int) -> list[TrainingSet]:
    """Leave of each set the first `images` of the identities that have as many in all of them.

    Raises ConfigError where there is no such identity.
    """
    groups = [_images_of_identities(crops) for crops in sets]
    enough = [identities[counts >= images] for identities, _, counts, _ in groups]
    common = reduce(np.intersect1d, enough)
    if not len(common):
        raise ConfigError(f"No identity has {images} usable crops in all sets: ask for fewer, or build more.")
    equal = []
    for crops, (identities, starts, _, order) in zip(sets, groups, strict=True):
        first = starts[np.searchsorted(identities, common)]
        equal.append(crops.chosen(order[(first[:, None] + np.arange(images)).ravel()]))
    return equal


def _images_of_identities(crops: TrainingSet) -> tuple[NDArray[np.int64], ...]:
    """The identities of a set, where the images of each begin in an order, how many they are, the order."""
    assert crops.numbers is not None  # they come from a store
    order = np.argsort(crops.numbers[:, 0], kind="stable")
    return *np.unique(crops.numbers[order, 0], return_index=True, return_counts=True), order


def table_of(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table: a line a setting, with the mean over seeds and their standard deviation.

    Below stands by how much a setting differs from the first one, seed by seed.
    """
    shown = [column for column in SHOWN if all(column[0] in row for row in rows)]
    lines = [
        f"## {study.title}\n",
        "| setting | images | " + " | ".join(title for _, title, _ in shown) + " | seeds |",
        "|---" * (len(shown) + 3) + "|",
    ]
    of_setting = {
        variation.group: {row["seed"]: row for row in rows if row["variation"] == variation.name}
        for variation in study.builds
    }
    first, *others = of_setting
    for group, own in of_setting.items():
        if own:
            cells = [_spread([row[key] for row in own.values()], form) for key, _, form in shown]
            counts = sorted({row["images"] for row in own.values()})
            sizes = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
            lines.append(f"| {group} | {sizes} | {' | '.join(cells)} | {len(own)} |")
    for group in others:
        both = sorted(of_setting[first].keys() & of_setting[group].keys())
        if both:
            apart = (
                [of_setting[group][seed][key] - of_setting[first][seed][key] for seed in both]
                for key, _, _ in shown
            )
            cells = [_spread(values, f"+{form}") for values, (_, _, form) in zip(apart, shown, strict=True)]
            lines.append(f"| {group}, less the first | | {' | '.join(cells)} | {len(both)} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float], form: str) -> str:
    if len(values) < 2:
        return format(values[0], form)
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form.removeprefix('+')}}"


def _row(
    study: Study,
    case: Case,
    store: str,
    crops: TrainingSet,
    people: dict[str, People],
    out: Path,
    training: TrainingExecution,
) -> dict[str, Any]:
    """Train on a set, and verify on `people`, by the beginning of their figures' names."""
    place = (out / case.build.name).absolute()
    with owned(place):
        source = f"run {case.build.name} of {without_credentials(store)}"
        licences = licences_behind(store, case.build.name)
        result = train_in(place, crops, _recipe_of(study, case.seed), training, source, licences)
    how = Embedding(load_embedder(result["pack"]), threads=usable_cores())
    figures = {start: verify_people(each, how) for start, each in people.items()}
    return {
        "variation": case.variation.name,
        "group": case.variation.group,
        "seed": case.seed,
        "images": len(crops),
        "identities": crops.classes,
        **{f"{start}{name}": value for start, own in figures.items() for name, value in own.items()},
        "held_out_eer": result["eer"],
        "epoch": result["epoch"],
    }


def _recipe_of(study: Study, seed: int) -> Any:
    fields = {**study.recipe_set, "seed": seed}
    return load_recipe(study.recipe, [f"{name}={json.dumps(value)}" for name, value in fields.items()])


def _crops_of(case: Case, store: str, out: Path) -> TrainingSet:
    name = case.build.name
    with owned((out / name).absolute()), CallbackBar("read", "units") as bar:
        return training_set_of(stages_of_run(store, name), name, out / name, bar)


def _people(study: Study, out: Path) -> dict[str, People]:
    """Render people, once, and find the faces of ORL where it is: by the beginning of figures' names."""
    from negfacediff_core.renders.dataset import load_render_set, render_set

    people = range(FIRST_PERSON, FIRST_PERSON + study.people)
    with CallbackBar("render", "people") as bar:
        render_set(out / "people", 0, people, PICTURES, progress=bar)
    found = {"": rendered_people(load_render_set(out / "people"))}
    orl = orl_folder()
    if orl:
        aligned = next(iter(cases(study))).build.aligned
        weight = network_weight(aligned.detector, "detection")
        detector = detector_of(weight, aligned.detector_size, aligned.threshold, threads=1)
        found["orl_"] = found_people("ORL", orl_photographs(orl), detector)
    return found


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

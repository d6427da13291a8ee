"""The flow `train_recogniser`: a recogniser is trained on a run of a store, an export, or other crops."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from rich.console import Console

from flows.artifacts import key_of, progress_artifacts
from flows.form import STORE, MaybeName
from flows.progress import CallbackBar, Meter, show_progress
from flows.results import json_bytes, licences_of
from negfacediff_core.errors import ConfigError, StoreError
from negfacediff_core.export.licence import terms_of_weights
from negfacediff_core.export.manifest import MANIFEST, read_head
from negfacediff_core.file_hashes import file_sha256
from negfacediff_core.recognition.curves import PICTURE, TABLE
from negfacediff_core.recognition.datasets import Progress, TrainingSet, filtered
from negfacediff_core.recognition.dynamics import has_final
from negfacediff_core.recognition.export import export_forms, load_trained
from negfacediff_core.recognition.fit import fit
from negfacediff_core.recognition.recipe import RecogniserConfig, TrainingExecution
from negfacediff_core.recognition.set_openers import open_set
from negfacediff_core.recognition.training_job import (
    BEST,
    STATE,
    TrainingJob,
    check_crops,
    check_folder,
    owned,
    plan_training,
)
from negfacediff_core.stages.training_set import training_set_of
from negfacediff_core.stopping import ended_when
from negfacediff_core.store.location import without_credentials
from negfacediff_core.store.runs import read_run, stages_of_run
from negfacediff_core.tensor_files import replacing
from tasks.machine import installed_versions
from tasks.signals import kept_signals

DEFAULT_RECIPE, DEFAULT_EXECUTION = RecogniserConfig(), TrainingExecution()
#: What a finished training says of itself.
REPORT = "report.json"
Licences = Sequence[Mapping[str, str]]


@flow(name="train-recogniser", flow_run_name="train {out}")
def train_recogniser(
    out: str,
    run: MaybeName = "",
    folder: str = "",
    recipe: RecogniserConfig = DEFAULT_RECIPE,
    filter: str = "",
    execution: TrainingExecution = DEFAULT_EXECUTION,
    cache: str = "",
    store: str = STORE,
) -> dict[str, Any]:
    """Train a recogniser on aligned crops: those of a run of the store, or of a folder.

    Running it again with the same parameters goes on where it stopped, after any interruption, and does
    nothing where it is complete. The artifact `train-recogniser` shows how far it is, and then its figures.

    Returns the figures of the best epoch by held-out identities, and the places of what was written: `out`,
    the `pack` for insightface and `sdfr`. Raises ConfigError, StoreError or WeightsError for what cannot
    be, before work begins; NegFaceDiffError if the training diverges.

    Args:
        out: Folder of the training, on the machine that runs this.
        run: Train on the aligned crops of this run of the store. Empty: on the folder.
        folder: An export of any format, a folder with train.rec, or one with a sub-folder of aligned
            112x112 crops an identity. Empty: a run of the store.
        recipe: Network, loss, optimiser and augmentation; with the images it decides the result.
        filter: File of the images to take, as negfacediff prune writes it. Empty: all.
        execution: Where it runs.
        cache: Folder for crops that must be packed, which trainings can share (38 kB a crop). Empty: out.
        store: The store.
    """
    if bool(run) == bool(folder):
        raise ConfigError("Give either run, whose crops the store has, or folder.")
    if "://" in out:
        raise ConfigError(f"out {out!r} is no local folder: a training keeps its state in one.")
    place = Path(out).absolute()
    with owned(place):
        crops = _crops(store, run, folder, Path(cache or out).absolute())
        crops = filtered(crops, Path(filter)) if filter else crops
        source = f"run {run} of {without_credentials(store)}" if run else folder
        licences = licences_behind(store, run) if run else _licences_of_export(Path(folder))
        result = train_in(place, crops, recipe, execution, source, licences)
    key = key_of("train-recogniser", "figures")
    create_markdown_artifact(_page(result, recipe), key, f"Recogniser {out}")
    return result


def train_in(
    place: Path,
    crops: TrainingSet,
    recipe: RecogniserConfig,
    execution: TrainingExecution,
    source: str = "",
    licences: Licences = (),
) -> dict[str, Any]:
    """Train in a folder that the caller `owned`, export the best epoch, and write and return the report.

    `source` says where the crops come from, and `licences` what those of the weights that made them are; both
    go into the report. Raises as `train_recogniser`.
    """
    job = plan_training(crops, recipe, execution, place)
    check_folder(job)
    # what a finished training made of its images may be lost, and its state can tell it anew
    seen = has_final(place) or not (place / STATE).exists()
    if (report := _finished(place)) is None or not seen:
        with CallbackBar("check", "crops") as bar:
            check_crops(job, crops, bar)
        with _shown(job) as progress, kept_signals() as asked_to_end, ended_when(asked_to_end):
            scores = fit(job, progress)
        files = export_forms(load_trained(place / BEST), place)
        report = {
            "source": source,
            "origin": crops.origin._asdict(),
            "licences": list(licences),
            "images": len(job.training),
            "identities": job.training.classes,
            "held_out_identities": job.held_out.classes,
            **scores,
            "files": {str(file.relative_to(place)): file_sha256(file) for file in (*files, place / BEST)},
            "versions": installed_versions(),
        }
        with replacing(place / REPORT) as file:
            file.write(json_bytes(report))
    sdfr = place / "sdfr" / "recogniser.onnx"
    return {**report, "out": str(place), "pack": str(place / "pack"), "sdfr": str(sdfr)}


def _finished(place: Path) -> dict[str, Any] | None:
    """Read the report of a training, which is written last; None if there is none yet."""
    try:
        found: dict[str, Any] = json.loads((place / REPORT).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StoreError(
            f"{place / REPORT} is damaged: delete it, and the same command writes it anew from the state."
        ) from error
    return found


def licences_behind(store: str, run: str) -> Licences:
    """Return the licences of the weights that made a run, as they were then, by part and source."""
    recorded: Licences = (read_run(store, run) or {}).get("licences", [])
    return recorded or licences_of(stages_of_run(store, run))


def _licences_of_export(folder: Path) -> Licences:
    """The same of the run that an export was made from; none of other folders."""
    if not (folder / MANIFEST).exists():
        return []
    exported: Licences = read_head(folder).get("licences", [])
    return exported


def _crops(store: str, run: str, folder: str, work: Path) -> TrainingSet:
    """Open the training set; what must be packed is packed into the folder `work`."""
    with CallbackBar("read", "units") as bar:
        if run:
            return training_set_of(stages_of_run(store, run), run, work, bar)
        return open_set(Path(folder), work, bar)


@contextmanager
def _shown(job: TrainingJob) -> Iterator[Progress]:
    """Show images seen, on the console and as an artifact; the first call tells what earlier runs have."""
    meter, crops = Meter("train", "images", job.images), job.training
    title = f"Training {job.recipe.backbone}, {len(crops):,} images of {crops.classes:,} identities"
    with (
        progress_artifacts("train-recogniser", [meter]),
        show_progress(title, [meter], Console()) as shown,
    ):

        def progress(done: int, total: int) -> None:
            if meter.started is None:
                meter.before = done
                shown.started(meter.stage)
            else:
                shown.committed(meter.stage, done - meter.position)

        yield progress


def _page(result: dict[str, Any], recipe: RecogniserConfig) -> str:
    """What a finished training shows in Prefect."""
    rows = [
        ("trained on", f"{result['images']:,} images of {result['identities']:,} identities"),
        ("held out", f"{result['held_out_identities']:,} identities"),
        ("best epoch", f"{result['epoch']:g} of {result['epochs']}"),
        ("EER", f"{result['eer']:.2%}"),
        ("FNMR at an FMR of 1%", f"{result['fmr100']:.2%}"),
        ("FDR", f"{result['fdr']:.2f}"),
        ("model pack", f"`{result['pack']}`"),
        ("for SDFR", f"`{result['sdfr']}`"),
        ("curves", f"`{result['out']}/{TABLE}`, `{PICTURE}`"),
    ]
    if result["licences"]:
        rows.append(("licence of the images", terms_of_weights(result["licences"]).name))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"## {recipe.backbone}, {recipe.head}\n\n{result['source']}\n\n| | |\n|---|---|\n{table}\n\n"
        "Figures are of held-out identities of the training set, which chose the epoch. To test it: "
        "`negfacediff verify-recogniser`."
    )

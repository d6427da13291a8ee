"""The flow `leakage_gate`: gallery, neighbours, counts, and what the policy asks for."""

import io
from collections.abc import Mapping
from typing import Any

import pyarrow.parquet as pq
from prefect import flow

from flows.build import CHUNK_RUNNER, DEFAULT_EXECUTION, meter_of, run_groups
from flows.leakage import GateRecord, gate_names
from flows.progress import CallbackBar
from flows.results import figures_of, report_of, seconds_of, write_page
from flows.resume import build_of
from flows.turns import turn
from negfacediff_core.config import ExecutionConfig, LeakageConfig, Policy
from negfacediff_core.contexts.images import read_image
from negfacediff_core.evaluation.pair_sheet import Pair, pair_sheet
from negfacediff_core.stages import kept
from negfacediff_core.stages.gallery import image_path
from negfacediff_core.stages.gate import Gate, plan_gate, plan_kept
from negfacediff_core.stages.leakage import REPORT, leaking, read_report, thresholds_at
from negfacediff_core.store.layout import StageSpec, Unit
from negfacediff_core.store.location import locate
from negfacediff_core.store.records import pending
from negfacediff_core.store.runs import write_run
from negfacediff_core.store.shards import prepare, read_arrays
from tasks.machine import installed_versions

# Pairs that a sheet shows.
SHOWN = 20


@flow(
    name="leakage-gate",
    flow_run_name="{run}",
    task_runner=CHUNK_RUNNER,
)
def leakage_gate(
    store: str, run: str, settings: LeakageConfig, execution: ExecutionConfig = DEFAULT_EXECUTION
) -> dict[str, Any]:
    """Compare the images of `run` with a gallery, and do what the policy says.

    The gate's stages are bound to the name `<run>.leakage.<gallery>`, see `gate_names`. Policy flag writes
    `runs/<run>.leakage.<gallery>.parquet`, a row an image that leaks at `settings.fmr`; drop makes the run
    `<run>.kept.<gallery>` besides, whose embeddings and evaluation leave those images out. Nothing that is
    committed changes.

    Returns the `report`, the `places` of what was written, and the `figures` of the run and of what was kept
    (policy drop). Raises as `plan_gate` and `build_dataset`.
    """
    gate = plan_gate(store, run, settings)
    with turn(store):
        return _compared(gate, store, run, settings, execution)


def _compared(
    gate: Gate, store: str, run: str, settings: LeakageConfig, execution: ExecutionConfig
) -> dict[str, Any]:
    """Make the gate's stages, and what its policy asks for."""
    for spec in gate.stages.values():
        prepare(spec)
    asked = GateRecord(run=run, settings=settings)
    name = gate_names(run, gate.label).counts
    _record(store, name, asked, gate.stages, None)
    _finish(name, store, gate.stages, execution, f"Comparing {run} with {settings.gallery}")
    _record(store, name, asked, gate.stages, seconds_of(gate.stages.values()))
    counted = gate.stages["leakage"]
    report = read_report(counted)
    places = {"report": f"{counted.directory}/{REPORT}"}
    if settings.pictures:
        places["pictures"] = _draw(gate, report)
    figures: list[dict[str, Any]] = []
    if settings.policy in (Policy.flag, Policy.drop):
        thresholds_at(report, settings.fmr)
        places["flagged"] = _flag(store, name, counted, settings.fmr)
    if settings.policy == Policy.drop:
        figures = _drop(store, asked, gate, execution)
        places["kept"] = f"the run {figures[-1]['name']}"
    return {"report": report, "places": places, "figures": figures}


def _finish(
    run: str, store: str, specs: Mapping[str, StageSpec], execution: ExecutionConfig, title: str
) -> None:
    """Bring the stages of a run to their end one after the other, with progress."""
    meters = [meter_of(spec) for spec in specs.values()]
    for meter in meters:
        if meter.stage == "gallery":
            meter.noun = "images"  # whose numbers stand where others have identities
    run_groups(run, store, [[spec] for spec in specs.values()], meters, execution, title)


def _record(
    store: str, name: str, asked: GateRecord, specs: Mapping[str, StageSpec], seconds: float | None
) -> None:
    """Bind a name to stages, so that they are kept, verified and shown, and say what to go on with."""
    stages = {
        spec.name: {
            "fingerprint": spec.fingerprint,
            "identities": spec.grid.identities,
            "replicates": spec.grid.replicates,
        }
        for spec in specs.values()
    }
    content = {"gate": asked.model_dump(mode="json"), "stages": stages, "versions": installed_versions()}
    write_run(store, name, {**content, "seconds": seconds})


def _flag(store: str, name: str, counted: StageSpec, rate: float) -> str:
    """Write the images that leak at a rate beside the gate's run record `name`."""
    buffer = io.BytesIO()
    pq.write_table(leaking(counted, rate), buffer)
    folder = locate(store).at("runs")
    folder.write_atomic(f"{name}.parquet", buffer.getvalue())
    return f"{folder.url}/{name}.parquet"


def _drop(store: str, asked: GateRecord, gate: Gate, execution: ExecutionConfig) -> list[dict[str, Any]]:
    """Make the run without what leaks; returns its figures, behind those of the run."""
    run = asked.run
    remade = plan_kept(gate, build_of(store, run), asked.settings.fmr)
    marked = remade["embeddings"]
    for spec in remade.values():
        prepare(spec)
    specs = {**gate.run, **remade}
    name = gate_names(run, gate.label).kept
    _record(store, name, asked, specs, None)
    left = pending(marked)
    with CallbackBar("embeddings", "units") as bar:
        for done, unit in enumerate(left):
            kept.mark_unit(marked, unit)
            bar(done + 1, len(left))
    rest = {key: spec for key, spec in remade.items() if spec is not marked}
    _finish(name, store, rest, execution, f"Evaluating {name}")
    seconds = seconds_of(specs.values())
    _record(store, name, asked, specs, seconds)
    figures = [figures_of(run, gate.run), figures_of(name, specs)]
    write_page(specs, report_of(f"Dataset {name}", figures, [gate.run, specs], seconds))
    return figures


def _draw(gate: Gate, report: Mapping[str, Any]) -> str:
    """Draw each recogniser's worst pairs beside the report."""
    gallery, samples, counted = gate.stages["gallery"], gate.run["samples"], gate.stages["leakage"]
    for role, one in zip(gate.stages["neighbours"].weights, report["recognisers"], strict=True):
        pairs = []
        for pair in one["worst_images"][:SHOWN]:
            real = read_image(image_path(gallery, pair["gallery"]))
            if real is not None:
                sample = f"{pair['identity']}/{pair['replicate']}"
                generated = _sample(samples, pair["identity"], pair["replicate"])
                pairs.append(Pair(generated, real, sample, pair["gallery"], pair["cosine"]))
        title = f"Generated (left) and nearest of the gallery (right), by {one['recogniser']}"
        counted.location.write_atomic(f"pairs_{role}.png", pair_sheet(pairs, title))
    return f"{counted.directory}/pairs_*.png"


def _sample(samples: StageSpec, identity: int, replicate: int) -> Any:
    """One generated image `(H, W, 3)`."""
    blocks = samples.grid.block_identities, samples.grid.block_replicates
    unit = Unit(identity // blocks[0], replicate // blocks[1])
    return read_arrays(samples, unit)["image"][identity % blocks[0], replicate % blocks[1]]

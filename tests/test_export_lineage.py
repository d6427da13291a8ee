"""What an export tells of its origin: the stages of the run and of a gate that it went through."""

import json
import shutil
from types import SimpleNamespace

import numpy as np

from flows.export_pages import lineage_of, pages_of
from flows.results import installed_versions
from negfacediff_core.config import LeakageConfig
from negfacediff_core.export.layout import Layout
from negfacediff_core.export.settings import ExportConfig
from negfacediff_core.stages.gate import plan_gate, plan_kept
from negfacediff_core.store.layout import code_version
from negfacediff_core.store.runs import read_run, write_run
from negfacediff_core.store.shards import prepare

LAYOUT = Layout(np.arange(2), np.array([3, 3]), 112, 112, "png")
JOB = SimpleNamespace(settings=ExportConfig(), layout=LAYOUT)


def gated(build, store, folder):
    """A store with a run that a gate has kept, planned and recorded; returns the stages of the gate."""
    gallery = folder / "people.npz"
    faces = np.random.default_rng(0).standard_normal((150, 16)).astype(np.float32)
    np.savez(gallery, embeddings=faces, names=[f"person {number}" for number in range(150)])
    settings = LeakageConfig(gallery=str(gallery), policy="drop", fmr=0.001)
    gate = plan_gate(store, "tiny", settings)
    remade = plan_kept(gate, build, settings.fmr)
    for spec in (*gate.stages.values(), *remade.values()):
        prepare(spec)
    places = {
        name: {
            "fingerprint": spec.fingerprint,
            "identities": spec.grid.identities,
            "replicates": spec.grid.replicates,
        }
        for name, spec in {**gate.run, **remade}.items()
    }
    asked = {"run": "tiny", "settings": settings.model_dump(mode="json")}
    write_run(store, "tiny.kept", {"stages": places, "gate": asked, "versions": {"numpy": "9"}})
    return gate.stages


def test_the_stages_by_which_a_gate_dropped_images_are_told(tiny_build, tiny_store, tmp_path):
    store = str(shutil.copytree(tiny_store, tmp_path / "store"))
    write_run(store, "tiny", {**read_run(store, "tiny"), "versions": installed_versions()})
    assert lineage_of(store, "tiny", JOB)["gate"] is None
    stages = gated(tiny_build, store, tmp_path)
    lineage = lineage_of(store, "tiny.kept", JOB)
    gate = lineage["gate"]
    assert (gate["run"], gate["gallery"], gate["policy"], gate["fmr"]) == (
        "tiny",
        "people.npz",
        "drop",
        0.001,
    )
    for name, spec in stages.items():
        assert gate["stages"][name]["fingerprint"] == spec.fingerprint
        assert gate["stages"][name]["weights"] == {role: one.sha256 for role, one in spec.weights.items()}
    assert gate["stages"].keys() == {"gallery", "neighbours", "leakage"}
    # the versions of the build and those of the gate
    assert (lineage["versions"], gate["versions"]) == (installed_versions(), {"numpy": "9"})
    assert str(tmp_path) not in json.dumps(lineage)


def test_every_stage_tells_the_version_that_made_it(tiny_store, tmp_path):
    store = str(shutil.copytree(tiny_store, tmp_path / "store"))
    stages = lineage_of(store, "tiny", JOB)["stages"]
    assert {stage["code"] for stage in stages.values()} == {code_version()}
    described = next((tmp_path / "store" / "samples").glob("*/stage.json"))
    content = {**json.loads(described.read_text()), "code": "0.0.1"}
    content.pop("checksum")
    described.write_text(json.dumps(content))
    again = lineage_of(store, "tiny", JOB)
    assert again["stages"]["samples"]["code"] == "0.0.1" and again["negfacediff"] == code_version()
    assert pages_of(store, JOB, again, []).keys() == {
        "README.md",
        "LICENSE.md",
        "DATASHEET.md",
        "croissant.json",
    }

"""A setting of the leakage gate that changes a result has another place, and any other has the same."""

import shutil

import onnx
import pytest
from context_material import save_pictures

from negfacediff_core.config import LeakageConfig
from negfacediff_core.stages.gate import plan_gate

#: Every field: the first stage of the gate that it moves, None for none.
FIELDS = {
    "gallery": "gallery",
    "recognisers": "gallery",
    "detector": "gallery",
    "detector_size": "gallery",
    "policy": None,
    "fmr": None,
    "pictures": None,
}
STAGES = ("gallery", "neighbours", "leakage")


@pytest.fixture(scope="module")
def material(tiny_store, tiny_pack, tmp_path_factory):
    """A store with the tiny run, and another value of every field."""
    folder = tmp_path_factory.mktemp("places")
    shutil.copytree(tiny_store, folder / "store")
    for kind, name in (("judge", "judge.onnx"), ("faces", "detector.onnx")):
        network = onnx.load(tiny_pack / kind / name)
        network.doc_string = "another file"
        (folder / kind).mkdir()
        onnx.save(network, folder / kind / name)
    # people enough for thresholds at the coarsest rate
    for name, seeds in (("one", range(150)), ("two", range(1, 151))):
        save_pictures(folder / name, seeds)
    return folder


def test_every_field_of_the_gate_is_in_the_table():
    assert set(FIELDS) == set(LeakageConfig.model_fields)


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_moves_what_it_changes_and_nothing_else(field, material):
    others = {
        "gallery": str(material / "two"),
        "recognisers": (str(material / "judge"),),
        "detector": str(material / "faces"),
        "detector_size": 160,
        "policy": "flag",
        "fmr": 0.001,
        "pictures": True,
    }
    settings = {"gallery": str(material / "one"), "fmr": 1e-4 if field == "fmr" else 0.001}
    places = [
        {name: spec.path for name, spec in plan_gate(str(material / "store"), "tiny", one).stages.items()}
        for one in (LeakageConfig(**settings), LeakageConfig(**{**settings, field: others[field]}))
    ]
    moved = {name for name in STAGES if places[0][name] != places[1][name]}
    first = FIELDS[field]
    assert moved == (set(STAGES[STAGES.index(first) :]) if first else set())

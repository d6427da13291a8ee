"""What bad input gets: one clear sentence, from the command itself, and nothing half-written.

`PROVED` lists every kind of bad input with the tests of its message; those that need no machinery of their
own stand here and go through the public command.
"""

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small_stage import commit, make_spec

from flows import cli
from negfacediff_core.store import shards

TESTS = Path(__file__).parent

#: By kind of bad input: the tests, as file and function. Pair lists with odd counts are not here: nothing in
#: the project reads pair lists, which come with the verification of trained recognisers.
PROVED = {
    "unknown or mistyped keys": [
        ("test_cli", "test_bad_input_is_one_paragraph_and_exit_code_2"),
        ("test_fuzz", "test_any_value_of_any_field"),
    ],
    "a checkpoint with missing, extra or mis-shaped keys": [
        ("test_state_dicts", "test_weights_that_do_not_fit_are_named"),
        ("test_bad_input", "test_a_build_of_bad_input_is_refused"),
    ],
    "a weight file that is not what its hash says": [
        ("test_stages_bad_input", "test_weights_that_change_under_a_build_are_refused")
    ],
    "a pickle with anything but tensors": [
        ("test_security", "test_no_pickle_runs_code"),
        ("test_bad_input", "test_a_build_of_bad_input_is_refused"),
    ],
    "contexts with NaN, zero norm, wrong width, duplicates": [
        ("test_contexts", "test_bad_contexts_are_named"),
        ("test_bad_input", "test_a_build_of_bad_input_is_refused"),
    ],
    "a negative map that points outside or at itself": [
        ("test_negatives", "test_bad_maps"),
        ("test_negatives", "test_a_stored_map_that_points_at_itself_is_refused"),
    ],
    "more identities than contexts": [("test_bad_input", "test_a_build_of_bad_input_is_refused")],
    "a store that is read-only or full": [
        ("test_store_location", "test_a_failing_disk_is_explained_and_leaves_nothing"),
        ("test_cli", "test_a_store_that_cannot_be_written_is_refused"),
    ],
    "a store of a newer schema": [("test_bad_input", "test_a_store_of_bad_files_is_refused")],
    "corrupt or truncated shards, parts and records": [
        ("test_store", "test_damage_is_found_and_named"),
        ("test_fuzz", "test_any_damage_to_a_store_is_an_error_or_no_harm"),
        ("test_bad_input", "test_a_store_of_bad_files_is_refused"),
    ],
    "images with no face, several faces, unreadable files": [
        ("test_context_images", "test_folders_that_hold_no_identities_are_refused")
    ],
    "a worker that dies": [
        ("test_executors", "test_a_worker_that_dies_fails_its_own_piece_alone"),
        ("test_executors", "test_a_unit_that_kills_workers_of_a_scheduler_elsewhere_dies_once_a_round"),
    ],
}


@pytest.mark.parametrize("kind", PROVED)
def test_every_kind_of_bad_input_has_its_tests(kind):
    for file, function in PROVED[kind]:
        tree = ast.parse((TESTS / f"{file}.py").read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, function


def refused(capsys, *arguments):
    """Run the command line; return the one paragraph that it says on stderr."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    assert stop.value.code == cli.BAD_INPUT
    assert shown.err.startswith("Error: ") and len(shown.err.strip().splitlines()) == 1
    assert "Traceback" not in shown.out + shown.err
    return shown.err


def checkpoint(edit):
    """Input whose checkpoint is changed by `edit`, which takes the state dict."""

    def spoil(folder, values):
        file = folder / "generator/checkpoints/ema_averaged_model.ckpt"
        torch.save(edit(torch.load(file, weights_only=True)), file)

    return spoil


def vectors(edit, **settings):
    """Input with contexts from a file, which `edit` spoils."""

    def spoil(folder, values):
        contexts = np.random.default_rng(0).standard_normal((9, 16)).astype(np.float32)
        np.savez(folder / "contexts.npz", contexts=edit(contexts))
        values["contexts"] = {"source": "file", "file": str(folder / "contexts.npz")}
        values.update(settings)

    return spoil


def but(row, value):
    """Contexts in which one row is another."""

    def edit(contexts):
        contexts[row] = contexts[0] if value is None else value
        return contexts

    return edit


def renamed(state):
    return {key.replace("image_proj", "image_projection"): value for key, value in state.items()}


def misshaped(state):
    return {key: value[:1] if "image_proj.weight" in key else value for key, value in state.items()}


class Code:
    def __reduce__(self):
        return print, ("run",)


SPOILED = {
    "missing and extra keys": (checkpoint(renamed), ["missing", "image_proj", "unknown", "image_projection"]),
    "mis-shaped keys": (checkpoint(misshaped), ["of another shape", "image_proj.weight is (1,"]),
    "no state dict": (checkpoint(lambda state: [1, 2]), ["ema_averaged_model.ckpt"]),
    "code in a checkpoint": (checkpoint(lambda state: {**state, "x": Code()}), ["more than tensors"]),
    "NaN": (vectors(but(3, np.nan)), ["3"]),
    "zero norm": (vectors(but(4, 0.0)), ["4"]),
    "duplicates": (vectors(but(2, None)), ["2"]),
    "wrong width": (vectors(lambda contexts: contexts[:, :7]), ["7", "16"]),
    "integers": (vectors(lambda contexts: np.ones((9, 16), int)), ["int64", "float"]),
    "too few": (vectors(lambda contexts: contexts[:3]), ["3"]),
    "more identities than contexts": (vectors(lambda contexts: contexts, identities=12), ["12", "9"]),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_build_of_bad_input_is_refused(kind, tiny_build, tiny_generator, tmp_path, capsys):
    spoil, words = SPOILED[kind]
    shutil.copytree(tiny_generator, tmp_path / "generator")
    values = tiny_build.model_dump()
    values["samples"]["generator"] = str(tmp_path / "generator")
    spoil(tmp_path, values)
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(values))
    said = refused(capsys, "build", tmp_path / "build.yaml", "--store", tmp_path / "store", "--device", "cpu")
    assert all(word in said for word in words), said
    assert not (tmp_path / "store").exists()


def put(**changes):
    def edit(data):
        return json.dumps({**json.loads(data), **changes}).encode()

    return edit


BAD_FILES = {
    "newer stage": ("samples/*/stage.json", put(schema=99), "schema version 99"),
    "newer record": ("samples/*/done/00000-000.json", put(schema=99), "schema version 99"),
    "truncated record": ("samples/*/done/00000-000.json", lambda data: data[:50], "is damaged"),
    "empty record": ("samples/*/done/00000-000.json", lambda data: b"", "is damaged"),
    "record of another unit": ("samples/*/done/00000-000.json", put(unit="00001-000"), "is damaged"),
    "mistyped record": ("samples/*/done/00000-000.json", put(rows="many", checksum=None), "is damaged"),
    "stage that is no JSON": ("samples/*/stage.json", lambda data: b"\xff", "is damaged"),
    "stage of other blocks": ("samples/*/stage.json", put(blocks={"block_identities": 0}), "is damaged"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_store_of_bad_files_is_refused(kind, tmp_path, capsys):
    pattern, edit, words = BAD_FILES[kind]
    spec = make_spec(tmp_path, inputs={})
    shards.prepare(spec)
    for unit in spec.grid.units():
        commit(spec, unit)
    (file,) = tmp_path.glob(pattern)
    file.write_bytes(edit(file.read_bytes()))
    said = refused(capsys, "status", tmp_path)
    assert words in said and file.name in said

"""Nothing that is read runs code or reaches out of its folder; secrets stay secret, and text stays text."""

import ast
import builtins
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from prefect.settings import PREFECT_API_URL, temporary_settings
from small_stage import make_spec
from stage_builds import changed, make

from flows import launch, presets, results
from negfacediff_core.contexts import files, load_contexts, load_identities
from negfacediff_core.diffusion.checkpoint import load_generator
from negfacediff_core.diffusion.release_config import CONFIG_FILE
from negfacediff_core.diffusion.state_dicts import read_nested, read_state_dict
from negfacediff_core.errors import ConfigError, NegFaceDiffError, StoreError, WeightsError
from negfacediff_core.evaluation.figures import FIGURES, SETTINGS
from negfacediff_core.evaluation.report import render_report
from negfacediff_core.faces.embed import load_embedder
from negfacediff_core.stages.build import plan_build
from negfacediff_core.store.layout import Unit, read_spec
from negfacediff_core.store.runs import read_run, write_run
from negfacediff_core.store.shards import prepare
from negfacediff_core.weights import inspect_weights
from tasks import chunks

PROJECT = Path(__file__).parents[1]
PACKAGES = ("negfacediff_core", "tasks", "flows", "deployments")


# --- code in files -----------------------------------------------------------------------------------------


class Trap:
    """Unpickled, it calls what it was made with."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def traps(canary):
    """Ways in which a pickle could make the file `canary`."""
    return {
        "a shell command": Trap(os.system, f"touch {canary}"),
        "a builtin": Trap(builtins.open, str(canary), "w"),
        "evaluated code": Trap(builtins.eval, f"open({str(canary)!r}, 'w')"),
        "another unpickling": Trap(pickle.loads, pickle.dumps(Trap(os.mkdir, str(canary)))),
        "torch's own loader": Trap(torch.load, str(canary) + ".pt", "cpu"),
    }


TRAPS = sorted(traps(""))


def hidden(trap, vectors):
    """Places in which a dictionary of vectors can hide something, by where it is."""
    return {
        "the whole file": trap,
        "a value": {"a": vectors[0], "b": trap},
        "a key": {"a": vectors[0], "state": {"b": [trap]}},
        "an object array": {"a": np.array([trap], object)},
    }


HIDDEN = sorted(hidden(None, [None]))


def save_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


SAVERS = {"zip": torch.save, "legacy": save_legacy, "pickle": save_pickle}


@pytest.mark.parametrize("saved", SAVERS)
@pytest.mark.parametrize("place", HIDDEN)
@pytest.mark.parametrize("kind", TRAPS)
def test_no_pickle_runs_code(kind, place, saved, tmp_path):
    canary, file = tmp_path / "canary", tmp_path / "tensors.npy"
    SAVERS[saved](hidden(traps(canary)[kind], np.eye(2, 16, dtype=np.float32))[place], file)
    for read in (load_contexts, load_identities, read_state_dict, read_nested):
        with pytest.raises(NegFaceDiffError, match=r"tensors\.npy"):
            read(file)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["checkpoints/ema_averaged_model.ckpt", "first_stage_decoder_state_dict.pt"])
def test_no_weights_of_a_generator_run_code(name, tiny_generator, tmp_path):
    canary = tmp_path / "canary"
    generator = shutil.copytree(tiny_generator, tmp_path / "generator")
    state = torch.load(generator / name, weights_only=True)
    torch.save({**state, "more": Trap(os.mkdir, str(canary))}, generator / name)
    with pytest.raises(WeightsError, match=r"more than tensors \(it asks for posix\.mkdir\)"):
        load_generator(generator)
    with pytest.raises(WeightsError, match="more than tensors"):
        plan_build(
            presets.check_build({"samples": {"generator": str(generator)}}, "here"), str(tmp_path / "s")
        )
    assert "more than tensors" in str(inspect_weights(generator).problem)
    assert not canary.exists()


@pytest.mark.parametrize("kind", TRAPS)
def test_no_array_of_objects_runs_code(kind, tmp_path):
    canary = tmp_path / "canary"
    trapped = np.array([traps(canary)[kind]], object)
    np.save(tmp_path / "plain.npy", trapped, allow_pickle=True)
    np.savez(tmp_path / "contexts.npz", contexts=trapped)
    np.savez(tmp_path / "names.npz", contexts=np.eye(2, dtype=np.float32), names=trapped)
    np.savez(tmp_path / "fitted.npz", mean=trapped, covariance=trapped)
    for file in sorted(tmp_path.glob("*.np*")):
        for read in (load_contexts, load_identities):
            with pytest.raises(NegFaceDiffError, match=re.escape(file.name)):
                read(file)
    assert not canary.exists()


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.mkdir ['{}']",
        "!!python/object/new:os.mkdir ['{}']",
        "!!python/name:os.mkdir ''",
        "!!python/module:antigravity ''",
        "!!python/object/apply:builtins.open ['{}', w]",
    ],
)
def test_no_yaml_runs_code(tag, tiny_generator, tmp_path):
    canary = tmp_path / "canary"
    line = tag.format(canary)
    file = tmp_path / "build.yaml"
    file.write_text(f"name: {line}\n")
    for source, settings in ((str(file), []), ("demo", [f"samples.steps={line}"])):
        with pytest.raises(ConfigError, match="python"):
            presets.load_build(source, settings)
    generator = shutil.copytree(tiny_generator, tmp_path / "generator")
    config = generator / CONFIG_FILE
    config.write_text(config.read_text() + f"\nextra: {line}\n")
    with pytest.raises(ConfigError, match="python"):
        load_generator(generator)
    assert not canary.exists()


def test_a_command_that_a_message_offers_holds_no_names_that_a_shell_would_run(tmp_path):
    file = tmp_path / "a$(touch canary).ckpt"
    torch.save({"state_dict": {}, "callbacks": Trap(os.mkdir, "canary")}, file)
    with pytest.raises(WeightsError, match="more than tensors") as error:
        inspect_weights(file)
    assert "python -c" not in str(error.value)


# --- paths -------------------------------------------------------------------------------------------------


def test_names_in_an_archive_are_only_names(tmp_path):
    """An `.npz` is read member by member and never unpacked."""
    good = tmp_path / "in" / "good.npz"
    good.parent.mkdir()
    np.savez(good, contexts=np.eye(2, dtype=np.float32))
    before = set(tmp_path.rglob("*"))
    with zipfile.ZipFile(good, "a") as archive:
        archive.writestr("../escaped.npy", b"out")
        archive.writestr("/tmp/negfacediff-escaped.npy", b"out")
    assert load_contexts(good).contexts.shape == (2, 2)
    assert set(tmp_path.rglob("*")) == before
    assert not Path("/tmp/negfacediff-escaped.npy").exists()


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "a\\b", "/x", "a\0", ".x", "", "a\n", "x" * 201, "A"])
def test_a_run_cannot_be_named_like_a_path(name, tmp_path):
    with pytest.raises(StoreError, match="cannot name a run"):
        write_run(str(tmp_path), name, {"stages": {}})
    with pytest.raises(StoreError, match="cannot name a run"):
        read_run(str(tmp_path), name)
    with pytest.raises(ConfigError, match="name is"):
        presets.check_build({"name": name}, "here")
    assert not list(tmp_path.rglob("*"))


@given(
    st.text() | st.sampled_from(["../../x", "00001-000/..", "-1-000", "٠٠٠٠١-000", "00001-000\n", "1_0-000"])
)
def test_a_unit_is_named_by_two_numbers_alone(name):
    try:
        assert re.fullmatch(r"[0-9]{5,}-[0-9]{3,}", Unit.parse(name).name)
    except ValueError:
        return
    assert Unit.parse(name).name == name


@pytest.mark.parametrize(
    ("stage", "digest"), [("..", "0" * 16), ("samples", ".."), ("samples", "../../x"), ("a/b", "0" * 16)]
)
def test_a_stage_is_found_by_name_and_fingerprint_alone(stage, digest, tmp_path):
    with pytest.raises(StoreError, match="no stage directory"):
        read_spec(str(tmp_path), stage, digest)


def test_arrays_cannot_be_named_like_paths(tmp_path):
    spec = make_spec(tmp_path, inputs={})
    prepare(spec)
    file = tmp_path / spec.path / "stage.json"
    content = json.loads(file.read_text())
    content["arrays"][0]["name"] = "../../../outside"
    file.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=r"stage\.json is damaged"):
        read_spec(str(tmp_path), spec.name, spec.fingerprint)


@pytest.mark.parametrize("location", ["weights.bin", "../weights.bin", "/etc/hostname"])
def test_a_network_cannot_take_weights_from_other_files(location, tmp_path, monkeypatch):
    """They would be no part of the hash in the fingerprint, and could be any file of this machine."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").write_bytes(np.zeros(37632 * 16, np.float32).tobytes())
    weights = TensorProto(name="weights", data_type=1, dims=[37632, 16], data_location=TensorProto.EXTERNAL)
    entry = weights.external_data.add()
    entry.key, entry.value = "location", location
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["out"]),
    ]
    images = helper.make_tensor_value_info("images", 1, [1, 3, 112, 112])
    out = helper.make_tensor_value_info("out", 1, [1, 16])
    graph = helper.make_graph(nodes, "judge", [images], [out], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "judge.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(WeightsError, match=r"judge\.onnx keeps weights in another file"):
        load_embedder(tmp_path)


# --- what the source may not do ----------------------------------------------------------------------------

FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load"}
FORBIDDEN_CALLS |= {"yaml.unsafe_load", "yaml.full_load", "shutil.unpack_archive", "marshal.loads"}


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: word.value for word in node.keywords}, node.lineno


def test_the_source_starts_no_shell_and_unpickles_nothing():
    found = []
    for file in (file for package in PACKAGES for file in sorted((PROJECT / package).rglob("*.py"))):
        for name, words, line in calls(ast.parse(file.read_text(encoding="utf-8"))):
            value = {word: getattr(node, "value", None) for word, node in words.items()}
            dangerous = (
                name in FORBIDDEN_CALLS
                or name.endswith((".extractall", ".extract"))
                or value.get("shell", False) is not False
                or value.get("allow_pickle", False) is not False
                or (name == "torch.load" and value.get("weights_only") is not True)
            )
            if dangerous:
                found.append(f"{file.relative_to(PROJECT)}:{line} {name}")
    assert not found


# --- what a build leaves behind ----------------------------------------------------------------------------

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIA-the-access-key",
    "AWS_SECRET_ACCESS_KEY": "the-secret-key",
    "AWS_SESSION_TOKEN": "the-session-token",
    "PREFECT_API_KEY": "pnu_the-api-key",
    "PREFECT_API_URL": "https://somebody:the-password@prefect.example/api",
    "PREFECT_API_AUTH_STRING": "admin:the-auth-string",
    "HF_TOKEN": "hf_the-token",
}


@pytest.fixture(scope="module")
def built(tiny_build, tiny_pack, tmp_path_factory):
    """The store of a build with secrets in the environment, weights below an evil name, and a log."""
    folder = tmp_path_factory.mktemp("security")
    pack = shutil.copytree(tiny_pack, folder / "<script>alert('x')&<img src=x onerror=alert(1)>")
    build = changed(
        tiny_build,
        name="evil",
        samples__generator=str(pack / "generator"),
        aligned__detector=str(pack / "faces"),
        embeddings__judge=str(pack / "judge"),
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        specs = make(build, folder / "store")
        results.record_run(build, specs, str(folder / "store"), 1.0)
        figures = results.figures_of(build.name, specs)
        report = results.report_of(f"Dataset {build.name}", [figures], [specs], 1.0)
        results.write_page(specs, report)
        try:
            try:
                raise OSError(f"no answer from {SECRETS['PREFECT_API_URL']}")
            except OSError as cause:
                raise OSError("a trouble") from cause
        except OSError as error:
            chunks._log_failure(specs["samples"], Unit(0, 0), error)
    return folder / "store"


def test_no_secret_is_left_in_a_store(built):
    files = [path for path in built.rglob("*") if path.is_file()]
    assert {"report.html", "evil.json", "00000-000.txt", "stage.json"} <= {path.name for path in files}
    told = {
        f"{name} in {path.relative_to(built)}"
        for path in files
        for name, value in SECRETS.items()
        for secret in (value, value.rpartition("@")[0].rpartition(":")[2])
        if secret and secret.encode() in path.read_bytes()
    }
    assert not told


def test_the_report_of_a_build_shows_paths_as_text(built):
    (page,) = built.glob("evaluation/*/report.html")
    text = page.read_text()
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&amp;" in text
    assert "<script" not in text and "<img src=x" not in text


def test_markup_in_whatever_the_report_takes_stays_text():
    evil = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>"
    dataset = dict.fromkeys(SETTINGS, evil) | dict.fromkeys([figure.key for figure in FIGURES], 0.5)
    dataset |= {"name": evil, "w": 0.5, "lineage": {evil: evil}, "settings": {evil: evil}}
    report = {
        "title": evil,
        "datasets": [dataset, dataset],
        "seconds": 1.0,
        "licences": [{"part": evil, "licence": evil, "source": evil}],
        "device": evil,
        "judge": evil,
        "versions": {evil: evil},
    }
    page = render_report(report, {f"{evil}.png": b"png"})
    assert "<script" not in page and "<img src=x" not in page
    assert page.count("&lt;script&gt;") > 10


def test_a_server_that_does_not_answer_is_named_without_its_password():
    address = "http://somebody:the-password@127.0.0.1:9/api"
    with temporary_settings({PREFECT_API_URL: address}), pytest.raises(ConfigError) as error:
        launch.launch(lambda: None)
    assert "127.0.0.1:9/api" in str(error.value)
    assert "the-password" not in str(error.value)


def test_the_flags_of_a_pickled_array_are_not_believed(tmp_path):
    """numpy believes them, and then takes the numbers of the array for pointers."""
    path = tmp_path / "contexts.npy"
    vectors = {name: np.arange(4, dtype=np.float32) for name in "ab"}
    torch.save(vectors, path, _use_new_zipfile_serialization=False)
    end_of_a_dtype = b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK%ct"
    content = path.read_bytes()
    assert end_of_a_dtype % 0 in content
    path.write_bytes(content.replace(end_of_a_dtype % 0, end_of_a_dtype % 63))
    (rows, names) = files._read_published(path)
    np.testing.assert_array_equal(rows, [[0, 1, 2, 3]] * 2)
    assert names == ("a", "b") and rows.dtype.flags == np.dtype(np.float32).flags

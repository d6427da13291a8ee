"""`negfacediff weights check`: what it says of weights of every kind, good, foreign and damaged."""

import hashlib
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from diffusion_reference import DECODER_FILE, ENCODER_FILE, UNET_FILE, save_tiny

from flows.cli import main
from negfacediff_core.diffusion.release_config import CONFIG_FILE
from negfacediff_core.stages.models import PROJECT
from negfacediff_core.weights import generators, inspect_weights, licence_of

DEMO = PROJECT / "packs" / "demo"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "generator"
    save_tiny(folder)
    return folder


@pytest.fixture
def generator(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "generator")


@pytest.fixture
def check(capsys):
    """Run `negfacediff weights check`: its exit code, what it shows and, if it fails, its last paragraph."""

    def run(source, *words):
        code = 0
        try:
            main(["weights", "check", str(source), *words])
        except SystemExit as stop:
            code = stop.code
        shown = capsys.readouterr()
        assert "Traceback" not in shown.out + shown.err
        if code:
            assert code == 2 and shown.err.startswith("Error: ") and len(shown.err.splitlines()) == 1
        return code, shown.out, shown.err

    return run


def row(shown, *cells):
    """Whether a line of what is shown consists of these cells."""
    return any(re.split(r"  +", line.strip()) == list(cells) for line in shown.splitlines())


def test_a_generator_is_described_hashed_and_run(generator, check):
    code, shown, _ = check(generator)
    assert code == 0 and "generator in the IDiff-Face layout" in shown and "These weights work" in shown
    expected = {
        "condition": "CA",
        "channels": "32 x 1-2",
        "attention": "no-yes, heads of 32",
        "blocks": "1 a resolution",
        "contexts": "vectors of 16",
        "projected to": "32",
        "partial dropout": "0% (CPD, in training)",
        "empty context": "zeros",
        "schedule": "linear, T = 50",
        "latents": "3 x 8 x 8, 16 codes",
        "images": "16 x 16 RGB",
        "conditioned by": "recogniser with sha256 ab12",
    }
    for fact in expected.items():
        assert row(shown, *fact), fact
    for role, file in (("unet", UNET_FILE), ("decoder", DECODER_FILE), ("encoder", ENCODER_FILE)):
        content = (generator / file).read_bytes()
        assert row(shown, file, role, f"{len(content):,}", hashlib.sha256(content).hexdigest())
        state = torch.load(generator / file, weights_only=True)
        network = {key: value for key, value in state.items() if role != "unet" or "eps_model." in key}
        numbers = sum(value.numel() for value in network.values())
        assert row(shown, role, f"{numbers:,}", "float32", f"{len(network):,} keys, all as configured")
    assert re.search(r"network evaluation +\d+\.\d\d +finite", shown)
    assert re.search(r"decoding +\d+\.\d\d +finite", shown)


@pytest.mark.parametrize(
    ("model", "facts"),
    [
        ({"is_context_conditional": False}, {"condition": "none (unconditional)"}),
        (
            {"n_context_classes": 7, "condition_type": "DiffAE"},
            {"condition": "DiffAE", "contexts": "7 classes"},
        ),
        (
            {"learn_empty_context": True, "context_dropout_probability": 0.25, "attention_heads": 4},
            {
                "empty context": "learned",
                "partial dropout": "25% (CPD, in training)",
                "attention": "no-yes, 4 heads",
            },
        ),
    ],
)
def test_generators_of_every_kind_can_sample(tmp_path, model, facts):
    save_tiny(tmp_path, **model)
    inspection = inspect_weights(tmp_path)
    assert inspection.problem is None and [trial.outcome for trial in inspection.trials] == ["finite"] * 2
    assert facts.items() <= inspection.facts.items()


def test_the_encoder_is_not_needed_and_one_file_for_both_parts_is_listed_once(generator, check):
    state = torch.load(generator / DECODER_FILE, weights_only=True)
    state |= torch.load(generator / ENCODER_FILE, weights_only=True)
    (generator / ENCODER_FILE).unlink()
    code, shown, _ = check(generator)
    assert code == 0 and re.search("^decoder ", shown, re.M) and not re.search("^encoder ", shown, re.M)
    (generator / DECODER_FILE).unlink()
    torch.save({"state_dict": state, "epoch": 3}, generator / "first_stage.ckpt")
    assert [file.role for file in inspect_weights(generator).files] == ["config", "unet", "decoder, encoder"]


def change_state(path, edit):
    state = torch.load(path, weights_only=True)
    edit(state)
    torch.save(state, path)


def test_weights_that_do_not_fit_are_shown_as_far_as_they_go(generator, check):
    change_state(generator / DECODER_FILE, lambda state: state.pop("decoder.conv_in.bias"))
    code, shown, said = check(generator)
    assert code == 2 and "These weights work" not in shown and "run once" not in shown
    assert re.search(r"unet .* all as configured", shown) and re.search(r"decoder .* does not fit", shown)
    assert DECODER_FILE in said and "1 missing (decoder.conv_in.bias)" in said


def test_weights_that_are_not_finite_cannot_sample(generator, check):
    change_state(generator / UNET_FILE, lambda state: state["eps_model.final.bias"].fill_(float("nan")))
    code, shown, said = check(generator)
    assert code == 2 and re.search(r"network evaluation .* NaN or infinity", shown)
    assert "network evaluation gives NaN or infinity" in said and "compare their sha256" in said


def test_whatever_running_raises_is_a_problem_of_the_weights(generator, check, monkeypatch):
    def run_out(*arguments):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(generators, "_sample_once", run_out)
    code, _, said = check(generator)
    assert code == 2 and "load but do not run (RuntimeError: out of memory)" in said


def test_a_model_pack_is_described_hashed_and_run(tmp_path, check):
    pack = shutil.copytree(DEMO / "faces", tmp_path / "buffalo")
    shutil.copy(pack / "recogniser.onnx", pack / "second.onnx")
    code, shown, _ = check(pack)
    assert code == 0 and "insightface model pack" in shown
    assert row(shown, "detection", "detector.onnx") and row(shown, "recognition", "recogniser.onnx")
    for name, role in (("detector", "detection"), ("recogniser", "recognition"), ("second", "not used")):
        content = (pack / f"{name}.onnx").read_bytes()
        assert row(shown, f"{name}.onnx", role, f"{len(content):,}", hashlib.sha256(content).hexdigest())
    assert "0 faces in a blank image of 128 x 128" in shown
    assert "finite, 20 wide, of a crop of 112 x 112" in shown
    assert "Not determined. Do not publish" in shown
    for licence in (
        "insightface model packs: non-commercial research",
        "IDiff-Face, ElasticFace: CC BY-NC-SA 4.0",
    ):
        assert licence in shown


def test_a_single_network_is_run_and_a_lone_state_dict_is_told_where_it_belongs(generator, check):
    code, shown, _ = check(DEMO / "judge" / "judge.onnx")
    assert code == 0 and "single file" in shown and "finite, 128 wide" in shown
    assert row(shown, "Apache-2.0.")
    names = {
        UNET_FILE: "a U-Net in the IDiff-Face layout",
        DECODER_FILE: "a VQ first stage in the CompVis layout",
    }
    for file, name in names.items():
        code, shown, said = check(generator / file)
        assert code == 2 and name in shown and f"is {name} and cannot run alone" in said
    whole = {"first_stage_model.encoder.x": torch.ones(1), "model.y": torch.ones(1)}
    torch.save({"state_dict": whole, "epoch": 3}, generator / "model.ckpt")
    assert "a whole latent-diffusion model with its first stage" in check(generator / "model.ckpt")[1]
    torch.save({"weight": torch.ones(1)}, generator / "model.ckpt")
    assert "a state dict of nothing that is used here" in check(generator / "model.ckpt")[2]


def test_a_damaged_pack_is_refused_and_named(tmp_path, check):
    pack = shutil.copytree(DEMO / "faces", tmp_path / "pack")
    whole = (pack / "recogniser.onnx").read_bytes()
    for damaged in (b"", b"no network", whole[: len(whole) // 2]):
        (pack / "recogniser.onnx").write_bytes(damaged)
        code, shown, said = check(pack)
        assert code == 2 and "recogniser.onnx" in said and re.search(r"recogniser\.onnx +0 +damaged", shown)
        assert row(shown, "detection", "detector.onnx")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.ckpt", b"some text", "damaged"),
        ("model.safetensors", b"some text", "damaged"),
        ("model.onnx", b"some text", "not a readable ONNX file"),
        ("readme", b"some text", "damaged"),
    ],
)
def test_a_file_that_holds_no_weights_is_refused(tmp_path, check, name, content, said):
    (tmp_path / name).write_bytes(content)
    code, _, error = check(tmp_path / name)
    assert code == 2 and name in error and said in error


def test_a_folder_without_weights_is_told_what_one_holds(tmp_path, check):
    assert "there is nothing at" in check(tmp_path / "nowhere")[2]
    said = check(tmp_path)[2]
    assert "a generator's folder holds .hydra/config.yaml" in said and "Did you mean" not in said
    said = check(DEMO)[2]
    assert re.search(r"Did you mean \S+/demo/faces, \S+/demo/generator, \S+/demo/judge\?", said)
    (tmp_path / "checkpoints").mkdir()
    assert "There is no generator at" in check(tmp_path)[2]


def test_what_may_not_be_read_is_said(generator, check, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied", str(generator / DECODER_FILE))

    monkeypatch.setattr(generators, "hash_file", refuse)
    code, _, said = check(generator)
    assert code == 2 and f"{DECODER_FILE} cannot be read: Permission denied" in said


def test_no_damage_anywhere_in_a_generator_ends_in_a_traceback(generator, check):
    numbers = np.random.default_rng(0)
    for file in (CONFIG_FILE, UNET_FILE, DECODER_FILE, ENCODER_FILE):
        whole = (generator / file).read_bytes()
        for damaged in (whole[:-9], numbers.bytes(99), whole[:50] + numbers.bytes(20) + whole[70:]):
            (generator / file).write_bytes(damaged)
            check(generator)
        (generator / file).unlink()
        (generator / file).mkdir()
        check(generator)
        (generator / file).rmdir()
        (generator / file).write_bytes(whole)
    assert check(generator)[0] == 0


def test_a_licence_is_read_beside_the_weights_or_in_their_pack_and_nowhere_else(generator):
    for part in ("generator", "faces", "judge/judge.onnx"):
        assert licence_of(DEMO / part).startswith("Apache-2.0; trained on renders of anny heads")
    # that of a project in whose folder the weights happen to lie is not theirs
    (generator.parent / "LICENSE").write_text("Apache License\n")
    assert licence_of(generator) is None
    (generator / "LICENSES").mkdir()
    (generator / "LICENCE.txt").write_text("\n  Attribution-NonCommercial\n 4.0\n\nBy exercising ...\n")
    assert licence_of(generator) == licence_of(generator / CONFIG_FILE.parent.parent / "x.pt")
    assert licence_of(generator) == "Attribution-NonCommercial 4.0"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "Creative Commons Legal Code\n\nCC0 1.0 Universal\n\nfor any purpose, also commercial",
            "CC0 1.0 Universal",
        ),
        (
            "MIT License\n\nCopyright 2020\n\nPermission is granted. The models are for non-commercial\n"
            "research purposes only. They come as they are.",
            "MIT License [...] The models are for non-commercial research purposes only",
        ),
        (
            "MIT License\n\nCopyright 2020\n\nPermission is granted. Commercial use is not allowed.",
            "MIT License [...] Commercial use is not allowed.",
        ),
        (
            "MIT License\n\nCopyright 2020\n\nThe weights may not be used to recognise people. As they are.",
            "MIT License [...] The weights may not be used to recognise people",
        ),
        (f"MIT {'x' * 296}, no commercial use", f"MIT {'x' * 296} [...] {'x' * 148}, no commercial use"),
        ("", ""),
    ],
)
def test_a_licence_is_shortened_but_for_what_it_restricts(tmp_path, text, shown):
    (tmp_path / "LICENSE").write_text(text)
    assert licence_of(tmp_path) == shown


def test_all_licences_beside_weights_count(tmp_path):
    (tmp_path / "LICENSE").write_text("MIT License\n")
    (tmp_path / "LICENSE-weights").write_text("CC BY-NC 4.0\n")
    assert licence_of(tmp_path) == "MIT License; CC BY-NC 4.0"


def test_the_configuration_is_what_is_shown(generator):
    path = generator / CONFIG_FILE
    config = yaml.safe_load(path.read_text())
    for key in ("attention_heads", "condition_type"):
        config["model"].pop(key, None)
    del config["constants"]["conditioner_sha256"]
    path.write_text(yaml.safe_dump(config))
    facts = inspect_weights(generator).facts
    assert facts["condition"] == "CA" and "conditioned by" not in facts


def test_how_far_a_number_format_strays_is_told(generator, check):
    code, shown, _ = check(generator, "--precision", "bf16", "--precision", "fp32")
    assert code == 0 and "predictions differ by" in shown
    assert re.search(r"bf16 +[1-9]\.\de-0[1-3] +\d+\.\d\d of 255 +[1-9]", shown)
    assert re.search(r"fp32 +0\.0e\+00 +0\.00 of 255 +0", shown)
    assert "differ by" not in check(generator)[1]


@pytest.mark.parametrize(
    "words, said",
    [
        (("--precision", "fp16"), "which a CPU does not have"),
        (("--precision", "bf16", "--device", "cuda:9"), "cuda:9"),
    ],
)
def test_a_number_format_that_cannot_be_had_is_refused_at_once(generator, check, words, said):
    code, shown, error = check(generator, *words)
    assert code == 2 and said in error and not shown

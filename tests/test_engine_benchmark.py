"""The benchmark of the engine: its plain form makes the engine's images, and it counts operations right."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusion_reference import TINY_MODEL, randomised
from PIL import Image

from negfacediff_core.diffusion.checkpoint import load_generator
from negfacediff_core.diffusion.engine import SamplerSettings, SamplingEngine
from negfacediff_core.diffusion.unet import ConditionalUNet

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import engine
import gpu
import measure
from floors import operations_of, unit_vectors
from networks import operations
from plain import PlainDecoder, PlainNetwork, PlainSampler


@pytest.mark.parametrize(
    "size", [{}, {"n_blocks_per_resolution": 2, "attention_head_channels": 16}, {"condition_type": "AdaGN"}]
)
@torch.inference_mode()
def test_the_plain_network_is_the_network(size):
    unet = randomised(ConditionalUNet(**TINY_MODEL | size))
    numbers = torch.Generator().manual_seed(0)
    x, contexts = torch.randn(3, 3, 8, 8, generator=numbers), torch.randn(3, 16, generator=numbers)
    t = torch.tensor([0, 7, 49])
    expected = unet(x, t, contexts)
    assert (PlainNetwork(unet)(x, t, contexts) - expected).norm() < 1e-5 * expected.norm()


@torch.inference_mode()
def test_the_plain_decoder_is_the_decoder(tiny_generator):
    decoder = load_generator(tiny_generator).decoder
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(PlainDecoder(decoder)(latents), decoder(latents), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [pytest.param("ddpm", {}, marks=pytest.mark.slow), ("ddim", {"steps": 5}), ("dpm_solver", {"steps": 5})],
)
def test_the_plain_form_makes_the_images_of_the_engine(saved, tmp_path, sampler, options):
    generator = load_generator(saved[0])
    contexts, negatives = unit_vectors(4, 16).reshape(2, 2, 16)
    plain = PlainSampler(generator, sampler, 0.5, **options).write(tmp_path, contexts, negatives, images=3)
    ours = SamplingEngine(generator, SamplerSettings(sampler, w=0.5, **options), batch_size=4)
    identities, replicates = np.repeat(np.arange(2), 3), np.tile(np.arange(3), 2)
    made = ours.sample(
        contexts[identities],
        negatives[identities][:, None],
        np.ones((6, 1), np.float32),
        identities,
        replicates,
        seed=0,
    )
    difference = np.abs(plain.reshape(made.images.shape).astype(int) - made.images)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    assert np.array_equal(np.asarray(Image.open(tmp_path / "1_2.png")), plain[1, 2])
    assert plain.std() > 1


@pytest.mark.parametrize("blocks", [1, 2])
def test_operations_by_formula_are_those_counted(blocks):
    with torch.device("meta"):
        unet = ConditionalUNet(**TINY_MODEL | {"n_blocks_per_resolution": blocks})
        x, t, contexts = torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, 16)
    counted = operations_of(lambda: PlainNetwork(unet)(x, t, contexts))
    assert sum(operations(unet, 16).values()) == counted


def test_the_full_size_network_takes_the_operations_that_are_published_for_it():
    with torch.device("meta"):
        unet = ConditionalUNet()
    assert sum(weights.numel() for weights in unet.parameters()) == 216_341_187
    assert sum(operations(unet, 32).values()) == pytest.approx(13.79e9, rel=1e-3)


PARTS_TRIED = ["evaluations", "decoding", "samplers", "outside"]


@pytest.mark.slow
def test_the_benchmark_runs_and_writes_what_it_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    assert engine.main(["--size", "tiny", "--quick", "--only", *PARTS_TRIED]) == 0
    results = json.loads((tmp_path / "engine-cpu-tiny-part.json").read_text())
    assert list(results["parts"]) == PARTS_TRIED
    rows = {row["what"]: row for part in results["parts"].values() for row in part["rows"]}
    assert all(row["value"] > 0 for row in rows.values())
    judged = [row["what"] for row in rows.values() if row["verdict"]]
    assert judged == ["relative difference, fp32"]  # tiny networks say nothing of speed
    step = rows["evaluations, fp32, batch 8"]
    assert step["value"] == pytest.approx(step["plain"] / step["here"]) and step["floor"] < step["here"]
    long, short = rows["DDPM-1000, bf16"], rows["DPM-Solver++ 20, bf16"]
    assert 10 < long["plain"] / short["plain"] < 50  # evaluations, and a decoding each
    assert "DDIM-200, fp32" in capsys.readouterr().out


@pytest.mark.slow
def test_a_part_that_fails_is_told_and_the_others_run(tmp_path, monkeypatch):
    def broken(setup):
        raise RuntimeError("no store here")

    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setitem(engine.PARTS, "unit", broken)
    assert engine.main(["--size", "tiny", "--quick", "--only", "unit", "decoding"]) == 1
    parts = json.loads((tmp_path / "engine-cpu-tiny-part.json").read_text())["parts"]
    assert parts["unit"]["error"] == "RuntimeError: no store here" and parts["decoding"]["rows"]


@pytest.mark.parametrize(
    ("value", "at_most", "verdict"), [(2.0, False, "met"), (1.9, False, "MISSED"), (2.1, True, "MISSED")]
)
def test_a_missed_target_is_told(value, at_most, verdict):
    row = engine.Row("decoding", value, target=2.0, at_most=at_most)
    assert row.verdict == verdict and verdict in engine.line_of(row)
    part = {"rows": [row._asdict() | {"verdict": row.verdict}]}
    assert engine.failed({"decoding": part}) == (["decoding"] if verdict == "MISSED" else [])


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_and_writes_after_every_section(tmp_path, monkeypatch):
    def broken(setup):
        raise RuntimeError("no such device")

    monkeypatch.setitem(gpu.CHECKS, "memory", broken)
    words = ["--device", "cpu", "--size", "tiny", "--quick", "--results", str(tmp_path / "gpu.json")]
    sections = ["noise", "precisions", "batches", "memory", "accelerations", "overlap"]
    sections += ["decoding", "compiling"]
    assert gpu.main([*words, "--only", *sections]) == 1
    results = json.loads((tmp_path / "gpu.json").read_text())
    checks = results["checks"]
    assert [name for name, check in checks.items() if not check["ok"]] == ["memory"]
    assert checks["memory"]["error"] == "RuntimeError: no such device"
    assert checks["noise"]["share equal"] == 1 and checks["precisions"]["fp32"]["largest"] == 0
    assert checks["overlap"]["units"] == 2 and checks["overlap"]["one by one"]["idle"] < 1
    assert results["parts"]["decoding"]["rows"]
    assert gpu.main([*words, "--minutes", "0", "--only", "noise"]) == 1
    assert "time" in json.loads((tmp_path / "gpu.json").read_text())["checks"]["noise"]["left out"]

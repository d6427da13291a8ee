"""What a build costs, counted: against the engine's own calls, published counts, and a real small build."""

import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusion_reference import TINY_MODEL
from hypothesis import given
from hypothesis import strategies as st
from stage_builds import changed, make

from negfacediff_core.config import BuildConfig
from negfacediff_core.cost import (
    NOT_MODELLED,
    Calibration,
    NetworkRates,
    Rate,
    Work,
    estimate,
    evaluations_of,
    passes_of,
    rate_of,
)
from negfacediff_core.diffusion.checkpoint import load_generator
from negfacediff_core.diffusion.engine import SamplerSettings, SamplingEngine
from negfacediff_core.diffusion.first_stage import FirstStageSettings, VQDecoder
from negfacediff_core.diffusion.samplers import SAMPLERS
from negfacediff_core.diffusion.unet import ConditionalUNet
from negfacediff_core.errors import ConfigError
from negfacediff_core.operations import decoder_gflop, module_gflop, onnx_gflop, unet_gflop
from negfacediff_core.recognition.backbones import build_backbone
from negfacediff_core.stages.build import describe_build
from negfacediff_core.stages.costs import JUDGE_GFLOP, networks_of, not_counted, sizes_of, work_of
from negfacediff_core.stages.sizes import BYTES_TOLERANCE, assumed_specs, size_of
from negfacediff_core.store.shards import prepare

DEMO = Path(__file__).parents[1] / "packs/demo"


@pytest.fixture
def calls(monkeypatch) -> Counter[int]:
    """How often the network was called, by contexts a latent; it predicts nothing, at once."""
    counts: Counter[int] = Counter()

    def forward(unet, x, t, context):
        counts[context.rows // len(x)] += 1
        return torch.zeros_like(x).repeat(context.rows // len(x), 1, 1, 1)

    monkeypatch.setattr(ConditionalUNet, "forward", forward)
    return counts


@pytest.fixture(scope="module")
def generator(tiny_generator):
    return load_generator(tiny_generator)


CASES = {
    "constant": {},
    "no negative": {"w": 0.0},
    "adaptive": {"weight": "adaptive"},
    "reverse": {"weight": "reverse"},
    "a curve that is zero in the middle": {"weight": "piecewise", "curve": "0:1 0.3:1 0.3:0 0.6:0 1:1"},
    "interval": {"interval": (0.2, 0.7)},
    "an interval that no step falls into": {"interval": (0.991, 0.993)},
    "classifier-free": {"w": 0.0, "cfg": 1.0},
    "both in an interval": {"cfg": 1.0, "interval": (0.0, 0.5)},
    "both, one of them fading": {"cfg": 1.0, "weight": "adaptive", "interval": (0.3, 1.0)},
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("steps", [1, 7])
def test_passes_are_those_that_the_engine_makes(generator, sampler, case, steps, calls, monkeypatch):
    settings = SamplerSettings(sampler=sampler, steps=steps, **{"w": 0.5, **CASES[case]})
    negatives, images = 2, 3
    monkeypatch.setattr(generator.unet, "learn_empty_context", True)
    monkeypatch.setattr(
        generator.unet, "empty_context_embedding", torch.zeros(TINY_MODEL["context_channels"]), raising=False
    )
    engine = SamplingEngine(generator, settings)
    draws = np.random.default_rng(0).standard_normal((images, 1 + negatives, 16), np.float32)
    shares = np.full((images, negatives), 0.5, np.float32)
    engine.sample(draws[:, 0], draws[:, 1:], shares, np.arange(images), np.zeros(images, np.int64), 0)
    assert passes_of(settings, generator.schedule.T, negatives) == dict(calls)


@pytest.mark.parametrize(
    ("settings", "negatives", "published"),
    [
        ({"sampler": "ddpm"}, 1, 2000),
        ({"sampler": "ddim", "steps": 200}, 1, 400),
        ({"sampler": "dpm_solver", "steps": 20}, 1, 40),
        ({"sampler": "ddim", "steps": 200, "w": 0.0}, 0, 200),
        ({"sampler": "ddim", "steps": 200, "ddim_alpha": "paper"}, 1, 400),
        # (every 33rd timestep of 1,000 makes 31, not 30)
        ({"sampler": "ddim", "steps": 30, "ddim_alpha": "paper"}, 1, 62),
    ],
)
def test_evaluations_an_image_are_the_published_ones(settings, negatives, published):
    assert evaluations_of(passes_of(SamplerSettings(**settings), 1000, negatives)) == published


@given(st.integers(1, 50), st.integers(0, 5), st.floats(0, 1), st.floats(0, 1))
def test_an_interval_never_costs_more_than_none(steps, negatives, low, high):
    settings = SamplerSettings(steps=steps, interval=(min(low, high), max(low, high)))
    passes = passes_of(settings, 50, negatives)
    assert sum(passes.values()) == steps
    assert steps <= evaluations_of(passes) <= steps * (1 + negatives)


def test_the_full_size_network_takes_the_operations_counted_elsewhere():
    with torch.device("meta"):
        unet, decoder = ConditionalUNet(), VQDecoder(FirstStageSettings())
    one, two = (unet_gflop(unet, (3, 32, 32), contexts) for contexts in (1, 2))
    # 13.79 with the projection of the context, which is made once an identity and saves 2.1 %
    assert one == pytest.approx(13.79 * (1 - 0.021), rel=0.005)
    # both share what comes before the first cross-attention: 4.1 % of two evaluations
    assert two == pytest.approx(2 * 13.79 * (1 - 0.021 - 0.041), rel=0.01)
    # at most the plain decoder's 161
    assert 100 < decoder_gflop(decoder, (3, 32, 32)) < 162


def test_an_onnx_network_takes_the_operations_of_its_torch_original(tmp_path):
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2, padding=1),
        torch.nn.Conv2d(8, 8, 3, groups=4),
        torch.nn.ConvTranspose2d(8, 4, 4, stride=2),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 30 * 30, 5),
    ).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.zeros(1, 3, 32, 32),),
            tmp_path / "small.onnx",
            input_names=["images"],
            dynamic_axes={"images": {0: "batch"}},
            dynamo=False,
        )
    assert onnx_gflop(tmp_path / "small.onnx", 32) == pytest.approx(
        module_gflop(network.to("meta"), (3, 32, 32))
    )


def test_the_demo_packs_networks_can_be_counted():
    assert 0.1 < onnx_gflop(DEMO / "faces/detector.onnx", 128) < 0.2
    assert onnx_gflop(DEMO / "faces/detector.onnx", 256) == pytest.approx(
        4 * onnx_gflop(DEMO / "faces/detector.onnx", 128), rel=0.01
    )


def test_the_assumed_recogniser_is_a_resnet_100():
    with torch.device("meta"):
        network = build_backbone({"family": "iresnet", "layers": (3, 13, 30, 3)})
    assert module_gflop(network, (3, 112, 112)) == pytest.approx(JUDGE_GFLOP, rel=0.02)


# -- bytes ------------------------------------------------------------------------------------------------


def test_bytes_on_disk_are_those_of_a_real_build(tmp_path):
    build = BuildConfig.model_validate(
        {
            "name": "real",
            "identities": 6,
            "images": 8,
            "block_identities": 3,
            "block_images": 8,
            "contexts": {"source": "file", "file": str(DEMO / "contexts/heldout.npz")},
            "samples": {"generator": str(DEMO / "generator"), "steps": 3},
        }
    )
    specs = make(build, tmp_path)
    for name in ("samples", "aligned", "embeddings"):
        folder = Path(specs[name].directory)
        files = [path for path in folder.rglob("*") if path.is_file()]
        units = [path for path in files if path.parent.name in ("rows", "done") or path.name.startswith("c.")]
        size = size_of(specs[name])
        assert sum(path.stat().st_size for path in units) == pytest.approx(size.bytes, rel=BYTES_TOLERANCE), (
            name
        )
        assert (size.units, size.done, size.rows) == (2, 2, 48)


def test_what_is_done_is_read_from_the_store(tiny_build, tmp_path):
    specs = make(tiny_build, tmp_path, stages=("contexts", "negatives"))
    sizes = {name: size_of(spec) for name, spec in specs.items()}
    assert {name: size.done for name, size in sizes.items() if size.done} == {"contexts": 1, "negatives": 1}
    assert sizes["samples"].units == 6
    assert sizes["samples"].rows == 24, "the last blocks are filled"


def test_assumed_stages_are_those_of_a_real_plan_but_for_the_widths(tiny_build, tmp_path):
    build = changed(tiny_build, negatives__count=3)
    real = make(build, tmp_path, stages=())
    for assumed in assumed_specs(build, str(tmp_path)):
        spec = real[assumed.name]
        assert assumed.grid.units() == spec.grid.units()
        assert assumed.per_replicate == spec.per_replicate
        assert [array.name for array in assumed.arrays] == [array.name for array in spec.arrays]
        assert assumed.columns == spec.columns
        prepare(assumed)  # a directory can be made of it: arrays and columns are whole


# -- time -------------------------------------------------------------------------------------------------

WORK = [
    Work("samples", "unet", 1000.0, units=10, on_device=True),
    Work("aligned", "detect", 100.0, units=10),
    Work("evaluation", "score", 10.0, units=1),
]
RATES = {"unet": Rate(10.0, 0.1), "detect": Rate(10.0), "score": Rate(1.0)}


def test_time_on_cpus_is_shared_among_workers_as_far_as_units_go():
    found = estimate(WORK, RATES, devices=0, workers=4)
    assert found.cpu.seconds == pytest.approx(100 + 10 + 10)
    assert found.wall.seconds == pytest.approx(100 / 4 + 10 / 4 + 10)
    assert found.device.seconds == 0
    assert estimate(WORK, RATES, devices=0, workers=100).wall.seconds == pytest.approx(10 + 1 + 10)


def test_beside_a_gpu_the_slower_side_decides():
    found = estimate(WORK, RATES, devices=2, workers=4)
    assert (found.device.seconds, found.cpu.seconds) == (100, 20)
    assert found.wall.seconds == pytest.approx(50)
    slow = estimate(WORK, {**RATES, "unet": Rate(1e9)}, devices=2, workers=4)
    assert slow.wall.seconds == pytest.approx(10 / 4 + 10)


def test_the_uncertainty_is_the_spread_and_what_is_not_modelled():
    span = estimate(WORK[:1], RATES, devices=0, workers=1).wall
    assert span.low == pytest.approx(100 / 1.1)
    assert span.high == pytest.approx(100 * 1.1 * (1 + NOT_MODELLED))


def test_work_without_a_rate_is_named_and_counted_nowhere():
    found = estimate(WORK, {"unet": Rate(10.0)}, devices=1, workers=1)
    assert found.missing == ("aligned", "evaluation")
    assert (found.wall.seconds, found.cpu.seconds) == (100, 0)
    assert estimate([Work("aligned", "detect", 0.0, 0)], {}, 1, 1).missing == ()


def test_a_rate_is_the_median_with_half_the_range_of_its_repeats():
    assert rate_of(6.0, [3.0, 2.0, 2.4]) == Rate(2.5, pytest.approx(0.5 / 2.4))


def test_a_calibration_gives_the_rates_of_the_network_nearest_in_size():
    small, large = (
        NetworkRates("fp32", size, Rate(value), Rate(value)) for size, value in ((0.3, 30.0), (13.5, 90.0))
    )
    calibration = Calibration("a machine", "timed", False, (small, large), {"write": Rate(5.0)})
    assert calibration.with_network("fp32", 1.0)["unet"].value == 30
    assert calibration.with_network("fp32", 4.0)["decoder"].value == 90
    assert calibration.with_network("fp32", 4.0)["write"].value == 5
    with pytest.raises(ConfigError, match=r"no rates .* bf16, only for fp32"):
        calibration.with_network("bf16", 1.0)


def test_what_an_evaluation_takes_besides_its_scores_is_counted_or_said(tiny_build, tmp_path):
    build = changed(tiny_build, identities=100, images=30)  # enough to score in bands
    networks, specs = networks_of(build), describe_build(build, str(tmp_path))
    work = work_of(build, specs, sizes_of(specs, networks), networks)
    assert not any(part.on_device for part in work if part.rate in ("detect", "embed"))
    on_gpu = work_of(build, specs, sizes_of(specs, networks), networks, faces_on_gpu=True)
    assert {part.rate for part in on_gpu if part.on_device} == {"unet", "decoder", "detect", "embed"}
    strays = [part.amount for part in work if part.stage == "evaluation"]
    assert strays == [4 * 100**2 * 30 * 16 / 1e9]
    assert "10 draws for the intervals, at most 1 min" in not_counted(build)
    assert not any("draws" in words for words in not_counted(changed(build, evaluation__bootstrap=0)))

"""Training of the first stage and of the generator: resumption, what is saved, which contexts are drawn."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from negfacediff_core.contexts import normalise
from negfacediff_core.diffusion.checkpoint import load_generator
from negfacediff_core.diffusion.first_stage import FirstStageSettings, VQDecoder, VQEncoder
from negfacediff_core.diffusion.train import (
    DEMO_DIFFUSION,
    DEMO_NETWORK,
    GeneratorTraining,
    export_generator,
    load_trained,
    train_generator,
)
from negfacediff_core.diffusion.train_first_stage import (
    CodebookStatistics,
    FirstStageTraining,
    fold_normalisation,
    latent_moments,
    load_first_stage,
    train_first_stage,
)
from negfacediff_core.diffusion.training import CHECKPOINT_NAME, cosine_rate, seeded, to_planes
from negfacediff_core.diffusion.training_set import (
    ContextDraws,
    TrainingSet,
    draw_batch,
    encode_latents,
    identity_means,
)
from negfacediff_core.errors import ConfigError, NegFaceDiffError, WeightsError

WIDTH = 32
ARCHITECTURE = FirstStageSettings(ch=32, ch_mult=(1, 1), num_res_blocks=0, n_embed=32)
FIRST_STAGE = FirstStageTraining(
    steps=8, batch_size=4, warmup=2, revive_every=2, record_every=2, checkpoint_every=3
)
NETWORK = {
    **DEMO_NETWORK,
    "initial_channels": 32,
    "channel_multipliers": [1, 1],
    "is_attention": [False, True],
    "context_input_channels": WIDTH,
    "context_channels": 32,
}
TRAINING = GeneratorTraining(
    steps=7, batch_size=4, warmup=2, record_every=2, checkpoint_every=3, evaluate_every=5
)


class Interrupted(Exception):
    """Stands for Ctrl-C in the middle of a training."""


def interrupt_at(last):
    def progress(step, steps, loss):
        if step == last:
            raise Interrupted

    return progress


@pytest.fixture(scope="module")
def images():
    """Six "identities" with four images of 16 pixels: smooth random pictures."""
    coarse = torch.rand(24, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, size=16, mode="bilinear")
    return (fine * 255).to(torch.uint8).permute(0, 2, 3, 1).reshape(6, 4, 16, 16, 3).numpy()


@pytest.fixture(scope="module")
def first_stage(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first_stage")
    flat = images.reshape(-1, 16, 16, 3)
    train_first_stage(flat[:20], flat[20:], folder, FIRST_STAGE, ARCHITECTURE)
    return folder


@pytest.fixture(scope="module")
def data(images, first_stage):
    encoder, _, _ = load_first_stage(first_stage)
    contexts = np.random.default_rng(0).standard_normal((6, 4, WIDTH))
    unit = normalise(contexts.reshape(-1, WIDTH)).reshape(contexts.shape)
    return TrainingSet(encode_latents(encoder, images), torch.from_numpy(unit))


def train(data, first_stage, folder, training=TRAINING, progress=None):
    _, decoder, _ = load_first_stage(first_stage)
    pictured = {"some": identity_means(data.contexts.numpy())[:2]}
    return train_generator(data, data, decoder, pictured, folder, training, NETWORK, DEMO_DIFFUSION, progress)


@pytest.fixture(scope="module")
def generator(data, first_stage, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generator")
    train(data, first_stage, folder)
    return folder


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_interrupted_first_stage_ends_as_uninterrupted(images, first_stage, tmp_path):
    flat = images.reshape(-1, 16, 16, 3)
    arguments = (flat[:20], flat[20:], tmp_path, FIRST_STAGE, ARCHITECTURE)
    with pytest.raises(Interrupted):
        train_first_stage(*arguments, interrupt_at(5))
    train_first_stage(*arguments)
    whole, resumed = (torch.load(f / "first_stage.pt", weights_only=True) for f in (first_stage, tmp_path))
    assert_same_weights(whole["encoder"], resumed["encoder"])
    assert_same_weights(whole["decoder"], resumed["decoder"])


def test_interrupted_generator_ends_as_uninterrupted(data, first_stage, generator, tmp_path):
    with pytest.raises(Interrupted):
        train(data, first_stage, tmp_path, progress=interrupt_at(5))
    steps = []
    train(data, first_stage, tmp_path, progress=lambda step, total, loss: steps.append(step))
    assert steps == [4, 5, 6, 7]  # the last checkpoint before the interruption was at step 3
    whole, resumed = (torch.load(f / CHECKPOINT_NAME, weights_only=True) for f in (generator, tmp_path))
    assert_same_weights(whole["average"], resumed["average"])
    assert_same_weights(whole["live"], resumed["live"])
    assert whole["curve"] == resumed["curve"]


def test_training_leaves_the_global_generator_alone(data, first_stage, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(data, first_stage, tmp_path, dataclasses.replace(TRAINING, steps=2))
    assert torch.equal(torch.rand(3), expected)


def test_other_settings_are_refused(data, first_stage, generator):
    with pytest.raises(ConfigError, match="its training differ"):
        train(data, first_stage, generator, dataclasses.replace(TRAINING, seed=9))


def test_damaged_checkpoint_is_refused(data, first_stage, tmp_path):
    (tmp_path / CHECKPOINT_NAME).write_bytes(b"PK not a checkpoint")
    with pytest.raises(WeightsError, match="cannot be read"):
        train(data, first_stage, tmp_path)


def test_sets_of_another_width_are_refused(data, first_stage, tmp_path):
    narrow = TrainingSet(data.latents, data.contexts[..., :8])
    with pytest.raises(ConfigError, match="contexts of width 32"):
        train(narrow, first_stage, tmp_path)


def test_divergence_stops_the_training(data, first_stage, tmp_path):
    broken = TrainingSet(torch.full_like(data.latents, float("nan")), data.contexts)
    with pytest.raises(NegFaceDiffError, match="diverged at step 0"):
        train(broken, first_stage, tmp_path)


def test_curve_and_pictures_are_written(generator):
    rows = (generator / "curve.csv").read_text().splitlines()
    assert rows[0] == "step,loss,held_out_loss"
    assert [row.split(",")[0] for row in rows[1:]] == ["2", "4", "5", "6", "7"]
    assert {p.name for p in generator.glob("samples-*.png")} == {"samples-000005.png", "samples-000007.png"}


def test_exported_generator_loads_and_samples(data, first_stage, generator, tmp_path):
    export_generator(generator, first_stage, tmp_path)
    loaded = load_generator(tmp_path, with_encoder=True)
    assert loaded.latent_shape == (3, 8, 8)
    assert loaded.image_size == 16
    assert loaded.context_width == WIDTH
    trained, _ = load_trained(generator)
    for key, value in loaded.unet.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, trained.state_dict()[key], rtol=1e-3, atol=1e-6)
    with torch.inference_mode():
        contexts = data.contexts[:2, 0]
        eps = loaded.unet(torch.randn(2, 3, 8, 8), torch.tensor([10]), contexts)
        assert loaded.decoder(eps).shape == (2, 3, 16, 16)
        assert torch.isfinite(eps).all()


def test_average_lies_behind_the_live_weights(generator):
    state = torch.load(generator / CHECKPOINT_NAME, weights_only=True)
    moved = [not torch.equal(state["average"][key], value) for key, value in state["live"].items()]
    assert any(moved)


def test_folding_normalises_latents_and_changes_no_decode(images):
    flat = images.reshape(-1, 16, 16, 3)
    with seeded(3, 0):
        encoder, decoder = VQEncoder(ARCHITECTURE).eval(), VQDecoder(ARCHITECTURE).eval()
        torch.nn.init.normal_(decoder.quantize.embedding.weight)
    batch = to_planes(flat)
    with torch.inference_mode():
        mean, deviation = latent_moments(encoder, flat)
        normalised = (encoder(batch) - mean[:, None, None]) / deviation[:, None, None]
        before = decoder(normalised)
        fold_normalisation(encoder.quant_conv, mean, deviation)
        latents = encoder(batch)
        torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(decoder(latents, quantize=True), before, atol=1e-4, rtol=0)


def test_trained_latents_are_normalised(images, first_stage):
    encoder, _, figures = load_first_stage(first_stage)
    mean, deviation = latent_moments(encoder, images.reshape(-1, 16, 16, 3)[:20])
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(deviation, torch.ones(3), atol=1e-4, rtol=0)
    assert figures["psnr"] > 5


def test_codes_become_the_means_of_their_latents():
    codes = torch.nn.Embedding(3, 2).requires_grad_(False)
    statistics = CodebookStatistics(3, 2)
    latents = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 5.0]])
    with seeded(0, 0):
        statistics.start(codes, latents)
    for _ in range(60):
        statistics.update(codes, latents, torch.tensor([0, 0, 1]), decay=0.5)
    torch.testing.assert_close(codes.weight[:2], torch.tensor([[1.0, 0.0], [5.0, 5.0]]))


def test_unused_codes_are_revived_at_latents():
    codes = torch.nn.Embedding(4, 2).requires_grad_(False)
    statistics = CodebookStatistics(4, 2)
    latents = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 5.0]])
    with seeded(0, 0):
        statistics.start(codes, torch.full((1, 2), 90.0))
        for _ in range(60):
            statistics.update(codes, latents, torch.tensor([0, 0, 1]), decay=0.5)
        statistics.revive(codes, latents, share=0.02)
    assert all(any(torch.equal(code, latent) for latent in latents) for code in codes.weight[2:])
    torch.testing.assert_close(codes.weight[0], torch.tensor([1.0, 0.0]))


@settings(max_examples=20, deadline=None)
@given(reach=st.floats(0, 4), own=st.floats(0, 1), seed=st.integers(0, 1000))
def test_drawn_contexts_are_unit_and_near_their_identity(reach, own, seed):
    width, identities = 128, 5
    means = torch.eye(identities, width)
    data = TrainingSet(torch.zeros(identities, 2, 2, 1, 1, 1), means[:, None].repeat(1, 2, 1))
    with seeded(seed, 0):
        batch = draw_batch(data, means, 16, ContextDraws(own, perturbed=1.0, reach=reach, empty=0.0))
    torch.testing.assert_close(batch.contexts.norm(dim=1), torch.ones(16))
    nearest = (batch.contexts @ means.T).amax(dim=1)
    assert (nearest > 1 / (1 + reach**2) ** 0.5 - 0.35).all()
    assert not batch.empty.any()


def test_shares_of_the_draws():
    data = TrainingSet(torch.zeros(1, 2, 2, 1, 1, 1), torch.eye(2)[None])
    means = torch.tensor([[0.5**0.5, 0.5**0.5]])
    with seeded(0, 0):
        batch = draw_batch(data, means, 20_000, ContextDraws(own_image=0.3, perturbed=0.0, empty=0.2))
    own = (batch.contexts.amax(dim=1) > 0.99).float().mean().item()
    assert own == pytest.approx(0.3, abs=0.02)
    assert batch.empty.float().mean().item() == pytest.approx(0.2, abs=0.02)


def test_learning_rate_rises_then_falls():
    rates = [cosine_rate(step, 100, 10) for step in range(100)]
    assert rates[9] == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.01, abs=0.01)

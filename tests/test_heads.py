"""Margin heads against reference outputs, and their limits."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from negfacediff_core.recognition.backbones import build_backbone
from negfacediff_core.recognition.classifier import MarginHead
from negfacediff_core.recognition.heads import (
    MARGINS,
    adaface,
    arcface,
    cosface,
    cosines,
    elastic_margins,
    elasticface,
    update_norm_statistics,
)

REFERENCE = np.load(Path(__file__).parent / "data" / "fr_losses.npz")


def _reference(key: str) -> torch.Tensor:
    return torch.from_numpy(REFERENCE[key])


def _ada(cosine: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    norms = _reference("features_raw").norm(dim=1, keepdim=True)
    mean, deviation = update_norm_statistics(norms, torch.tensor(20.0), torch.tensor(100.0), rate=1.0)
    return adaface(cosine, labels, norms, mean, deviation)


CASES = {
    "cos": cosface,
    "arc": arcface,
    "elastic": lambda cosine, labels: elasticface(cosine, labels, _reference("elastic/margin_draw")),
    "ada/raw_norms": _ada,
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_loss_equal_the_reference(case: str) -> None:
    labels = _reference("labels")
    logits = CASES[case](cosines(_reference("features_raw"), _reference("kernel").T), labels)
    torch.testing.assert_close(logits, _reference(f"{case}/logits"), atol=1e-4, rtol=0)
    assert F.cross_entropy(logits, labels).item() == pytest.approx(float(REFERENCE[f"{case}/loss"]), abs=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_reference(case: str) -> None:
    labels = _reference("labels")
    features = _reference("features_normalised").requires_grad_()
    centres = _reference("kernel").T.contiguous().requires_grad_()
    F.cross_entropy(CASES[case](cosines(features, centres), labels), labels).backward()
    torch.testing.assert_close(centres.grad.T, _reference(f"{case}/grad_kernel"), atol=1e-4, rtol=0)
    unit = features.detach()
    expected = _reference(f"{case}/grad_features")
    # Cosines do not change with the length of a feature. One reference head takes unit features as given:
    # its gradient has a part along them too, which a normalisation before it removes.
    expected = expected - (expected * unit).sum(1, keepdim=True) * unit
    torch.testing.assert_close(features.grad, expected, atol=1e-4, rtol=0)


@given(st.sampled_from(sorted(MARGINS)), st.integers(0, 2**31), st.floats(0.01, 1.0))
@settings(max_examples=40, deadline=None)
def test_a_margin_lowers_the_target_alone(name: str, seed: int, margin: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    cosine = torch.rand(5, 7, generator=generator) * 1.9 - 0.95
    # ArcFace lowers the logit only while the angle with its margin stays under half a turn.
    cosine = cosine.clamp(min=-0.5)
    labels = torch.randint(0, 7, (5,), generator=generator)
    change = MARGINS[name](cosine, labels, 10.0, margin) - 10 * cosine
    target = F.one_hot(labels, 7).bool()
    assert (change[target] < 0).all()
    assert (change[~target] == 0).all()


@pytest.mark.parametrize("name", MARGINS)
def test_gradients_stay_finite_at_the_ends(name: str) -> None:
    cosine = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], requires_grad=True)
    MARGINS[name](cosine, torch.tensor([0, 0]), 64.0, 0.5).sum().backward()
    assert torch.isfinite(cosine.grad).all()


def test_cosines_ignore_length_and_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(4, 8, generator=generator)
    centres = torch.randn(3, 8, generator=generator)
    plain = cosines(embeddings, centres)
    torch.testing.assert_close(cosines(embeddings * 7, centres * 0.2), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cosines(embeddings, centres), plain)


def test_elastic_margins_follow_their_distribution() -> None:
    draws = elastic_margins(20_000, torch.Generator().manual_seed(1), mean=0.3, deviation=0.05)
    assert draws.shape == (20_000, 1)
    assert draws.mean().item() == pytest.approx(0.3, abs=0.002)
    assert draws.std().item() == pytest.approx(0.05, abs=0.002)


def test_adaface_asks_more_angle_of_poor_images_and_more_distance_of_good_ones() -> None:
    cosine = torch.full((2, 3), 0.5)
    labels = torch.tensor([0, 0])
    norms = torch.tensor([[1.0], [99.0]])
    statistics = torch.tensor(50.0), torch.tensor(10.0)
    poor, good = adaface(cosine, labels, norms, *statistics, scale=1.0)[:, 0].tolist()
    assert poor == pytest.approx(np.cos(np.pi / 3 + 0.4), abs=1e-5)
    assert good == pytest.approx(np.cos(np.pi / 3 - 0.4) - 0.8, abs=1e-5)


@pytest.mark.parametrize("kind", ["elasticface", "adaface"])
def test_evaluation_neither_draws_margins_nor_learns_from_norms(kind: str) -> None:
    head = MarginHead(kind, 8, 5, 16.0, 0.3, seed=0)
    embeddings = 3 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3])

    def probability(seed: int) -> torch.Tensor:
        return head(embeddings, labels, torch.Generator().manual_seed(seed)).log_probability

    before = {name: value.clone() for name, value in head.named_buffers()}
    head.eval()
    assert torch.equal(probability(1), probability(2))
    assert all(torch.equal(value, before[name]) for name, value in head.named_buffers())
    head.train()
    assert not torch.equal(probability(1), probability(2))


@pytest.mark.parametrize(
    "architecture",
    [
        {"family": "iresnet", "layers": [1], "channels": [8], "width": 16, "input_pool": 8},
        {"family": "plain", "layers": [1], "channels": [8], "neck": 4, "width": 16, "input_pool": 8},
    ],
    ids=lambda architecture: architecture["family"],
)
def test_the_last_layers_are_float32_under_autocast(architecture: dict) -> None:
    network = build_backbone(architecture).eval()
    seen = []
    network.fc.register_forward_hook(lambda layer, given, found: seen.extend([given[0], found]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        embeddings = network(torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0)))
    assert {each.dtype for each in (*seen, embeddings)} == {torch.float32}
    torch.testing.assert_close(seen[1], F.linear(seen[0], network.fc.weight, network.fc.bias))

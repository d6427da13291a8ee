import pytest
import torch
from diffusion_reference import TINY_MODEL, randomised
from hypothesis import given
from hypothesis import strategies as st

from negfacediff_core.diffusion.guidance import WEIGHTS, negative_guidance
from negfacediff_core.diffusion.samplers import ddim
from negfacediff_core.diffusion.schedule import linear
from negfacediff_core.diffusion.unet import ConditionalUNet

T = 1000


class CountingUNet(ConditionalUNet):
    """Counts the rows that the network evaluates, and its passes."""

    rows = 0
    passes = 0

    def forward(self, x, *arguments):
        self.rows += len(x)
        self.passes += 1
        return super().forward(x, *arguments)


@pytest.fixture
def unet():
    return randomised(CountingUNet(**TINY_MODEL))


@pytest.fixture
def latents():
    numbers = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, *shape, generator=numbers) for shape in ((3, 8, 8), (16,), (16,)))


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("t", [0, 250, 999])
@torch.inference_mode()
def test_guidance_is_the_published_combination(unet, latents, weight, t):
    x, context, negative = latents
    w = 0.8
    w_t = {"constant": w, "adaptive": w * (1 - t / T), "reverse": w * t / T}[weight]
    time = torch.tensor([t, t])
    expected = (1 + w_t) * unet(x, time, context) - w_t * unet(x, time, negative)
    projected, away = unet.project_context(context), unet.project_context(negative)
    found = negative_guidance(unet, projected, away, WEIGHTS[weight](w, T))(x, t)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_the_null_negative_is_the_zero_vector_and_not_the_empty_context(unet, latents):
    x, context, _ = latents
    projected = unet.project_context(context)
    guide = [
        negative_guidance(unet, projected, negative, WEIGHTS["constant"](0.5, T))(x, 400)
        for negative in (unet.project_context(torch.zeros(2, 16)), unet.project_empty(2))
    ]
    assert not torch.allclose(guide[0], guide[1], atol=1e-3)


@torch.inference_mode()
def test_the_negative_pass_is_made_only_where_it_weighs(unet, latents):
    x, context, negative = latents
    projected, away = unet.project_context(context), unet.project_context(negative)

    def evaluations(weight, w, negative, steps=10):
        unet.rows = unet.passes = 0
        ddim(negative_guidance(unet, projected, negative, WEIGHTS[weight](w, T)), x, linear(T), None, steps)
        return unet.rows, unet.passes

    assert evaluations("constant", 0.5, away) == (40, 10)
    assert evaluations("constant", 0.0, away) == (20, 10)
    assert evaluations("constant", 0.5, None) == (20, 10)
    # the reverse weight vanishes at t = 0, the last of the ten timesteps
    assert evaluations("reverse", 0.5, away) == (38, 10)


@torch.inference_mode()
def test_a_zero_weight_is_plain_conditioning_bit_for_bit(unet, latents):
    x, context, negative = latents
    projected, away = unet.project_context(context), unet.project_context(negative)
    guided = negative_guidance(unet, projected, away, WEIGHTS["constant"](0.0, T))(x, 321)
    assert torch.equal(guided, unet(x, torch.tensor([321]), projected))


@given(st.floats(0, 10), st.integers(0, T - 1))
def test_weights_stay_between_zero_and_w(w, t):
    weights = {name: weight(w, T)(t) for name, weight in WEIGHTS.items()}
    assert all(0 <= value <= w for value in weights.values())
    assert weights["constant"] == w
    assert weights["adaptive"] + weights["reverse"] == pytest.approx(w)

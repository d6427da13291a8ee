import math

import pytest
import torch
from diffusion_reference import TINY_MODEL, randomised
from hypothesis import given
from hypothesis import strategies as st

from negfacediff_core.diffusion.blocks import ProjectedContext
from negfacediff_core.diffusion.guidance import WEIGHTS, Term, guided, parse_curve, weight_over_time
from negfacediff_core.diffusion.samplers import SAMPLERS, ddim
from negfacediff_core.diffusion.schedule import linear
from negfacediff_core.diffusion.unet import ConditionalUNet
from negfacediff_core.errors import ConfigError

T = 1000
ALL = torch.ones(2)


class CountingUNet(ConditionalUNet):
    """Counts the rows that the network evaluates, and its passes."""

    rows = 0
    passes = 0

    def forward(self, *arguments):
        eps = super().forward(*arguments)
        self.rows += len(eps)
        self.passes += 1
        return eps


@pytest.fixture
def unet():
    return randomised(CountingUNet(**TINY_MODEL))


@pytest.fixture
def latents():
    """Latents, and three contexts a row."""
    numbers = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, *shape, generator=numbers) for shape in ((3, 8, 8), (16,), (16,), (16,)))


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("t", [0, 250, 999])
@torch.inference_mode()
def test_one_negative_is_the_published_combination(unet, latents, weight, t):
    x, context, negative, _ = latents
    w = 0.8
    w_t = {"constant": w, "adaptive": w * (1 - t / T), "reverse": w * t / T}[weight]
    time = torch.tensor([t, t])
    expected = (1 + w_t) * unet(x, time, context) - w_t * unet(x, time, negative)
    term = Term(unet.project_context(negative), weight_over_time(w, T, WEIGHTS[weight]), ALL)
    found = guided(unet, unet.project_context(context), [term])(x, t)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_several_negatives_share_the_weight_and_the_empty_context_has_its_own(unet, latents):
    x, context, first, second = latents
    time = torch.tensor([300])
    plain, a, b, empty = (unet(x, time, c) for c in (context, first, second, None))
    shares = torch.tensor([[0.75, 0.25], [0.4, 0.6]])
    w, cfg = 0.5, 1.5
    column = shares[:, :, None, None, None]
    expected = plain + w * (plain - column[:, 0] * a - column[:, 1] * b) + cfg * (plain - empty)
    weight = weight_over_time(w, T)
    terms = [
        Term(unet.project_context(first), weight, shares[:, 0]),
        Term(unet.project_context(second), weight, shares[:, 1]),
        Term(unet.project_empty(2), weight_over_time(cfg, T), ALL),
    ]
    found = guided(unet, unet.project_context(context), terms)(x, 300)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_the_null_negative_is_the_zero_vector_and_not_the_empty_context(unet, latents):
    x, context, _, _ = latents
    projected = unet.project_context(context)
    null, empty = (
        guided(unet, projected, [Term(negative, weight_over_time(0.5, T), ALL)])(x, 400)
        for negative in (unet.project_context(torch.zeros(2, 16)), unet.project_empty(2))
    )
    assert not torch.allclose(null, empty, atol=1e-3)


@torch.inference_mode()
def test_the_network_is_evaluated_only_where_a_term_weighs(unet, latents):
    x, context, negative, other = latents
    projected = unet.project_context(context)
    away, further = unet.project_context(negative), unet.project_context(other)

    def evaluations(*weights, steps=10):
        unet.rows = unet.passes = 0
        terms = [Term(a, weight, ALL) for a, weight in zip((away, further), weights, strict=False)]
        ddim(guided(unet, projected, terms), x, linear(T), None, steps)
        return unet.rows, unet.passes

    constant, nothing = weight_over_time(0.5, T), weight_over_time(0.0, T)
    assert evaluations() == (20, 10)
    assert evaluations(constant) == (40, 10)
    assert evaluations(constant, constant) == (60, 10)
    assert evaluations(nothing) == (20, 10)
    assert evaluations(nothing, constant) == (40, 10)
    # the reverse weight vanishes at t = 0, the last of the ten timesteps 0, 100, ..., 900
    assert evaluations(weight_over_time(0.5, T, WEIGHTS["reverse"])) == (38, 10)
    # in an interval lie 200, ..., 600; on a curve with a jump 600, ..., 900
    assert evaluations(weight_over_time(0.5, T, interval=(0.2, 0.6))) == (30, 10)
    assert evaluations(weight_over_time(0.5, T, parse_curve("0:0 0.6:0 0.6:1 1:1"))) == (28, 10)


@torch.inference_mode()
def test_a_zero_weight_is_plain_conditioning_bit_for_bit(unet, latents):
    x, context, negative, _ = latents
    projected = unet.project_context(context)
    term = Term(unet.project_context(negative), weight_over_time(0.0, T), ALL)
    assert torch.equal(guided(unet, projected, [term])(x, 321), unet(x, torch.tensor([321]), projected))


class GaussianModel:
    """The exact noise prediction where context m is the mean of Gaussian data of one covariance."""

    def __init__(self, schedule, covariance):
        self.alpha_bars = schedule.alpha_bars
        self.covariance = covariance

    def __call__(self, x, t, context):
        ab = self.alpha_bars[t]
        (mean,) = context.parts["mean"]
        x = x.repeat(len(mean) // len(x), 1, 1, 1)
        spread = ab * self.covariance + (1 - ab) * torch.eye(len(self.covariance), dtype=x.dtype)
        centred = x[:, :, 0, 0] - ab.sqrt() * mean
        return ((1 - ab).sqrt() * torch.linalg.solve(spread, centred.T).T)[:, :, None, None]


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("ddpm", {}),
        ("ddim", {"steps": 1000, "eta": 1.0}),
        ("ddim", {"steps": 250}),
        ("dpm_solver", {"steps": 100}),
        ("dpm_solver_2s", {"steps": 100}),
    ],
)
@pytest.mark.parametrize("w", [0.0, 0.5])
def test_guided_samples_of_gaussian_data_have_the_mean_and_covariance_of_the_formula(sampler, options, w):
    """Guidance with w away from means m_j shifts the mean to m + w (m - sum_j u_j m_j), nothing else.

    For data of one covariance the scores differ by constants, so that the guided score is exactly that of a
    Gaussian with the shifted mean.
    """
    schedule, count = linear(1000), 4000
    covariance = torch.tensor([[0.5, 0.2, 0.0], [0.2, 0.3, -0.1], [0.0, -0.1, 0.2]], dtype=torch.float64)
    own, near, far = (
        torch.tensor(m, dtype=torch.float64) for m in ([1.0, -0.5, 0.0], [0.5, 0.0, 0.2], [-1.0, 1.0, 0.4])
    )
    shares = (0.25, 0.75)
    numbers = torch.Generator().manual_seed(7)

    def noise(t):
        return torch.randn(count, 3, 1, 1, generator=numbers, dtype=torch.float64)

    def rows(mean):
        return ProjectedContext({"mean": (mean.expand(count, 3),)})

    weight = weight_over_time(w, schedule.T)
    terms = [
        Term(rows(mean), weight, torch.full((count,), share, dtype=torch.float64))
        for mean, share in zip((near, far), shares, strict=True)
    ]
    eps_model = guided(GaussianModel(schedule, covariance), rows(own), terms)
    found = SAMPLERS[sampler].sample(eps_model, noise(schedule.T), schedule, noise, **options)[:, :, 0, 0]
    expected = own + w * (own - shares[0] * near - shares[1] * far)
    standard_error = covariance.diagonal().sqrt() / math.sqrt(count)
    assert ((found.mean(dim=0) - expected).abs() < 4 * standard_error + 0.01).all()
    assert torch.allclose(torch.cov(found.T), covariance, rtol=0, atol=0.06)


@given(st.floats(0, 10), st.integers(0, T - 1))
def test_named_weights_stay_between_zero_and_w(w, t):
    weights = {name: weight_over_time(w, T, curve)(t) for name, curve in WEIGHTS.items()}
    assert all(0 <= value <= w for value in weights.values())
    assert weights["constant"] == w
    assert weights["adaptive"] == pytest.approx(w * (1 - t / T))
    assert weights["reverse"] == pytest.approx(w * t / T)


def test_a_curve_is_linear_between_its_points_and_the_later_of_two_holds():
    weight = weight_over_time(2.0, T, parse_curve("0:1 0.25:0.5 0.25:0 0.5:0 1:1"))
    assert [weight(t) for t in (0, 125, 249)] == pytest.approx([2.0, 1.5, 1.004])
    assert [weight(t) for t in (250, 400, 500)] == [0.0, 0.0, 0.0]
    assert weight(750) == pytest.approx(1.0)


def test_an_interval_includes_its_ends():
    weight = weight_over_time(1.0, T, interval=(0.2, 0.6))
    assert [weight(t) for t in (199, 200, 600, 601)] == [0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0:1",
        "0.1:1 1:0",
        "0:1 0.9:0",
        "0:1 0.6:1 0.4:0 1:0",
        "0:1 1",
        "0:one 1:0",
        "0:nan 1:0",
        "0:-1 1:1",
        "0:1 1:9",
    ],
)
def test_curves_that_make_no_sense_are_refused(text):
    with pytest.raises(ConfigError, match="t/T rising from 0 to 1"):
        parse_curve(text)

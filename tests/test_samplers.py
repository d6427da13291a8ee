import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
)
from diffusion_reference import DATA, reference, reference_unet
from hypothesis import given, settings
from hypothesis import strategies as st

from negfacediff_core.diffusion.guidance import WEIGHTS, Term, guided, weight_over_time
from negfacediff_core.diffusion.samplers import (
    SAMPLERS,
    ddim,
    ddim_timesteps,
    ddpm,
    dpm_solver,
    dpm_solver_2s,
)
from negfacediff_core.diffusion.schedule import cosine, cosine_warped, linear, schedule_from_config
from negfacediff_core.diffusion.spacing import SPACINGS, spaced_timesteps
from negfacediff_core.errors import ConfigError

WEIGHT_NAMES = {"const": "constant", "adaptive": "adaptive", "reverse": "reverse"}
SCHEDULES = {"linear_T1000": linear(1000), "linear_T25": linear(25), "cosine_T1000": cosine(1000)}


def no_noise(t):
    raise AssertionError(f"noise was asked for at t = {t}")


def away_from_the_negative(file, unet, kind, w, T):
    context, negative = (unet.project_context(file.arrays[name]) for name in ("context", "negative_context"))
    weight = weight_over_time(w, T, WEIGHTS[WEIGHT_NAMES[kind]])
    return guided(unet, context, [Term(negative, weight, torch.ones(len(file.arrays["context"])))])


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_the_reference(name):
    with np.load(DATA / "schedules.npz") as file:
        expected = {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(name)}
    found = SCHEDULES[name].buffers()
    assert found.keys() == expected.keys() - {"alphas_prev", "alphas_next"}
    for key, constant in found.items():
        # the reference subtracts alpha-bars near 1 in float32, hence the absolute term
        assert np.allclose(constant.numpy(), expected[key], rtol=2e-6, atol=3e-6), key


def test_schedules_come_from_a_release_configuration():
    assert torch.equal(schedule_from_config({"T": 25, "schedule_type": "linear"}).betas, linear(25).betas)
    options = {"T": 40, "schedule_k": 2, "schedule_beta_min": 0.01, "schedule_beta_max": 0.5}
    warped = schedule_from_config({**options, "schedule_type": "Cosine_Warped"})
    assert torch.equal(warped.betas, cosine_warped(40, 2, 0.01, 0.5).betas)
    # the plain one has neither k nor a lowest beta, whatever the release says
    plain = schedule_from_config({**options, "schedule_type": "cosine"})
    assert torch.equal(plain.betas, cosine(40, 0.5).betas)


@pytest.mark.parametrize("k", [0.5, 1.0, 3.0])
def test_the_warped_cosine_has_its_closed_form(k):
    T, s = 50, 0.008
    angles = [math.pi / 2 * (t / T + s) / (1 + s) ** k for t in range(T + 1)]
    found = cosine_warped(T, k, 0.0, 0.999).alpha_bars
    for t in range(T - 1):  # the last beta is clipped
        assert found[t].item() == pytest.approx((math.cos(angles[t + 1]) / math.cos(angles[0])) ** 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"schedule_type": "sigmoid"},
        {"T": 0},
        {"T": "many"},
        {"schedule_type": "cosine_warped", "schedule_k": float("nan")},
        {"schedule_type": "cosine_warped", "schedule_k": 0},
        {"schedule_type": "cosine_warped", "schedule_k": "2"},
        {"schedule_type": "cosine_warped", "schedule_beta_min": 0.2},
        {"schedule_type": "cosine", "schedule_beta_max": 5},
    ],
)
def test_schedules_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"diffusion\."):
        schedule_from_config(wrong)


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("kind", WEIGHT_NAMES)
@torch.inference_mode()
def test_ddim_equals_the_reference(steps, kind):
    file = reference("ddim_T1000")
    unet = reference_unet(file)
    for form, alpha in (("reference", "paper"), ("textbook", "exact")):
        for w in (0.0, 0.5, 1.0):
            eps_model = away_from_the_negative(file, unet, kind, w, 1000)
            found = ddim(eps_model, file.arrays["x_T"], linear(1000), no_noise, steps, ddim_alpha=alpha)
            expected = file.arrays[f"x0/{form}/steps{steps}/w{w}/{kind}"]
            assert torch.allclose(found, expected, rtol=0, atol=1e-4), (form, w)


@torch.inference_mode()
def test_ddim_visits_the_reference_trajectory_with_and_without_noise():
    file = reference("ddim_T1000")
    unet, x_T = reference_unet(file), file.arrays["x_T"]
    eps_model = away_from_the_negative(file, unet, "const", 0.5, 1000)
    visited = []
    ddim(
        eps_model,
        x_T,
        linear(1000),
        no_noise,
        10,
        0.0,
        "paper",
        lambda done, t, x: visited.append((done, t, x)),
    )
    assert [t for _, t, _ in visited] == file.arrays["steps/reference/steps10/w0.5/const/t"].tolist()
    assert [done for done, _, _ in visited] == list(range(1, 11))
    before = file.arrays["steps/reference/steps10/w0.5/const/x_before_step"]
    for (_, _, x), expected in zip(visited[:-1], before[1:], strict=True):
        assert torch.allclose(x, expected, rtol=0, atol=1e-4)
    for name, context in (
        ("no_negative", unet.project_context(file.arrays["context"])),
        ("context_none", unet.project_empty(len(x_T))),
    ):
        plain = ddim(guided(unet, context), x_T, linear(1000), no_noise, 10, 0.0, "paper")
        assert torch.allclose(plain, file.arrays[f"x0/reference/steps10/{name}"], rtol=0, atol=1e-4), name
    recorded = dict(zip(range(900, -100, -100), file.arrays["noise/steps10/eta0.5"], strict=True))
    noisy = ddim(eps_model, x_T, linear(1000), recorded.__getitem__, 10, 0.5, "paper")
    expected = file.arrays["x0/reference/steps10/w0.5/const/eta0.5"]
    assert torch.allclose(noisy, expected, rtol=0, atol=1e-4)


def ddpm_reference(name, weights, schedule, kinds):
    file = reference(name)
    unet = reference_unet(reference(weights))
    noise = dict(zip(file.arrays["z_t"].tolist(), file.arrays["z"], strict=True))
    for w, kind in kinds:
        eps_model = away_from_the_negative(file, unet, kind, w, schedule.T)
        yield (
            ddpm(eps_model, file.arrays["x_T"], schedule, noise.__getitem__, "paper"),
            file.arrays[f"x0/reference/w{w}/{kind}"],
        )


@torch.inference_mode()
def test_ddpm_equals_the_reference():
    cases = [(w, kind) for w in (0.0, 0.5, 1.0) for kind in WEIGHT_NAMES]
    for found, expected in ddpm_reference("ddpm_T25", "ddpm_T25", linear(25), cases):
        assert torch.allclose(found, expected, rtol=0, atol=2e-3)  # values reach 141


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["const", "reverse"])
@torch.inference_mode()
def test_ddpm_equals_the_reference_over_a_thousand_steps(kind):
    for found, expected in ddpm_reference("ddpm_T1000", "ddim_T1000", linear(1000), [(0.5, kind)]):
        assert torch.allclose(found, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(("final_noise", "last"), [("exact", 1), ("paper", 2)])
def test_ddpm_draws_noise_down_to_its_last_noisy_timestep(final_noise, last):
    drawn = []

    def noise(t):
        drawn.append(t)
        return torch.zeros(1)

    ddpm(lambda x, t: torch.zeros_like(x), torch.ones(1), linear(25), noise, final_noise)
    assert drawn == list(range(24, last - 1, -1))


def gaussian_eps(schedule, mean, deviation):
    """The exact noise prediction where the data are N(mean, deviation^2)."""
    alpha_bars = schedule.alpha_bars.tolist()

    def eps_model(x, t):
        ab = alpha_bars[t]
        return math.sqrt(1 - ab) * (x - math.sqrt(ab) * mean) / (ab * deviation**2 + 1 - ab)

    return eps_model


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver", "dpm_solver_2s"])
@pytest.mark.parametrize("schedule", [linear(1000), cosine(1000)], ids=["linear", "cosine"])
def test_deterministic_samplers_carry_noise_to_gaussian_data(sampler, schedule):
    # the probability flow keeps every point at its quantile of the moving normal distribution
    mean, deviation = 0.7, 0.3
    z = torch.linspace(-3, 3, 13, dtype=torch.float64)
    found = SAMPLERS[sampler].sample(
        gaussian_eps(schedule, mean, deviation), z, schedule, no_noise, steps=500
    )
    ab = schedule.alpha_bars[-1].item()
    exact = mean + deviation * (z - math.sqrt(ab) * mean) / math.sqrt(ab * deviation**2 + 1 - ab)
    assert torch.allclose(found, exact, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [("ddim", {"steps": 1000, "eta": 0.5}), ("ddim", {"steps": 1000, "eta": 1.0}), ("ddpm", {})],
)
def test_noisy_samplers_reach_the_mean_and_spread_of_gaussian_data(sampler, options):
    mean, deviation, count = 0.7, 0.3, 10_000
    numbers = torch.Generator().manual_seed(3)
    schedule = linear(1000)

    def noise(t):
        return torch.randn(count, generator=numbers)

    eps_model = gaussian_eps(schedule, mean, deviation)
    found = SAMPLERS[sampler].sample(eps_model, noise(1000), schedule, noise, **options)
    assert abs(found.mean() - mean) < 0.01
    assert abs(found.std() - deviation) < 0.01


def test_the_published_alpha_leaves_the_trajectory_as_steps_grow():
    schedule, deviation = linear(1000), 3.0
    eps_model, z = gaussian_eps(schedule, 0.0, deviation), torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = {
        (form, steps): (ddim(eps_model, z, schedule, no_noise, steps, ddim_alpha=form) / (deviation * z)).sub(
            1
        )
        for form in ("exact", "paper")
        for steps in (10, 200)
    }
    largest = {case: error.nan_to_num().abs().max() for case, error in errors.items()}
    assert largest["exact", 200] < 0.02 < largest["exact", 10]
    assert largest["paper", 200] > 0.2 > largest["paper", 10]


def wavy_eps(x, t):
    """A smooth stand-in for a network."""
    return 0.8 * x + 0.3 * torch.sin(2 * x + t / 300)


@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_equals_diffusers(steps):
    theirs = DDIMScheduler(
        1000, 1e-4, 0.02, "linear", clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading"
    )
    theirs.set_timesteps(steps)
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = start
    for t in theirs.timesteps.tolist():
        x = theirs.step(wavy_eps(x, t), t, x).prev_sample
    assert torch.allclose(ddim(wavy_eps, start, linear(1000), no_noise, steps), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_noisy_ddim_equals_diffusers(eta):
    theirs = DDIMScheduler(
        1000, 1e-4, 0.02, "linear", clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading"
    )
    theirs.set_timesteps(25)
    numbers = torch.Generator().manual_seed(5)
    start = torch.randn(4, 3, generator=numbers, dtype=torch.float64)
    drawn = {t: torch.randn(4, 3, generator=numbers, dtype=torch.float64) for t in theirs.timesteps.tolist()}
    x = start
    for t, z in drawn.items():
        x = theirs.step(wavy_eps(x, t), t, x, eta=eta, variance_noise=z).prev_sample
    found = ddim(wavy_eps, start, linear(1000), drawn.__getitem__, 25, eta)
    assert torch.allclose(found, x, rtol=0, atol=1e-4)


def test_ddpm_equals_diffusers(monkeypatch):
    theirs = DDPMScheduler(100, 1e-3, 0.2, "linear", variance_type="fixed_large", clip_sample=False)
    numbers = torch.Generator().manual_seed(5)
    start = torch.randn(4, 3, generator=numbers, dtype=torch.float64)
    drawn = {t: torch.randn(4, 3, generator=numbers, dtype=torch.float64) for t in range(99, 0, -1)}
    x = start
    for t in range(99, -1, -1):
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, t=t, **__: drawn[t]
        )
        x = theirs.step(wavy_eps(x, t), t, x).prev_sample
    found = ddpm(wavy_eps, start, linear(100), drawn.__getitem__)
    assert torch.allclose(found, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 5, 15, 20, 27])
@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [(dpm_solver, DPMSolverMultistepScheduler), (dpm_solver_2s, DPMSolverSinglestepScheduler)],
)
def test_dpm_solvers_equal_diffusers(sampler, scheduler, steps, spacing):
    theirs = scheduler(1000, 1e-4, 0.02, "linear", solver_order=2, final_sigmas_type="zero")
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x, visited = start, []
    found = sampler(
        wavy_eps, start, linear(1000), no_noise, steps, spacing, lambda done, t, x: visited.append(t)
    )
    if spacing == "time":
        theirs.set_timesteps(steps)
        assert visited == theirs.timesteps.tolist()
    else:  # their own Karras sigmas lie between the timesteps that a network knows
        theirs.set_timesteps(timesteps=visited)
    for t in theirs.timesteps:
        x = theirs.step(wavy_eps(x, int(t)), t, x).prev_sample
    assert torch.allclose(found, x, rtol=0, atol=1e-3)


@given(st.sampled_from([linear, cosine]), st.sampled_from(list(SPACINGS)), st.integers(25, 1000), st.data())
@settings(max_examples=100, deadline=None)
def test_spaced_timesteps_fall_from_the_noisiest_and_never_meet(schedule, spacing, T, data):
    steps = data.draw(st.integers(1, T))
    alpha_bars = schedule(T).alpha_bars.numpy()
    timesteps = spaced_timesteps(spacing, np.log(alpha_bars / (1 - alpha_bars)) / 2, steps)
    assert len(timesteps) == steps and timesteps[0] == T - 1 and timesteps[-1] >= 0
    assert (np.diff(timesteps) < 0).all()


def test_spacings_step_evenly_in_what_they_say():
    alpha_bars = linear(100_000).alpha_bars.numpy()
    lambdas = np.log(alpha_bars / (1 - alpha_bars)) / 2
    for spacing, measure in (
        ("time", np.arange(100_000.0)),
        ("log_snr", lambdas),
        ("karras", np.exp(-lambdas) ** (1 / 7)),
    ):
        length = np.diff(measure[[*spaced_timesteps(spacing, lambdas, 10), 0]])
        np.testing.assert_allclose(length, length.mean(), rtol=2e-2)


def test_karras_spacing_comes_nearest_on_the_cosine_schedule():
    """Of 20 evaluations, to the exact flow to data in two places, as images of few identities are."""
    schedule, z = cosine(1000), torch.linspace(-2, 2, 40, dtype=torch.float64)

    def eps_model(x, t):
        ab = schedule.alpha_bars[t]
        variance = ab * 0.1**2 + 1 - ab
        away = torch.stack([x - ab.sqrt(), x + ab.sqrt()])
        share = (-away.square() / (2 * variance)).softmax(dim=0)
        return (1 - ab).sqrt() * (share * away).sum(dim=0) / variance

    fine = ddim(eps_model, z, schedule, no_noise, 1000)
    error = {
        name: (dpm_solver(eps_model, z, schedule, no_noise, 20, name) - fine).abs().mean()
        for name in SPACINGS
    }
    assert error["karras"] < error["time"] / 2 and error["log_snr"] < error["time"]


def test_an_unknown_spacing_is_refused():
    with pytest.raises(ConfigError, match="spacing is 'even'; choose one of karras, log_snr, time"):
        dpm_solver(wavy_eps, torch.zeros(1), linear(10), no_noise, 3, "even")


@given(st.integers(1, 300), st.data())
@settings(max_examples=60, deadline=None)
def test_exact_spacing_takes_any_number_of_steps(T, data):
    steps = data.draw(st.integers(1, T))
    timesteps = ddim_timesteps(T, steps)
    assert len(set(timesteps)) == steps and timesteps[0] == 0 and timesteps[-1] < T
    assert max(np.diff(timesteps), default=1) - min(np.diff(timesteps), default=1) <= 1


def test_published_spacing_leads_and_may_take_more_steps():
    assert ddim_timesteps(1000, 30, "paper") == list(range(0, 1000, 33))
    assert len(ddim_timesteps(1000, 30, "paper")) == 31


@pytest.mark.parametrize("steps", [0, 1001])
@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver", "dpm_solver_2s"])
def test_impossible_numbers_of_steps_are_refused(sampler, steps):
    with pytest.raises(ConfigError, match=f"{steps} steps"):
        SAMPLERS[sampler].sample(wavy_eps, torch.zeros(1), linear(1000), no_noise, steps=steps)


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver", "dpm_solver_2s"])
def test_the_table_knows_the_most_steps(sampler):
    sample, _, most_steps = SAMPLERS[sampler]
    most = most_steps(50)
    visited = []
    sample(
        wavy_eps, torch.ones(1), linear(50), no_noise, steps=most, callback=lambda *step: visited.append(step)
    )
    assert len(visited) == most
    with pytest.raises(ConfigError, match=f"{most + 1} steps"):
        sample(wavy_eps, torch.ones(1), linear(50), no_noise, steps=most + 1)


def test_unknown_forms_are_refused():
    with pytest.raises(ConfigError, match="ddim_alpha is 'fast'"):
        ddim(wavy_eps, torch.zeros(1), linear(1000), no_noise, ddim_alpha="fast")
    with pytest.raises(ConfigError, match="final_noise is 'none'"):
        ddpm(wavy_eps, torch.zeros(1), linear(1000), no_noise, final_noise="none")

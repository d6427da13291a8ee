import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusion_reference import TINY_MODEL, randomised

from negfacediff_core.diffusion import engine as engine_module
from negfacediff_core.diffusion.checkpoint import Generator
from negfacediff_core.diffusion.engine import SamplerSettings, SamplingEngine
from negfacediff_core.diffusion.first_stage import FirstStageSettings, VQDecoder
from negfacediff_core.diffusion.guidance import Term, guided, weight_over_time
from negfacediff_core.diffusion.samplers import SAMPLERS, ddim
from negfacediff_core.diffusion.schedule import linear
from negfacediff_core.diffusion.unet import ConditionalUNet
from negfacediff_core.errors import ConfigError, ContextsError
from negfacediff_core.images import to_uint8
from negfacediff_core.noise import gaussian

SETTINGS = SamplerSettings(steps=4, w=0.5)
FIRST_STAGE = FirstStageSettings(ch=32, ch_mult=(1, 2), num_res_blocks=1, n_embed=512)


def make_generator(**model):
    unet = randomised(ConditionalUNet(**TINY_MODEL | model))
    return Generator(
        unet=unet,
        schedule=linear(25),
        decoder=randomised(VQDecoder(FIRST_STAGE)),
        encoder=None,
        latent_shape=(3, 8, 8),
        context_width=unet.context_width if unet.is_context_conditional else 0,
        image_size=16,
        folder=Path("nowhere"),
    )


@pytest.fixture(scope="module")
def generator():
    return make_generator()


@pytest.fixture(scope="module")
def rows():
    """Three identities with three, two and two images, each guided away from the two others."""
    identities, replicates = np.array([0, 0, 0, 1, 1, 2, 2]), np.array([0, 1, 2, 0, 1, 5, 6])
    contexts = np.random.default_rng(1).standard_normal((3, 16)).astype(np.float32)
    others = np.stack([(identities + 1) % 3, (identities + 2) % 3], axis=1)
    shares = np.tile(np.float32([0.7, 0.3]), (7, 1))
    return contexts[identities], contexts[others], shares, identities, replicates


def take(rows, indices):
    return tuple(column[indices] for column in rows)


def assert_close(found, expected):
    """Equal up to batched rounding: a grey level, but for the few pixels where it chose another code."""
    difference = np.abs(found.images.astype(int) - expected.images.astype(int))
    assert (difference > 1).mean() < 0.01
    assert np.allclose(found.clipped, expected.clipped, atol=0.01)


@torch.inference_mode()
def test_images_are_those_of_the_formulas_applied_one_by_one(generator, rows):
    found = SamplingEngine(generator, SETTINGS).sample(*rows, seed=9)
    assert found.images.shape == (7, 16, 16, 3) and found.images.dtype == np.uint8
    assert found.clipped.shape == (7,) and found.clipped.dtype == np.float32
    unet = generator.unet
    for i in (0, 4, 6):
        context, *negatives = (
            unet.project_context(torch.from_numpy(vector[None])) for vector in (rows[0][i], *rows[1][i])
        )
        terms = [
            Term(negative, weight_over_time(0.5, 25), torch.tensor([share]))
            for negative, share in zip(negatives, (0.7, 0.3), strict=True)
        ]
        eps_model = guided(unet, context, terms)
        x_T = gaussian(9, [rows[3][i]], [rows[4][i]], 25, (3, 8, 8))
        decoded = generator.decoder(ddim(eps_model, x_T, generator.schedule, None, 4))
        difference = np.abs(found.images[i].astype(int) - to_uint8(decoded)[0].numpy().astype(int))
        assert (difference > 1).mean() < 0.01
        assert found.clipped[i] == pytest.approx(float((decoded.abs() > 1).float().mean()), abs=0.01)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_batch_size_and_order_change_nothing_but_rounding(generator, rows, sampler):
    settings = SamplerSettings(sampler=sampler, steps=4, eta=0.5)
    whole = SamplingEngine(generator, settings, batch_size=7).sample(*rows, seed=9)
    order = np.array([6, 2, 0, 5, 1, 4, 3])
    mixed = SamplingEngine(generator, settings, batch_size=3).sample(*take(rows, order), seed=9)
    assert_close(mixed, whole._replace(images=whole.images[order], clipped=whole.clipped[order]))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_image_keeps_its_bits_whoever_shares_its_batch(generator, rows, precision):
    engine = SamplingEngine(generator, SETTINGS, batch_size=3, precision=precision)
    whole = engine.sample(*rows, seed=9)
    for others in ([6, 2, 0, 5, 1, 4, 3], [1, 5, 3], [4, 0, 2, 6, 3, 1]):
        some = engine.sample(*take(rows, np.array(others)), seed=9)
        assert np.array_equal(some.images, whole.images[others]), others
        assert np.array_equal(some.clipped, whole.clipped[others])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batch_sizes_differ_by_a_grey_level(generator, rows, precision):
    made = [
        SamplingEngine(generator, SETTINGS, size, precision).sample(*rows, seed=9).images.astype(int)
        for size in (1, 3, 7)
    ]
    difference = np.abs(np.stack(made) - made[0])
    # where rounding tips the choice of a code, its patch of the image is another: none here in float32
    assert (difference > 1).mean() < 0.01 and (precision == "bf16" or difference.max() <= 1)


@pytest.mark.parametrize(("size", "shapes"), [(3, [9] * 3), (4, [12] * 2), (6, [12] * 2), (20, [21])])
def test_the_last_batch_is_filled_up_to_the_shape_of_the_others(generator, rows, size, shapes):
    seen = []
    hook = generator.unet.final.register_forward_hook(lambda layer, inputs, out: seen.append(len(out)))
    made = SamplingEngine(generator, SETTINGS, batch_size=size).sample(*rows, seed=9)
    hook.remove()
    # the positive and two negatives of each image, at every step of each batch
    assert seen == [count for count in shapes for _ in range(SETTINGS.steps)]
    assert len(made.images) == 7


def test_what_a_timestep_steers_by_is_computed_once_for_all_batches(generator, rows, monkeypatch):
    steered, steer = [], ConditionalUNet.steer

    def counting(self, t):
        steered.append(t)
        return steer(self, t)

    monkeypatch.setattr(ConditionalUNet, "steer", counting)
    engine = SamplingEngine(generator, SETTINGS, batch_size=3)
    engine.sample(*rows, seed=9)
    engine.sample(*rows, seed=10)
    assert steered == [18, 12, 6, 0]


def test_the_same_batches_give_the_same_bits(generator, rows):
    first, second = (
        SamplingEngine(generator, SETTINGS, batch_size=4).sample(*rows, seed=9) for _ in range(2)
    )
    assert np.array_equal(first.images, second.images) and np.array_equal(first.clipped, second.clipped)


def test_seed_identity_replicate_and_guidance_all_matter(generator, rows):
    one = take(rows, np.array([3]))
    engine = SamplingEngine(generator, SETTINGS)
    base = engine.sample(*one, seed=9).images
    context, negative, share, identity, replicate = one
    oneself = np.stack([context, context], axis=1)
    others = [
        engine.sample(*one, seed=10),
        engine.sample(context, negative, share, identity + 1, replicate, 9),
        engine.sample(context, negative, share, identity, replicate + 1, 9),
        engine.sample(negative[:, 0], negative, share, identity, replicate, 9),
        engine.sample(context, negative, share[:, ::-1].copy(), identity, replicate, 9),
        engine.sample(context, oneself, share, identity, replicate, 9),
        SamplingEngine(generator, SamplerSettings(steps=4, w=0.0)).sample(
            context, None, None, identity, replicate, 9
        ),
    ]
    for other in others:
        assert not np.array_equal(other.images, base)
    # pushing away from oneself is not pushing at all
    assert_close(others[5], others[6])


def test_every_setting_of_the_guidance_matters(rows):
    generator = make_generator(learn_empty_context=True)
    torch.nn.init.normal_(generator.unet.empty_context_embedding)
    base = SamplerSettings(steps=4, w=3.0)
    made = [
        SamplingEngine(generator, replace(base, **settings)).sample(*rows, seed=9).images
        for settings in (
            {},
            {"w": 1.0},
            {"weight": "adaptive"},
            {"weight": "piecewise", "curve": "0:1 0.5:1 0.5:0 1:0"},
            {"cfg": 1.0},
            {"interval": (0.5, 1.0)},
        )
    ]
    for i, images in enumerate(made):
        assert not any(np.array_equal(images, other) for other in made[:i]), i


def test_every_distinct_vector_of_a_batch_is_projected_once_for_all_steps(generator, rows, monkeypatch):
    projected = []
    project = ConditionalUNet.project_context

    def counting(self, context, *arguments):
        projected.append(int(context.any(dim=1).sum()))  # zeros fill up
        return project(self, context, *arguments)

    monkeypatch.setattr(ConditionalUNet, "project_context", counting)
    SamplingEngine(generator, SETTINGS, batch_size=7).sample(*rows, seed=9)
    assert projected == [3]


def test_progress_counts_images(generator, rows):
    done = []
    SamplingEngine(generator, SETTINGS, batch_size=3).sample(*rows, seed=9, progress=done.append)
    assert done == [3, 6, 7]


def test_running_out_of_memory_halves_the_batch_and_goes_on(generator, rows, monkeypatch):
    expected = SamplingEngine(generator, SETTINGS, batch_size=7).sample(*rows, seed=9)
    forward, limit = ConditionalUNet.forward, 4

    def cramped(self, x, time, context):
        if context.rows > limit:
            raise torch.OutOfMemoryError("too many rows")
        return forward(self, x, time, context)

    monkeypatch.setattr(ConditionalUNet, "forward", cramped)
    engine = SamplingEngine(generator, SETTINGS, batch_size=7)
    # a pass holds the positive and two negatives, so that four rows are one image; 7 -> 3 -> 1
    assert_close(engine.sample(*rows, seed=9), expected)
    assert engine.batch_size == 1
    limit = 1
    with pytest.raises(torch.OutOfMemoryError):
        engine.sample(*rows, seed=9)


@pytest.mark.parametrize(
    "settings",
    [{}, {"weight": "piecewise", "curve": "0:1 0.4:1 0.4:0 1:0"}, {"interval": (0.0, 0.2)}],
    ids=["constant", "no weight in the middle", "early"],
)
def test_where_no_batch_size_is_known_the_largest_that_fits_is_found_once(
    generator, rows, settings, monkeypatch
):
    evaluated, found = [], []

    def searched(try_it, device):
        hook = generator.unet.final.register_forward_hook(
            lambda layer, inputs, out: evaluated.append(len(out))
        )
        try_it(2)
        try_it(9)  # more than there are images
        hook.remove()
        found.append(device)
        return 3

    monkeypatch.setattr(engine_module, "largest_batch", searched)
    engine = SamplingEngine(generator, replace(SETTINGS, **settings))
    engine.batch_size = 0  # as on a GPU
    first, second = (engine.sample(*rows, seed=9).images for _ in range(2))
    assert evaluated == [6, 27] and found == [engine.device] and engine.batch_size == 3
    assert engine.warm_up > 0, "the search is no sampling"
    assert np.array_equal(first, second)


def test_what_a_batch_size_is_remembered_by_tells_what_takes_memory(generator):
    def needs(other=generator, negatives=1, precision="fp32", **settings):
        return SamplingEngine(other, SamplerSettings(**settings), precision=precision).needs(negatives)

    wider = make_generator(context_channels=64, learn_empty_context=True)
    described = [
        needs(),
        needs(negatives=2),
        needs(precision="bf16"),
        needs(wider),
        needs(wider, cfg=1.0, negatives=2),
    ]
    assert len(set(described)) == len(described)
    assert needs(w=0.0, negatives=1) == needs(w=0.0, negatives=2)
    assert needs(w=0.7) == needs(w=0.5, steps=9, sampler="ddpm") == described[0]


def test_bfloat16_leaves_the_generator_alone_and_stays_near(generator, rows):
    exact = SamplingEngine(generator, SETTINGS).sample(*rows, seed=9).images.astype(int)
    rounded = SamplingEngine(generator, SETTINGS, precision="bf16").sample(*rows, seed=9).images.astype(int)
    assert generator.unet.dtype == torch.float32
    assert np.abs(rounded - exact).mean() < 0.2 * exact.std()


def test_an_unconditional_generator_needs_no_contexts():
    generator = make_generator(is_context_conditional=False, condition_type="AdaGN")
    engine = SamplingEngine(generator, SamplerSettings(steps=2, w=0.0))
    images = engine.sample(None, None, None, np.arange(2), np.zeros(2, np.int64), seed=1).images
    assert images.shape == (2, 16, 16, 3) and not np.array_equal(images[0], images[1])


def test_images_that_are_not_finite_are_marked(generator, rows):
    broken = copy.deepcopy(generator.decoder)
    broken.decoder.conv_out.bias.data[0] = torch.nan
    damaged = Generator(**{**vars(generator), "decoder": broken})
    samples = SamplingEngine(damaged, SETTINGS).sample(*take(rows, np.array([0])), seed=9)
    assert np.isnan(samples.clipped).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_latents_that_are_not_finite_are_marked(generator, rows, value):
    unet = copy.deepcopy(generator.unet)
    unet.final.bias.data[0] = value
    damaged = Generator(**{**vars(generator), "unet": unet})
    samples = SamplingEngine(damaged, SETTINGS).sample(*take(rows, np.array([0, 3])), seed=9)
    assert np.isnan(samples.clipped).all()


def test_no_rows_give_no_images(generator, rows):
    samples = SamplingEngine(generator, SETTINGS).sample(*take(rows, np.array([], np.int64)), seed=9)
    assert samples.images.shape == (0, 16, 16, 3) and samples.clipped.shape == (0,)


def test_rows_that_do_not_fit_are_refused(generator, rows):
    engine = SamplingEngine(generator, SETTINGS)
    contexts, negatives, shares, identities, replicates = rows
    nan = contexts.copy()
    nan[4, 2] = np.nan
    for columns, message in (
        ((contexts[:, :8], negatives, shares), r"contexts have shape \(7, 8\).*\(7, 16\)"),
        ((contexts, negatives[:3], shares), r"negatives have shape \(3, 2, 16\)"),
        ((contexts, negatives, shares[:, :1]), r"shares have shape \(7, 1\).*\(7, 2\)"),
        ((contexts, negatives, shares, identities, replicates[:3]), "7 identities and 3 replicates"),
        ((nan, negatives, shares), "contexts hold NaN or infinity, first for identity 1"),
        ((contexts, negatives, shares, identities - 1), r"identities must lie in \[0, 2\^32\), but .* -1"),
        ((contexts, None, None), "weight is 0.5 but no negatives"),
        ((contexts, negatives, None), "Negatives and their shares"),
        ((None, negatives, shares), "without contexts"),
    ):
        with pytest.raises(ContextsError, match=message):
            engine.sample(*columns, *(identities, replicates)[len(columns) - 3 :], seed=9)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (SamplerSettings(sampler="euler"), {}, "sampler is 'euler'.*ddim, ddpm, dpm_solver"),
        (SamplerSettings(weight="linear"), {}, "weight is 'linear'.*adaptive"),
        (SamplerSettings(weight="piecewise"), {}, "samples.curve is ''"),
        (SamplerSettings(cfg=1.0), {}, "weight 1 needs a generator that learned an empty context"),
        (SETTINGS, {"precision": "fp8"}, "precision is 'fp8'.*fp32, tf32, bf16, fp16"),
        (
            SETTINGS,
            {"precision": "tf32"},
            "precision is tf32, which a CPU does not have.*fp32 or bf16",
        ),
        (SETTINGS, {"acceleration": "fast"}, "acceleration is 'fast'.*auto, eager, graphs, compile"),
        (SETTINGS, {"batch_size": -1}, "batch_size is -1"),
    ],
)
def test_unknown_settings_are_refused(generator, settings, options, message):
    with pytest.raises(ConfigError, match=message):
        SamplingEngine(generator, settings, **options)

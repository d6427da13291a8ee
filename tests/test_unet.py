import pytest
import torch
from diffusion_reference import TINY_MODEL, described, manifest, randomised, reference, reference_unet
from torch.nn.attention import SDPBackend, sdpa_kernel

from negfacediff_core.diffusion.blocks import MODULATIONS, Convolution3x3
from negfacediff_core.diffusion.schedule import schedule_from_config
from negfacediff_core.diffusion.unet import ConditionalUNet
from negfacediff_core.errors import ConfigError, ContextsError

CONDITIONAL = [
    "unet_tiny_ca",
    "unet_tiny_ca_min32",
    "unet_tiny_adagn",
    "unet_tiny_addplusgn",
    "unet_tiny_diffae",
]
TOLERANCE = 3e-5


PARAMETERS = {
    "unet_manifest_ca": 216_341_187,
    "unet_manifest_ca_cpd25": 216_341_187,
    "unet_manifest_ca_cpd50": 216_341_187,
    "unet_manifest_adagn": 134_595_939,
    "unet_manifest_uncond_adagn": 132_392_163,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_full_size_state_dict_is_that_of_the_release(name):
    expected = manifest(name)
    with torch.device("meta"):
        unet = ConditionalUNet(**expected["model_config"])
    schedule = schedule_from_config({"T": expected["T"], **expected["schedule"]})
    constants = [[key, list(value.shape), "float32"] for key, value in schedule.buffers().items()]
    network = described(unet, "eps_model.")
    assert [row for row in expected["keys"] if row[0].startswith("eps_model.")] == network
    assert [row for row in expected["keys"] if not row[0].startswith("eps_model.")] == constants
    found = sum(parameter.numel() for parameter in unet.parameters())
    assert found == PARAMETERS[name] == expected["unet_param_count"]


@pytest.mark.parametrize("share", [25, 50])
def test_contextual_partial_dropout_adds_no_keys(share):
    assert manifest(f"unet_manifest_ca_cpd{share}")["keys"] == manifest("unet_manifest_ca")["keys"]


@pytest.mark.parametrize("name", [*CONDITIONAL, "unet_tiny_uncond_adagn"])
def test_predictions_equal_the_reference(name):
    file = reference(name)
    unet, x, t = reference_unet(file), file.arrays["x_t"], file.arrays["t"]
    with torch.inference_mode():
        found = {"eps_none": unet(x, t), "time_emb": unet.time_emb(t)}
        if unet.is_context_conditional:
            context = file.arrays["context"]
            found |= {
                "eps_pos": unet(x, t, context),
                "eps_neg": unet(x, t, file.arrays["negative_context"]),
                "eps_masked": unet(x, t, context, file.arrays["dropout_mask"]),
                "eps_zero_context": unet(x, t, torch.zeros_like(context)),
                "c_emb_pos": unet.context_emb(context),
            }
    assert found.keys() == file.arrays.keys() - {"x_t", "t", "context", "negative_context", "dropout_mask"}
    for key, value in found.items():
        expected = file.arrays[key]
        assert torch.allclose(value, expected, rtol=0, atol=TOLERANCE), key
        assert (value - expected).norm() < 1e-5 * expected.norm(), key


@pytest.mark.parametrize("name", CONDITIONAL)
def test_projected_contexts_give_what_contexts_give(name):
    file = reference(name)
    unet, x, t = reference_unet(file), file.arrays["x_t"], file.arrays["t"]
    context, negative = file.arrays["context"], file.arrays["negative_context"]
    with torch.inference_mode():
        both = unet.project_context(context).concat(unet.project_context(negative))
        order = torch.tensor([4, 0, 5]) if len(x) == 3 else torch.tensor([3, 0])
        found = unet(x, t, both.take(order))
        expected = unet(x, t, torch.cat([context, negative])[order])
        empty = unet(x, t, unet.project_empty(len(x)))
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert torch.allclose(empty, file.arrays["eps_none"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("condition", sorted(MODULATIONS))
def test_one_timestep_for_all_equals_one_for_each(condition):
    unet = randomised(ConditionalUNet(**TINY_MODEL, condition_type=condition))
    x, context = torch.randn(3, 3, 8, 8), torch.randn(3, 16)
    with torch.inference_mode():
        each, shared = unet(x, torch.tensor([40, 40, 40]), context), unet(x, torch.tensor([40]), context)
    assert torch.allclose(each, shared, rtol=0, atol=1e-5)


@pytest.mark.parametrize("condition", sorted(MODULATIONS))
@torch.inference_mode()
def test_what_the_timestep_steers_by_may_be_computed_beforehand(condition):
    unet = randomised(ConditionalUNet(**TINY_MODEL, condition_type=condition))
    x, context = torch.randn(3, 3, 8, 8), torch.randn(3, 16)
    for times in (40, torch.tensor([40]), torch.tensor([40, 7, 40])):
        assert torch.equal(unet(x, unet.steer(times), context), unet(x, times, context))
    assert torch.allclose(unet.steer(torch.tensor([7, 40]))[1:], unet.steer(40), atol=1e-6)


# In the order channels-last the engine runs; small maps are then convolved by matrix products.
@pytest.mark.parametrize("condition", sorted(MODULATIONS))
@torch.inference_mode()
def test_the_order_in_memory_changes_nothing_but_rounding(condition):
    unet = randomised(ConditionalUNet(**TINY_MODEL, condition_type=condition))
    x, t, context = torch.randn(2, 3, 8, 8), torch.tensor([40, 7]), torch.randn(4, 16)
    expected = unet(x, t, context)
    found = unet.to(memory_format=torch.channels_last)(x, t, context)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("side", [1, 2, 4, 5])
def test_a_convolution_of_a_small_map_is_a_product(side, monkeypatch):
    layer = Convolution3x3(5, 7)
    x = torch.randn(3, 5, side, side, requires_grad=True)
    expected = layer(x)
    products = []
    as_product = Convolution3x3._as_product
    monkeypatch.setattr(
        Convolution3x3, "_as_product", lambda self, x: products.append(1) or as_product(self, x)
    )
    found = layer.to(memory_format=torch.channels_last)(x)
    assert bool(products) == (side <= 4)
    assert torch.allclose(found, expected, atol=1e-6)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("condition", ["CA", "AdaGN"])
@torch.inference_mode()
def test_attention_runs_in_fused_kernels(condition, dtype):
    unet = randomised(ConditionalUNet(**TINY_MODEL, condition_type=condition)).to(dtype)
    x, context = torch.randn(2, 3, 8, 8), torch.randn(2, 16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where the layout in memory does not suit it
        assert unet(x, 40, context).isfinite().all()


@pytest.mark.parametrize("times", [[5], [5, 90]])
@pytest.mark.parametrize("condition", MODULATIONS)
@torch.inference_mode()
def test_several_contexts_of_a_latent_share_what_no_context_touches(condition, times):
    unet = randomised(ConditionalUNet(**TINY_MODEL | {"condition_type": condition}))
    numbers = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 8, 8, generator=numbers)
    contexts, t = torch.randn(6, 16, generator=numbers), torch.tensor(times)
    apart = [unet(x, t, part) for part in contexts.split(2)]
    rows = []
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, out: rows.append(len(out)))
        for layer in (unet.image_proj, unet.down[0].res.conv1, unet.final)
    ]
    together = unet(x, t, contexts)
    for hook in hooks:
        hook.remove()
    assert torch.allclose(together, torch.cat(apart), rtol=0, atol=1e-5)
    assert rows == [2, 2, 6]


def test_a_fresh_network_predicts_zero_noise():
    unet = ConditionalUNet(**TINY_MODEL)
    bias = unet.final.bias[:, None, None].expand(2, 3, 8, 8)
    assert torch.equal(unet(torch.randn(2, 3, 8, 8), torch.tensor([3]), torch.randn(2, 16)), bias)


def test_the_learned_empty_context_replaces_marked_rows_and_is_trained():
    unet = randomised(ConditionalUNet(**TINY_MODEL, learn_empty_context=True))
    assert next(iter(unet.state_dict())) == "empty_context_embedding"
    x, context = torch.randn(3, 3, 8, 8), torch.randn(3, 16)
    t, mask = torch.tensor([5, 500, 999]), torch.tensor([False, True, False])
    masked = unet(x, t, context, mask)
    assert torch.allclose(masked[1], unet(x, t)[1], atol=1e-5)
    assert torch.allclose(masked[::2], unet(x, t, context)[::2], atol=1e-5)
    assert not torch.allclose(masked[1], unet(x, t, context)[1], atol=1e-2)
    masked.square().mean().backward()
    assert unet.empty_context_embedding.grad.abs().max() > 0
    # absent where it is not asked for, as in the released weights
    assert "empty_context_embedding" not in ConditionalUNet(**TINY_MODEL).state_dict()


def test_contextual_partial_dropout_acts_in_training_only():
    unet = randomised(ConditionalUNet(**TINY_MODEL, context_dropout_probability=0.5))
    x, t, context = torch.randn(2, 3, 8, 8), torch.tensor([5]), torch.randn(2, 16)
    assert torch.equal(unet(x, t, context), unet(x, t, context))
    unet.train()
    assert not torch.allclose(unet(x, t, context), unet(x, t, context), atol=1e-4)


def class_network(condition, **options):
    return randomised(ConditionalUNet(**TINY_MODEL, condition_type=condition, n_context_classes=4, **options))


@pytest.mark.parametrize("condition", sorted(MODULATIONS))
def test_a_class_is_a_one_hot_vector(condition):
    classes = class_network(condition)
    assert classes.context_emb.weight.shape == (4, 32)
    assert (classes.context_classes, classes.context_width) == (4, 0)
    weights = classes.state_dict()
    weights["context_emb.weight"] = weights["context_emb.weight"].T
    vectors = ConditionalUNet(**TINY_MODEL | {"context_input_channels": 4}, condition_type=condition)
    vectors.load_state_dict(weights | {"context_emb.bias": torch.zeros(32)})
    x, t, labels = torch.randn(3, 3, 8, 8), torch.tensor([5, 500, 999]), torch.tensor([2, 0, 3])
    one_hot = torch.nn.functional.one_hot(labels, 4).float()
    with torch.inference_mode():
        assert torch.allclose(classes(x, t, labels), vectors.eval()(x, t, one_hot), rtol=0, atol=1e-6)


# What stands for "no context" must be what a context does that is embedded as the learned vector, or as zero.
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("classes", [0, 4])
@pytest.mark.parametrize("training", [True, False])
def test_the_empty_context_is_the_embedded_vector_or_zero(learned, classes, training):
    options = {"n_context_classes": classes, "learn_empty_context": learned}
    # in training every component of an embedded context is dropped, but none of the empty one
    unet = randomised(ConditionalUNet(**TINY_MODEL, **options, context_dropout_probability=float(training)))
    empty = unet.empty_context_embedding.detach() if learned else torch.zeros(32)
    other = randomised(ConditionalUNet(**TINY_MODEL, **options))
    contexts = torch.tensor([1, 2, 1]) if classes else torch.randn(3, 16)
    dropped = torch.full_like(contexts, 3) if classes else torch.zeros_like(contexts)
    with torch.no_grad():
        if classes:
            other.context_emb.weight[3] = empty
        else:
            other.context_emb.bias.copy_(empty)
    x, t, mask = torch.randn(3, 3, 8, 8), torch.tensor([5, 500, 999]), torch.tensor([False, True, False])
    unet.train(training)
    with torch.inference_mode():
        masked, none, expected = unet(x, t, contexts, mask), unet(x, t), other(x, t, dropped)
    assert torch.allclose(none, expected, rtol=0, atol=1e-5)
    assert torch.allclose(masked[1], expected[1], rtol=0, atol=1e-5)
    assert torch.allclose(masked[0], expected[0], rtol=0, atol=1e-5) == (training and not learned)


def test_a_bfloat16_network_takes_and_gives_float32():
    unet = randomised(ConditionalUNet(**TINY_MODEL))
    x, t, context = torch.randn(2, 3, 8, 8), torch.tensor([777]), torch.randn(2, 16)
    with torch.inference_mode():
        exact = unet(x, t, context)
        rounded = unet.to(torch.bfloat16)(x, t, context)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"condition_type": "FiLM"}, "condition_type is 'FiLM'.*AdaGN"),
        ({"is_attention": (True,)}, "2 levels and model.is_attention has 1"),
        ({"initial_channels": 48}, "initial_channels is 48.*multiple of 32"),
        ({"context_channels": 20}, "context_channels is 20.*multiple of 32"),
        ({"n_context_classes": -1}, "n_context_classes is -1.*from 0 to"),
        ({"n_context_classes": 2.5}, r"n_context_classes is 2\.5"),
        ({"channel_multipliers": (1, 0)}, r"channel_multipliers\[1\] is 0"),
        ({"channel_multipliers": 2}, "channel_multipliers is 2.*list"),
        ({"is_attention": (False, "no")}, r"is_attention\[1\] is 'no'.*true or false"),
        ({"attention_heads": 3}, "attention_heads is 3.*64 channels"),
        ({"attention_head_channels": 128}, "64 channels cannot be split"),
        ({"context_dropout_probability": 2}, "context_dropout_probability is 2.*from 0 to 1"),
    ],
)
def test_impossible_configurations_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        ConditionalUNet(**TINY_MODEL | wrong)


def test_contexts_and_latents_must_go_together():
    unet = randomised(ConditionalUNet(**TINY_MODEL))
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([1])
    for count in (1, 2, 4):
        with pytest.raises(ContextsError, match=f"{count} contexts do not go with 3 latents"):
            unet(x, t, torch.randn(count, 16))
    with pytest.raises(ContextsError, match="no dropout mask"):
        unet(x, t, unet.project_context(torch.randn(3, 16)), torch.tensor([True, False, False]))


def test_contexts_that_do_not_fit_are_refused():
    unet = ConditionalUNet(**TINY_MODEL)
    with pytest.raises(ContextsError, match=r"\(N, 16\), not \(2, 512\)"):
        unet.project_context(torch.zeros(2, 512))
    with pytest.raises(ContextsError, match=r"floating-point.*not \(2, 16\) of torch\.int64"):
        unet.project_context(torch.zeros(2, 16, dtype=torch.int64))
    classes = class_network("CA")
    for wrong in (torch.zeros(2), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)):
        with pytest.raises(ContextsError, match=r"expects classes, int64 of shape \(N,\), not"):
            classes.project_context(wrong)
    for number in (-1, 4):
        with pytest.raises(
            ContextsError, match=f"Class {number} is not in the generator: its 4 classes are 0"
        ):
            classes.project_context(torch.tensor([0, number]))
    unconditional = ConditionalUNet(**TINY_MODEL, is_context_conditional=False)
    with pytest.raises(ContextsError, match="unconditional"):
        unconditional.project_context(torch.zeros(2, 16))

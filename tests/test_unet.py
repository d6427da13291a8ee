import pytest
import torch
from diffusion_reference import TINY_MODEL, described, manifest, randomised, reference, reference_unet

from negfacediff_core.diffusion.blocks import MODULATIONS
from negfacediff_core.diffusion.unet import ConditionalUNet
from negfacediff_core.errors import ConfigError, ContextsError

CONDITIONAL = ["unet_tiny_ca", "unet_tiny_adagn", "unet_tiny_addplusgn", "unet_tiny_diffae"]
TOLERANCE = 3e-5


@pytest.mark.parametrize("name", ["unet_manifest_ca", "unet_manifest_adagn", "unet_manifest_uncond_adagn"])
def test_full_size_state_dict_is_that_of_the_release(name):
    expected = manifest(name)
    with torch.device("meta"):
        unet = ConditionalUNet(**expected["model_config"])
    keys = [row for row in expected["keys"] if row[0].startswith("eps_model.")]
    assert described(unet, "eps_model.") == keys
    assert sum(parameter.numel() for parameter in unet.parameters()) == expected["unet_param_count"]


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
        assert torch.allclose(value, file.arrays[key], rtol=0, atol=TOLERANCE), key


@pytest.mark.parametrize("name", CONDITIONAL)
def test_projected_contexts_give_what_contexts_give(name):
    file = reference(name)
    unet, x, t = reference_unet(file), file.arrays["x_t"], file.arrays["t"]
    context, negative = file.arrays["context"], file.arrays["negative_context"]
    with torch.inference_mode():
        both = unet.project_context(context).concat(unet.project_context(negative))
        found = unet(x, t, both.take(torch.tensor([4, 0, 5])))
        expected = unet(x, t, torch.stack([negative[1], context[0], negative[2]]))
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
        ({"n_context_classes": 10}, "n_context_classes is 10"),
    ],
)
def test_impossible_configurations_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        ConditionalUNet(**TINY_MODEL | wrong)


def test_contexts_that_do_not_fit_are_refused():
    unet = ConditionalUNet(**TINY_MODEL)
    with pytest.raises(ContextsError, match=r"\(N, 16\), not \(2, 512\)"):
        unet.project_context(torch.zeros(2, 512))
    unconditional = ConditionalUNet(**TINY_MODEL, is_context_conditional=False)
    with pytest.raises(ContextsError, match="unconditional"):
        unconditional.project_context(torch.zeros(2, 16))

import pytest
import torch
from diffusers import VQModel
from diffusion_reference import described, manifest, randomised, reference
from hypothesis import given, settings
from hypothesis import strategies as st

from negfacediff_core.diffusion import first_stage
from negfacediff_core.diffusion.first_stage import (
    Codebook,
    FirstStageSettings,
    Upsample,
    VQDecoder,
    VQEncoder,
)
from negfacediff_core.diffusion.precision import products_in
from negfacediff_core.errors import ConfigError

TOLERANCE = 5e-5
SMALL = FirstStageSettings(ch=32, ch_mult=(1, 2), num_res_blocks=1, n_embed=16)


def reference_networks():
    file = reference("vq_tiny")
    networks = []
    for network in (VQDecoder, VQEncoder):
        module = network(FirstStageSettings.from_config(file.config))
        module.load_state_dict({key: file.weights[key] for key in module.state_dict()})
        networks.append(module.eval())
    return file, *networks


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_full_size_state_dict_is_that_of_the_release(part):
    expected = manifest(f"vq_{part}_manifest")
    settings = FirstStageSettings.from_config(expected["config"]["params"])
    assert settings == FirstStageSettings()
    with torch.device("meta"):
        module = {"decoder": VQDecoder, "encoder": VQEncoder}[part](settings)
    assert described(module) == expected["keys"]


@torch.inference_mode()
def test_decoding_equals_the_reference():
    file, decoder, _ = reference_networks()
    latent = file.arrays["latent"]
    assert torch.equal(decoder.quantize.nearest(latent).flatten(), file.arrays["code_indices"])
    assert torch.equal(decoder.quantize(latent), file.arrays["quantized"])
    for quantize, key in ((True, "decoded_quantized"), (False, "decoded_not_quantized")):
        assert torch.allclose(decoder(latent, quantize=quantize), file.arrays[key], rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_encoding_equals_the_reference():
    file, _, encoder = reference_networks()
    assert torch.allclose(encoder(file.arrays["image"]), file.arrays["encoded"], rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_the_decoder_equals_the_one_of_diffusers():
    decoder = randomised(VQDecoder(SMALL))
    theirs = VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=3,
        num_vq_embeddings=16,
        vq_embed_dim=3,
        norm_num_groups=32,
    ).eval()
    theirs.load_state_dict(as_diffusers(decoder.state_dict()), strict=False)
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(decoder(latents), theirs.decode(latents).sample, rtol=0, atol=TOLERANCE)


def as_diffusers(state):
    """Rename the keys of a two-level decoder from the CompVis layout to that of diffusers."""
    names = {
        "mid.block_1": "mid_block.resnets.0",
        "mid.block_2": "mid_block.resnets.1",
        "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
        "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
        "mid.attn_1.": "mid_block.attentions.0.to_",
        "up.0.block": "up_blocks.1.resnets",
        "up.1.block": "up_blocks.0.resnets",
        "up.1.upsample": "up_blocks.0.upsamplers.0",
        "norm_out": "conv_norm_out",
        "nin_shortcut": "conv_shortcut",
    }
    renamed = {}
    for key, value in state.items():
        matrix = "attn_1" in key and value.ndim == 4
        for old, new in names.items():
            key = key.replace(old, new)
        renamed[key] = value[:, :, 0, 0] if matrix else value
    return renamed


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_codebook_finds_the_nearest_code_whatever_the_block(count, codes, width, seed):
    numbers = torch.Generator().manual_seed(seed)
    book = Codebook(codes, width)
    book.embedding.weight.data = torch.randn(codes, width, generator=numbers)
    latents = torch.randn(count, width, 2, 3, generator=numbers)
    pixels = latents.permute(0, 2, 3, 1).reshape(-1, width)
    squares = torch.cdist(pixels.double(), book.embedding.weight.detach().double()).square()
    found = book.nearest(latents).flatten()
    # of squares: float32 rounds these, so two codes that are both very near cannot be told apart by the root
    assert torch.allclose(squares.gather(1, found[:, None])[:, 0], squares.min(dim=1).values, atol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(first_stage.SEARCH_BLOCK, "cpu", 7 * codes)
        assert torch.equal(book.nearest(latents).flatten(), found)


def test_codes_are_looked_for_in_float32_whatever_the_format_of_the_decoder(monkeypatch):
    matmul, asked, seen = torch.backends.cuda.matmul, [], []

    def as_on_a_gpu(precision, device):
        asked.append(device.type)
        return products_in(precision, torch.device("cuda"))

    def noting(*args, addmm=torch.addmm, **kwargs):
        seen.append(matmul.fp32_precision)
        return addmm(*args, **kwargs)

    monkeypatch.setattr(first_stage, "products_in", as_on_a_gpu)
    monkeypatch.setattr(torch, "addmm", noting)
    before = matmul.fp32_precision
    with torch.inference_mode(), products_in("tf32", torch.device("cuda")):
        Codebook(16, 3)(torch.zeros(1, 3, 4, 4))
        assert matmul.fp32_precision == "tf32"
    assert (asked, seen) == (["cpu"], ["ieee"])
    assert matmul.fp32_precision == before


@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.booleans(), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_upsampling_is_a_convolution_of_repeated_pixels(count, height, width, channels_last, seed):
    upsample = randomised(Upsample(5), seed).double()
    x = torch.randn(count, 5, height, width, dtype=torch.float64)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    found = upsample(x.contiguous(memory_format=layout))
    assert torch.allclose(found, upsample.conv(repeated), rtol=0, atol=1e-12)


def test_upsampling_has_the_gradients_of_a_convolution_of_repeated_pixels():
    upsample = Upsample(4).double()
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    leaves = (x, *upsample.parameters())
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected = torch.autograd.grad(upsample.conv(repeated).square().sum(), leaves)
    found = torch.autograd.grad(upsample(x).square().sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)


@torch.inference_mode()
def test_a_decoder_of_16_bits_keeps_its_codes_and_stays_near():
    decoder = randomised(VQDecoder(SMALL))
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    exact = decoder(latents)
    half = decoder.in_precision(torch.bfloat16)
    assert decoder.in_precision(torch.float32) is decoder
    assert torch.equal(half.quantize(latents), decoder.quantize(latents))
    assert half.decoder.conv_in.weight.dtype == torch.bfloat16 and half(latents).dtype == torch.float32
    error = (half(latents) - exact).norm() / exact.norm()
    assert 0 < error < 0.02
    assert torch.equal(decoder(latents), exact)  # the copy is one


def test_settings_survive_the_way_through_a_configuration():
    assert FirstStageSettings.from_config(SMALL.to_config()) == SMALL
    assert SMALL.downsampling == 2 and FirstStageSettings().downsampling == 4


@pytest.mark.parametrize(
    ("ddconfig", "message"),
    [
        ({"attn_resolutions": [16]}, "attn_resolutions"),
        ({"double_z": True}, "double_z"),
        ({"ch": 20}, r"ddconfig\.ch is 20.*multiple of 32"),
        ({"ch_mult": []}, r"ch_mult is \[\].*list"),
        ({"ch_mult": [1, "2"]}, r"ch_mult\[1\] is '2'"),
        ({"num_res_blocks": 1.5}, r"num_res_blocks is 1\.5"),
        ({"out_ch": 1}, r"out_ch 1; images here are RGB"),
        ([1, 2], r"ddconfig is \[1, 2\]"),
    ],
)
def test_first_stages_of_another_kind_are_refused(ddconfig, message):
    with pytest.raises(ConfigError, match=message):
        FirstStageSettings.from_config({"ddconfig": ddconfig})

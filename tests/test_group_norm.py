"""GroupNorm in bfloat16 gives what PyTorch's own gives, in every layout and on both of its ways."""

import pytest
import torch
import torch.nn.functional as F

from negfacediff_core.diffusion.blocks import CACHED_MAP, group_norm

LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", [8, 24])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_group_norm_is_pytorchs_in_every_layout(layout, side, dtype, error):
    generator = torch.Generator().manual_seed(0)
    norm = group_norm(64)
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
        norm.bias.normal_(generator=generator)
    x = (torch.randn(3, 64, side, side, generator=generator) + 2).to(dtype).contiguous(memory_format=layout)
    expected = F.group_norm(x.float(), 32, norm.weight, norm.bias)
    result = norm.to(dtype)(x)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=layout)
    assert (result.float() - expected).abs().max() < error * expected.abs().max()


def test_both_ways_are_taken():
    assert 8 * 8 <= CACHED_MAP < 24 * 24

"""The attention blocks of the conditional U-Net, over the pixels of a map as tokens `(N, L, C)`.

Module attributes carry the names of the IDiff-Face state dict (arXiv 2308.04995).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from negfacediff_core.diffusion.blocks import ProjectedContext, group_norm, spread, zero_initialised

CONTEXT_TOKENS = 32  # tokens that the cross-attention makes of one identity context


def tokens_of(x: Tensor) -> Tensor:
    """The pixels of `(N, C, H, W)` as tokens `(N, H W, C)`; no copy where the map is channels-last."""
    return x.flatten(2).transpose(1, 2)


def map_of(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens `(N, H W, C)` as a map with the height and width of `like`; the memory stays as it is."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


def pointwise(layer: nn.Conv1d, tokens: Tensor) -> Tensor:
    """Apply a convolution of kernel 1 to tokens `(N, L, C)`, as the matrix product that it is."""
    return F.linear(tokens, layer.weight.squeeze(2), layer.bias)


class Attention(nn.Module):
    """Multi-head scaled dot-product attention over sequences `(N, L, C)`.

    The heads of a token lie side by side in memory: fused attention kernels ask for that.
    """

    def __init__(self, channels: int, heads: int, source_channels: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Conv1d(channels, channels, 1)
        self.to_k = nn.Conv1d(source_channels, channels, 1)
        self.to_v = nn.Conv1d(source_channels, channels, 1)
        self.proj_out = zero_initialised(nn.Conv1d(channels, channels, 1))

    def _heads(self, layer: nn.Conv1d, tokens: Tensor) -> Tensor:
        return pointwise(layer, tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `(N, L, source_channels)`, each `(N, heads, L, head width)`."""
        return self._heads(self.to_k, source), self._heads(self.to_v, source)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend from `(N, L, C)` to the given keys and values; the result has the shape of `x`."""
        mixed = F.scaled_dot_product_attention(self._heads(self.to_q, x), keys, values)
        return pointwise(self.proj_out, mixed.transpose(1, 2).flatten(2))


class SelfAttentionBlock(nn.Module):
    """x + self-attention(norm(x)): the attention of every condition type but CA."""

    reads_context = False

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.attention = Attention(channels, heads, channels)
        self.norm = group_norm(channels)

    def forward(self, x: Tensor, context: ProjectedContext) -> Tensor:
        """Map `(N, C, H, W)` to the same shape; the context is not read."""
        tokens = tokens_of(self.norm(x))
        return x + map_of(self.attention(tokens, *self.attention.keys_values(tokens)), x)


class CrossAttentionBlock(nn.Module):
    """Self-attention, cross-attention to the context's tokens and a feed-forward layer."""

    reads_context = True

    def __init__(self, channels: int, heads: int, context_channels: int):
        super().__init__()
        self.x_proj_in = nn.Conv2d(channels, channels, 1)
        self.x_proj_out = zero_initialised(nn.Conv2d(channels, channels, 1))
        self.self_attention = Attention(channels, heads, channels)
        self.c_proj_in = nn.Linear(context_channels, context_channels * CONTEXT_TOKENS)
        self.cross_attention = Attention(channels, heads, context_channels)
        # one norm for all three sub-layers: so it is in the released weights
        self.x_norm = group_norm(channels)
        self.c_norm = group_norm(context_channels)
        self.ff = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.context_name = ""

    def project(self, context: Tensor) -> tuple[Tensor, ...]:
        """Cross-attention keys and values `(N, heads, 32, head width)` from `(N, context_channels)`."""
        tokens = self.c_norm(self.c_proj_in(context).unflatten(1, (-1, CONTEXT_TOKENS))).transpose(1, 2)
        # contiguous, because they are read at every step of every sample of the identity
        return tuple(part.contiguous() for part in self.cross_attention.keys_values(tokens))

    def forward(self, x: Tensor, context: ProjectedContext) -> Tensor:
        """Map `(N, C, H, W)` to `(R, C, H, W)`, where R is the number of contexts."""
        h = self.x_proj_in(x)
        tokens = tokens_of(self.x_norm(h))
        h = h + map_of(self.self_attention(tokens, *self.self_attention.keys_values(tokens)), x)
        keys, values = context.parts[self.context_name]
        h, x = spread(h, len(keys)), spread(x, len(keys))
        h = h + map_of(self.cross_attention(tokens_of(self.x_norm(h)), keys, values), x)
        h = h + map_of(self.ff(tokens_of(self.x_norm(h))), x)
        return x + self.x_proj_out(h)

"""The building blocks of the conditional U-Net: time embedding, residual blocks, attention, resampling.

Module attributes carry the names of the IDiff-Face state dict (arXiv 2308.04995), so that released weights
load key for key. Feature maps are `(N, C, H, W)`, sequences `(N, C, L)`. What depends on the identity alone
is computed by the `project` methods and handed to `forward` ready made, so that a sampler pays for it once
an identity, not once a step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Convolution = TypeVar("Convolution", nn.Conv1d, nn.Conv2d)

NORM_GROUPS = 32
CONTEXT_TOKENS = 32  # tokens that the cross-attention makes of one identity context


@dataclass(frozen=True)
class ProjectedContext:
    """What the network derives from identity contexts alone, per block that reads the context.

    `parts` maps the block's name in the network to tensors whose first axis is the context. The network's
    `forward` takes it in place of the contexts themselves.
    """

    parts: dict[str, tuple[Tensor, ...]]

    @property
    def rows(self) -> int:
        """Number of contexts; 0 in an unconditional network, which derives nothing."""
        return len(next(iter(self.parts.values()))[0]) if self.parts else 0

    def take(self, indices: Tensor) -> "ProjectedContext":
        """Gather contexts by `(N,)` int64 `indices`, as many times as they occur."""
        return ProjectedContext({name: tuple(p[indices] for p in part) for name, part in self.parts.items()})

    def concat(self, *others: "ProjectedContext") -> "ProjectedContext":
        """Stack the contexts of `others` below these."""
        stacks = {
            name: zip(part, *(other.parts[name] for other in others), strict=True)
            for name, part in self.parts.items()
        }
        return ProjectedContext(
            {name: tuple(torch.cat(stack) for stack in parts) for name, parts in stacks.items()}
        )


def spread(x: Tensor, rows: int) -> Tensor:
    """Repeat N rows to `rows`, a multiple of N: what no context has touched is computed once for all."""
    return x if len(x) == rows else x.repeat(rows // len(x), *[1] * (x.ndim - 1))


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm over 32 groups, as everywhere in this network."""
    return nn.GroupNorm(NORM_GROUPS, channels)


def zero_initialised(layer: Convolution) -> Convolution:
    """Zero a layer that ends a residual branch, so that an untrained block is the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class TimeEmbedding(nn.Module):
    """Timesteps to vectors: sinusoids of geometric frequencies 1 .. 1e-4, then two linear layers."""

    def __init__(self, channels: int, time_channels: int):
        super().__init__()
        self.channels = channels
        self.lin1 = nn.Linear(channels, time_channels)
        self.lin2 = nn.Linear(time_channels, time_channels)

    def forward(self, t: Tensor) -> Tensor:
        """Embed `(N,)` timesteps as `(N, time_channels)`."""
        half = self.channels // 2
        # not a buffer: these must stay float32 when the network is cast to bfloat16
        exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
        angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.lin1.weight.dtype)
        return self.lin2(F.silu(self.lin1(waves)))


class AdaptiveGroupNorm(nn.Module):
    """GroupNorm followed by a scale and shift from outside: norm(h) * (1 + scale) + shift."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)

    def forward(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Normalise `(N, C, H, W)`; `scale` and `shift` are `(N or 1, C)`."""
        return torch.addcmul(shift[:, :, None, None], self.norm(h), 1 + scale[:, :, None, None])


class ResidualBlock(nn.Module):
    """Two convolutions around a normalisation that is steered by time and, by condition type, by the context.

    CA and unconditional: norm(h) * (1 + scale(e_t)) + shift(e_t). AdaGN: the same with e_t + e_c. DiffAE
    (arXiv 2111.15640): e_c * (norm(h) * (1 + scale(e_t)) + shift(e_t)). AddPlusGN: norm(h + e_t + e_c).
    """

    def __init__(
        self, channels: int, out: int, time_channels: int, context_channels: int | None, condition: str
    ):
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.time_emb = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, out))
        self.reads_context = context_channels is not None and condition != "CA"
        if context_channels is not None and self.reads_context:
            self.context_emb = nn.Sequential(nn.SiLU(), nn.Linear(context_channels, out))
        if condition == "AddPlusGN":
            self.norm2: nn.Module = group_norm(out)
        else:
            self.scale_emb = nn.Linear(out, out)
            self.shift_emb = nn.Linear(out, out)
            self.norm2 = AdaptiveGroupNorm(out)
        self.conv2 = zero_initialised(nn.Conv2d(out, out, 3, padding=1))
        self.shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()
        self.modulate = MODULATIONS[condition]
        self.context_name = ""

    def project(self, context: Tensor) -> tuple[Tensor, ...]:
        """Embedded contexts `(N, context_channels)` to this block's `(N, out)`."""
        return (self.context_emb(context),)

    def forward(self, x: Tensor, time: Tensor, context: ProjectedContext) -> Tensor:
        """Map `(N, channels, H, W)` to `(R, out, H, W)`; R is the contexts' number if they are read, else N.

        `time` is `(N or 1, time_channels)`.
        """
        h = self.conv1(F.silu(self.norm1(x)))
        time = self.time_emb(time)
        projected = context.parts[self.context_name][0] if self.reads_context else None
        if projected is not None:
            h, x = spread(h, len(projected)), spread(x, len(projected))
        if len(time) > 1:
            time = spread(time, len(h))
        h = self.modulate(self, h, time, projected)
        return self.shortcut(x) + self.conv2(F.silu(h))


def _adaptive(block: ResidualBlock, h: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
    steering = time if context is None else time + context
    return block.norm2(h, block.scale_emb(steering), block.shift_emb(steering))


def _scaled_by_context(block: ResidualBlock, h: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
    h = block.norm2(h, block.scale_emb(time), block.shift_emb(time))
    return h if context is None else context[:, :, None, None] * h


def _added(block: ResidualBlock, h: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
    steering = time if context is None else time + context
    return block.norm2(h + steering[:, :, None, None])


MODULATIONS: dict[str, Callable[[ResidualBlock, Tensor, Tensor, Tensor | None], Tensor]] = {
    "CA": _adaptive,
    "AdaGN": _adaptive,
    "DiffAE": _scaled_by_context,
    "AddPlusGN": _added,
}


class Attention(nn.Module):
    """Multi-head scaled dot-product attention over sequences `(N, C, L)`."""

    def __init__(self, channels: int, heads: int, source_channels: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Conv1d(channels, channels, 1)
        self.to_k = nn.Conv1d(source_channels, channels, 1)
        self.to_v = nn.Conv1d(source_channels, channels, 1)
        self.proj_out = zero_initialised(nn.Conv1d(channels, channels, 1))

    def _split(self, y: Tensor) -> Tensor:
        return y.unflatten(1, (self.heads, -1)).transpose(-1, -2)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `(N, source_channels, L)`, each `(N, heads, L, head width)`."""
        return self._split(self.to_k(source)), self._split(self.to_v(source))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend from `(N, C, L)` to the given keys and values; the result has the shape of `x`."""
        mixed = F.scaled_dot_product_attention(self._split(self.to_q(x)), keys, values)
        return self.proj_out(mixed.transpose(-1, -2).flatten(1, 2))


class SelfAttentionBlock(nn.Module):
    """x + self-attention(norm(x)): the attention of every condition type but CA."""

    reads_context = False

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.attention = Attention(channels, heads, channels)
        self.norm = group_norm(channels)

    def forward(self, x: Tensor, context: ProjectedContext) -> Tensor:
        """Map `(N, C, H, W)` to the same shape; the context is not read."""
        tokens = self.norm(x.flatten(2))
        return x + self.attention(tokens, *self.attention.keys_values(tokens)).view(x.shape)


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
        tokens = self.c_norm(self.c_proj_in(context).unflatten(1, (-1, CONTEXT_TOKENS)))
        # contiguous, because they are read at every step of every sample of the identity
        return tuple(part.contiguous() for part in self.cross_attention.keys_values(tokens))

    def forward(self, x: Tensor, context: ProjectedContext) -> Tensor:
        """Map `(N, C, H, W)` to `(R, C, H, W)`, where R is the number of contexts."""
        h = self.x_proj_in(x).flatten(2)
        tokens = self.x_norm(h)
        h = h + self.self_attention(tokens, *self.self_attention.keys_values(tokens))
        keys, values = context.parts[self.context_name]
        h, x = spread(h, len(keys)), spread(x, len(keys))
        h = h + self.cross_attention(self.x_norm(h), keys, values)
        h = h + self.ff(self.x_norm(h).transpose(1, 2)).transpose(1, 2)
        return x + self.x_proj_out(h.view(x.shape))


class Downsample(nn.Module):
    """Halve height and width by a strided 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, time: Tensor, context: ProjectedContext) -> Tensor:
        """Map `(N, C, H, W)` to `(N, C, H/2, W/2)`; time and context are not read."""
        return self.conv(x)


class Upsample(nn.Module):
    """Double height and width by a transposed 4x4 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor, time: Tensor, context: ProjectedContext) -> Tensor:
        """Map `(N, C, H, W)` to `(N, C, 2H, 2W)`; time and context are not read."""
        return self.conv(x)

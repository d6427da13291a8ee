"""The building blocks of the conditional U-Net: time embedding, residual blocks, resampling.

Module attributes carry the names of the IDiff-Face state dict (arXiv 2308.04995), so that released weights
load key for key. Feature maps are `(N, C, H, W)`. What depends on the identity alone is computed by the
`project` methods, what depends on the timestep alone by the `steer` methods, and both are handed to
`forward` ready made, so that a sampler pays for them once an identity and once a timestep, not once an
evaluation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Convolution = TypeVar("Convolution", nn.Conv1d, nn.Conv2d)

NORM_GROUPS = 32
CACHED_MAP = 256  # pixels of a map that is laid out anew where it costs less than it saves
# Pixels of a map up to which a CPU convolves faster by one matrix product (measured: 1.3 to 4 times at 4x4,
# slower at 16x16).
SMALL_MAP = 16


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

    def clone(self) -> "ProjectedContext":
        """The same contexts in memory of their own."""
        return ProjectedContext({name: tuple(p.clone() for p in part) for name, part in self.parts.items()})

    def overwrite(self, other: "ProjectedContext") -> None:
        """Copy as many other contexts into the memory of these."""
        for name, part in self.parts.items():
            for own, new in zip(part, other.parts[name], strict=True):
                own.copy_(new)


def spread(x: Tensor, rows: int) -> Tensor:
    """Repeat N rows to `rows`, a multiple of N: what no context has touched is computed once for all."""
    return x if len(x) == rows else torch.cat([x] * (rows // len(x)))  # keeps the layout; `repeat` does not


class GroupNorm(nn.GroupNorm):
    """GroupNorm that is not slow in bfloat16 on a CPU.

    PyTorch's own takes up to nine times as long for maps that are laid out pixel by pixel, and most for the
    few channels a group of small networks. A map that fits the cache is laid out anew for it, a larger one
    is normalised in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `(N, C, ...)`; the result has its type and layout."""
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.is_contiguous():
            return super().forward(x)
        if math.prod(x.shape[2:]) <= CACHED_MAP:
            return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


def group_norm(channels: int) -> GroupNorm:
    """GroupNorm over 32 groups, as everywhere in this network."""
    return GroupNorm(NORM_GROUPS, channels)


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


class Convolution3x3(nn.Conv2d):
    """A 3x3 convolution that keeps height and width."""

    def __init__(self, channels: int, out: int):
        super().__init__(channels, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, channels, H, W)` to `(N, out, H, W)`."""
        small = x.shape[2] * x.shape[3] <= SMALL_MAP and x.device.type == "cpu"
        # only channels-last weights lie as the product reads them
        ready = self.weight.is_contiguous(memory_format=torch.channels_last)
        return self._as_product(x) if small and ready else super().forward(x)

    def _as_product(self, x: Tensor) -> Tensor:
        """One product of every pixel's 3x3 neighbourhood, `(N H W, 9 channels)`, with the weights."""
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        windows = padded.unfold(1, 3, 1).unfold(2, 3, 1)  # (N, H, W, channels, 3, 3)
        weights = self.weight.permute(0, 2, 3, 1).flatten(1)
        rows = windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, weights.shape[1])
        return F.linear(rows, weights, self.bias).view(*windows.shape[:3], -1).permute(0, 3, 1, 2)


class AdaptiveGroupNorm(nn.Module):
    """GroupNorm followed by a scale and shift from outside: norm(h) * (1 + scale) + shift."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)

    def forward(self, h: Tensor, steering: Tensor) -> Tensor:
        """Normalise `(N, C, H, W)`; `steering` is `(N or 1, 2 C)`, the scale and then the shift."""
        scale, shift = steering[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, self.norm(h), 1 + scale)


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
        self.conv1 = Convolution3x3(channels, out)
        self.time_emb = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, out))
        self.reads_context = context_channels is not None and condition != "CA"
        if context_channels is not None and self.reads_context:
            self.context_emb = nn.Sequential(nn.SiLU(), nn.Linear(context_channels, out))
        self.scales = condition != "AddPlusGN"
        if self.scales:
            self.scale_emb = nn.Linear(out, out)
            self.shift_emb = nn.Linear(out, out)
            self.norm2: nn.Module = AdaptiveGroupNorm(out)
        else:
            self.norm2 = group_norm(out)
        self.conv2 = zero_initialised(Convolution3x3(out, out))
        self.shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()
        self.modulation = MODULATIONS[condition]
        self.context_name = ""
        self.steering_columns = slice(0)

    @property
    def steering_width(self) -> int:
        """How many numbers the timestep steers this block by."""
        return self.conv1.out_channels * (2 if self.scales else 1)

    def steer(self, time: Tensor) -> Tensor:
        """Embedded timesteps `(N, time_channels)` to what they steer by: `(N, steering_width)`."""
        time = self.time_emb(time)
        return torch.cat([self.scale_emb(time), self.shift_emb(time)], dim=1) if self.scales else time

    def project(self, context: Tensor) -> tuple[Tensor, ...]:
        """Embedded contexts `(N, context_channels)` to what they steer by, `(N, columns)`."""
        return (self.modulation.project(self, self.context_emb(context)),)

    def forward(self, x: Tensor, steering: Tensor, context: ProjectedContext) -> Tensor:
        """Map `(N, channels, H, W)` to `(R, out, H, W)`; R is the contexts' number if they are read, else N.

        `steering` is `(N or 1, columns of all blocks)`, as the network's `steer` makes it.
        """
        h = self.conv1(F.silu(self.norm1(x)))
        projected = context.parts[self.context_name][0] if self.reads_context else None
        if projected is not None:
            h, x = spread(h, len(projected)), spread(x, len(projected))
        own = steering[:, self.steering_columns]
        h = self.modulation.apply(self, h, own if len(own) == 1 else spread(own, len(h)), projected)
        return self.shortcut(x) + self.conv2(F.silu(h))


class Modulation(NamedTuple):
    """How context and time steer a residual block: what is made of an embedded context, and its use.

    `apply(block, h, steering, projected context or None)` gives the normalised maps.
    """

    project: Callable[[ResidualBlock, Tensor], Tensor]
    apply: Callable[[ResidualBlock, Tensor, Tensor, Tensor | None], Tensor]


def _scales(block: ResidualBlock, context: Tensor) -> Tensor:
    # scale(e_t + e_c) = scale(e_t) + (its weights) e_c: the bias is in the part of the time already
    return torch.cat([F.linear(context, e.weight) for e in (block.scale_emb, block.shift_emb)], dim=1)


def _as_it_is(block: ResidualBlock, context: Tensor) -> Tensor:
    return context


def _adaptive(block: ResidualBlock, h: Tensor, steering: Tensor, context: Tensor | None) -> Tensor:
    return block.norm2(h, steering if context is None else steering + context)


def _scaled_by_context(block: ResidualBlock, h: Tensor, steering: Tensor, context: Tensor | None) -> Tensor:
    h = block.norm2(h, steering)
    return h if context is None else context[:, :, None, None] * h


def _added(block: ResidualBlock, h: Tensor, steering: Tensor, context: Tensor | None) -> Tensor:
    steering = steering if context is None else steering + context
    return block.norm2(h + steering[:, :, None, None])


MODULATIONS: dict[str, Modulation] = {
    "CA": Modulation(_as_it_is, _adaptive),
    "AdaGN": Modulation(_scales, _adaptive),
    "DiffAE": Modulation(_as_it_is, _scaled_by_context),
    "AddPlusGN": Modulation(_as_it_is, _added),
}


class Downsample(nn.Module):
    """Halve height and width by a strided 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, steering: Tensor, context: ProjectedContext) -> Tensor:
        """Map `(N, C, H, W)` to `(N, C, H/2, W/2)`; time and context are not read."""
        return self.conv(x)


class Upsample(nn.Module):
    """Double height and width by a transposed 4x4 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor, steering: Tensor, context: ProjectedContext) -> Tensor:
        """Map `(N, C, H, W)` to `(N, C, 2H, 2W)`; time and context are not read."""
        return self.conv(x)

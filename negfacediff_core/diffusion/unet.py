"""The noise-prediction network of IDiff-Face (arXiv 2308.04995), key for key as in its state dict."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from negfacediff_core.diffusion.attention import CrossAttentionBlock, SelfAttentionBlock
from negfacediff_core.diffusion.blocks import (
    MODULATIONS,
    NORM_GROUPS,
    Downsample,
    ProjectedContext,
    ResidualBlock,
    TimeEmbedding,
    Upsample,
    group_norm,
    spread,
)
from negfacediff_core.diffusion.checks import MOST_BLOCKS, MOST_ENTRIES, check_flag, check_whole
from negfacediff_core.errors import ConfigError, ContextsError

MakeResidual = Callable[[int, int], ResidualBlock]
MakeAttention = Callable[[int], SelfAttentionBlock | CrossAttentionBlock]


class ResolutionBlock(nn.Module):
    """A residual block, followed by attention at the resolutions that have it."""

    def __init__(self, res: ResidualBlock, attn: SelfAttentionBlock | CrossAttentionBlock | None):
        super().__init__()
        self.res = res
        self.attn = attn

    def forward(self, x: Tensor, steering: Tensor, context: ProjectedContext) -> Tensor:
        """Map `(N, C, H, W)` to `(N, C', H, W)`."""
        x = self.res(x, steering, context)
        return x if self.attn is None else self.attn(x, context)


class MiddleBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, residual: MakeResidual, attention: MakeAttention):
        super().__init__()
        self.res1 = residual(channels, channels)
        self.attn = attention(channels)
        self.res2 = residual(channels, channels)

    def forward(self, x: Tensor, steering: Tensor, context: ProjectedContext) -> Tensor:
        """Map `(N, C, H, W)` to the same shape."""
        return self.res2(self.attn(self.res1(x, steering, context), context), steering, context)


class ConditionalUNet(nn.Module):
    """eps(x_t, t, c): the noise in a latent, given its timestep and an identity context.

    The arguments are the keys of the `model` section of an IDiff-Face release. Channels of a level are
    `initial_channels` times the product of the multipliers up to it; `attention_heads` -1 means heads of
    `attention_head_channels` channels. A context is a vector of `context_input_channels`, or the number of
    a class where `n_context_classes` is not 0. Raises `ConfigError` for a configuration that cannot be built.
    """

    def __init__(
        self,
        *,
        input_channels: int = 3,
        initial_channels: int = 96,
        channel_multipliers: Sequence[int] = (1, 2, 2, 2),
        is_attention: Sequence[bool] = (False, True, True, True),
        attention_heads: int = -1,
        attention_head_channels: int = 32,
        n_blocks_per_resolution: int = 2,
        condition_type: str = "CA",
        is_context_conditional: bool = True,
        n_context_classes: int = 0,
        context_input_channels: int = 512,
        context_channels: int = 256,
        learn_empty_context: bool = False,
        context_dropout_probability: float = 0.0,
    ):
        super().__init__()
        _check_levels(condition_type, channel_multipliers, is_attention)
        check_whole("model.input_channels", input_channels)
        check_whole("model.initial_channels", initial_channels, lowest=NORM_GROUPS, step=NORM_GROUPS)
        check_whole("model.attention_head_channels", attention_head_channels)
        check_whole("model.n_blocks_per_resolution", n_blocks_per_resolution, highest=MOST_BLOCKS)
        check_flag("model.is_context_conditional", is_context_conditional)
        check_flag("model.learn_empty_context", learn_empty_context)
        if is_context_conditional:
            check_whole("model.n_context_classes", n_context_classes, lowest=0, highest=MOST_ENTRIES)
            check_whole("model.context_input_channels", context_input_channels)
            check_whole("model.context_channels", context_channels, lowest=NORM_GROUPS, step=NORM_GROUPS)
            _check_probability(context_dropout_probability)
        self.input_channels = input_channels
        self.is_context_conditional = is_context_conditional
        self.context_classes = n_context_classes if is_context_conditional else 0
        takes_vectors = is_context_conditional and n_context_classes == 0
        self.context_width = context_input_channels if takes_vectors else 0
        self.context_channels = context_channels
        self.learn_empty_context = learn_empty_context
        time_channels = 4 * initial_channels
        block_context = context_channels if is_context_conditional else None

        def residual(channels: int, out: int) -> ResidualBlock:
            return ResidualBlock(channels, out, time_channels, block_context, condition_type)

        def attention(channels: int) -> SelfAttentionBlock | CrossAttentionBlock:
            heads = _heads(channels, attention_heads, attention_head_channels)
            if condition_type == "CA" and is_context_conditional:
                return CrossAttentionBlock(channels, heads, context_channels)
            return SelfAttentionBlock(channels, heads)

        self.image_proj = nn.Conv2d(input_channels, initial_channels, 3, padding=1)
        self.time_emb = TimeEmbedding(initial_channels, time_channels)
        if is_context_conditional:
            self.context_emb: nn.Linear | nn.Embedding = (
                nn.Embedding(n_context_classes, context_channels)
                if n_context_classes
                else nn.Linear(context_input_channels, context_channels)
            )
            self.context_dropout = nn.Dropout(context_dropout_probability)
            if learn_empty_context:
                self.empty_context_embedding = nn.Parameter(torch.zeros(context_channels))
        levels = _levels(initial_channels, channel_multipliers, is_attention)
        self.down, skips = _down_path(initial_channels, levels, n_blocks_per_resolution, residual, attention)
        self.middle = MiddleBlock(levels[-1][0], residual, attention)
        self.up = _up_path(skips, levels, n_blocks_per_resolution, residual, attention)
        self.norm = group_norm(initial_channels)
        self.final = nn.Conv2d(initial_channels, input_channels, 3, padding=1)
        nn.init.zeros_(self.final.weight)
        for name, block in self._context_readers():
            block.context_name = name
        column = 0
        for block in self._residual_blocks():
            block.steering_columns = slice(column, column + block.steering_width)
            column += block.steering_width

    def _residual_blocks(self) -> list[ResidualBlock]:
        return [module for module in self.modules() if isinstance(module, ResidualBlock)]

    def _context_readers(self) -> list[tuple[str, ResidualBlock | CrossAttentionBlock]]:
        return [
            (name, module)
            for name, module in self.named_modules()
            if isinstance(module, ResidualBlock | CrossAttentionBlock) and module.reads_context
        ]

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the weights, in which the network computes."""
        return self.image_proj.weight.dtype

    def project_context(self, context: Tensor, dropout_mask: Tensor | None = None) -> ProjectedContext:
        """Compute everything that depends on the identity contexts only.

        `context` is `(N, context width)` floating-point, or `(N,)` int64 classes. Rows where the `(N,)` bool
        `dropout_mask` is true get the empty context instead. In training mode the embedded contexts pass
        through contextual partial dropout. Raises `ContextsError` for contexts of another kind, width or
        range, or an unconditional network.
        """
        if not self.is_context_conditional:
            raise ContextsError("This generator is unconditional: it takes no identity contexts.")
        if self.context_classes:
            _check_classes(context, self.context_classes)
        else:
            _check_vectors(context, self.context_width)
            context = context.to(self.dtype)
        embedded = self.context_dropout(self.context_emb(context))
        if dropout_mask is not None:
            embedded = torch.where(dropout_mask[:, None], self._empty_context().to(embedded.dtype), embedded)
        return self._project(embedded)

    def project_empty(self, rows: int = 1) -> ProjectedContext:
        """`rows` times the empty context ("no context"), which is not the same as the zero vector."""
        if not self.is_context_conditional:
            return ProjectedContext({})
        return self._project(self._empty_context().expand(rows, -1))

    def _empty_context(self) -> Tensor:
        if self.learn_empty_context:
            return self.empty_context_embedding
        return self.context_emb.weight.new_zeros(self.context_channels)

    def _project(self, embedded: Tensor) -> ProjectedContext:
        return ProjectedContext({name: block.project(embedded) for name, block in self._context_readers()})

    def steer(self, t: Tensor | int) -> Tensor:
        """Compute everything that depends on the timestep only, for all residual blocks.

        `t` holds `(N,)` timesteps, or is one for all. Returns `(N or 1, columns)`, which `forward` takes in
        place of the timesteps.
        """
        weight = self.image_proj.weight
        if isinstance(t, int):
            t = torch.full((1,), t, device=weight.device)
        time = self.time_emb(t)
        return torch.cat([block.steer(time) for block in self._residual_blocks()], dim=1)

    def forward(
        self,
        x: Tensor,
        t: Tensor | int,
        context: Tensor | ProjectedContext | None = None,
        dropout_mask: Tensor | None = None,
    ) -> Tensor:
        """Predict the noise in latents `x`.

        `x` is `(N, input_channels, H, W)` with H and W divisible by 2^(levels - 1); `t` holds `(N,)`
        timesteps, is one for all, or is what `steer` made of them. `context` is what `project_context` takes,
        the same projected beforehand, or None for the empty context. `dropout_mask` marks rows to be given
        the empty context.
        The result has the shape and type of `x`; the network computes in its own type. With k N contexts,
        latent i meets contexts i, N + i, ..., and the result has k N rows: what no context touches is
        computed once for all of them.
        """
        if context is None:
            context = self.project_empty(len(x))
        elif isinstance(context, Tensor):
            context = self.project_context(context, dropout_mask)
        elif dropout_mask is not None:
            raise ContextsError(
                "Projected contexts take no dropout mask: mark the rows while projecting them."
            )
        if context.rows % len(x):
            raise ContextsError(
                f"{context.rows} contexts do not go with {len(x)} latents: give each as many."
            )
        steering = t if isinstance(t, Tensor) and t.ndim == 2 else self.steer(t)
        h = self.image_proj(x.to(self.dtype))
        skips = [h]
        for stage in self.down:
            h = stage(h, steering, context)
            skips.append(h)
        h = self.middle(h, steering, context)
        for stage in self.up:
            if not isinstance(stage, Upsample):
                h = torch.cat([h, spread(skips.pop(), len(h))], dim=1)
            h = stage(h, steering, context)
        return self.final(F.silu(self.norm(h))).to(x.dtype)


def _check_levels(condition_type: str, multipliers: Sequence[int], is_attention: Sequence[bool]) -> None:
    if condition_type not in MODULATIONS:
        raise ConfigError(
            f"model.condition_type is {condition_type!r}; the network knows {', '.join(sorted(MODULATIONS))}."
        )
    for name, levels in (("channel_multipliers", multipliers), ("is_attention", is_attention)):
        if not isinstance(levels, list | tuple) or not levels:
            raise ConfigError(f"model.{name} is {levels!r}; it must be a list with one entry a level.")
    if len(multipliers) != len(is_attention):
        raise ConfigError(
            f"model.channel_multipliers has {len(multipliers)} levels and model.is_attention has "
            f"{len(is_attention)}; give both one entry a level."
        )


def _check_probability(dropout: float) -> None:
    if not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise ConfigError(
            f"model.context_dropout_probability is {dropout!r}; it must be a number from 0 to 1."
        )


def _heads(channels: int, heads: int, head_channels: int) -> int:
    """Number of attention heads over `channels`; `heads` -1 means heads of `head_channels`."""
    found = channels // head_channels if heads == -1 else heads
    if type(found) is not int or found < 1 or channels % found:
        raise ConfigError(
            f"model.attention_heads is {heads!r} and model.attention_head_channels {head_channels}: "
            f"{channels} channels cannot be split so; give a number of heads that divides them, or -1 for "
            "heads of attention_head_channels."
        )
    return found


def _check_vectors(vectors: Tensor, width: int) -> None:
    if vectors.ndim != 2 or vectors.shape[1] != width or not vectors.is_floating_point():
        raise ContextsError(
            f"The generator expects floating-point contexts of shape (N, {width}), not "
            f"{tuple(vectors.shape)} of {vectors.dtype}."
        )


def _check_classes(classes: Tensor, count: int) -> None:
    if classes.ndim != 1 or classes.dtype != torch.int64:
        raise ContextsError(
            f"The generator expects classes, int64 of shape (N,), not {tuple(classes.shape)} of "
            f"{classes.dtype}."
        )
    outside = classes[(classes < 0) | (classes >= count)]
    if len(outside):
        raise ContextsError(
            f"Class {int(outside[0])} is not in the generator: its {count} classes are 0 to {count - 1}."
        )


def _levels(initial: int, multipliers: Sequence[int], is_attention: Sequence[bool]) -> list[tuple[int, bool]]:
    """Channels and "has attention" of each resolution, the highest first."""
    levels, channels = [], initial
    for level, (multiplier, attention) in enumerate(zip(multipliers, is_attention, strict=True)):
        check_flag(f"model.is_attention[{level}]", attention)
        check_whole(f"model.channel_multipliers[{level}]", multiplier)
        channels *= multiplier
        check_whole(f"model.channel_multipliers: the number of channels of level {level}", channels)
        levels.append((channels, attention))
    return levels


def _down_path(
    channels: int,
    levels: list[tuple[int, bool]],
    blocks: int,
    residual: MakeResidual,
    attention: MakeAttention,
) -> tuple[nn.ModuleList, list[int]]:
    """The stages on the way down, and the channels of every skip connection in the order they are made."""
    stages: list[nn.Module] = []
    skips = [channels]
    for level, (out, has_attention) in enumerate(levels):
        for _ in range(blocks):
            stages.append(ResolutionBlock(residual(channels, out), attention(out) if has_attention else None))
            channels = out
            skips.append(channels)
        if level < len(levels) - 1:
            stages.append(Downsample(channels))
            skips.append(channels)
    return nn.ModuleList(stages), skips


def _up_path(
    skips: list[int],
    levels: list[tuple[int, bool]],
    blocks: int,
    residual: MakeResidual,
    attention: MakeAttention,
) -> nn.ModuleList:
    """The stages on the way up: each level takes a skip more than it has blocks; the last narrows."""
    stages: list[nn.Module] = []
    channels = levels[-1][0]
    for level in reversed(range(len(levels))):
        own, has_attention = levels[level]
        below = levels[level - 1][0] if level > 0 else skips[0]
        for out in [own] * blocks + [below]:
            res = residual(channels + skips.pop(), out)
            stages.append(ResolutionBlock(res, attention(out) if has_attention else None))
            channels = out
        if level > 0:
            stages.append(Upsample(channels))
    return nn.ModuleList(stages)

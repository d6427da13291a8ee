"""The VQ autoencoder between images and latents, in the key layout of the CompVis checkpoints.

Images are `(N, 3, H, W)` in [-1, 1]; latents `(N, embed_dim, H/f, W/f)` with f = 2^(levels - 1). The
encoder's output is not quantised: the diffusion model lives in the continuous latents and the decoder looks
up the nearest codes first (latent diffusion, arXiv 2112.10752; the use here, arXiv 2308.04995).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from negfacediff_core.diffusion.checks import MOST_BLOCKS, MOST_CHANNELS, MOST_ENTRIES, check_whole
from negfacediff_core.diffusion.precision import products_in
from negfacediff_core.errors import ConfigError

NORM_GROUPS = 32

# distances held at once in the codebook search: 1 MiB, which stays in the cache of a core, or 128 MiB
SEARCH_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 25}


@dataclass(frozen=True)
class FirstStageSettings:
    """Architecture of the autoencoder. Defaults: the "ffhq256" model of latent diffusion (f = 4)."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 3
    in_channels: int = 3
    out_ch: int = 3
    embed_dim: int = 3
    n_embed: int = 8192

    @property
    def downsampling(self) -> int:
        """Image pixels a latent pixel, along one side."""
        return int(2 ** (len(self.ch_mult) - 1))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "FirstStageSettings":
        """Read `{embed_dim, n_embed, ddconfig: {...}}`, the `params` of a CompVis first-stage configuration.

        Raises `ConfigError` for sizes that cannot be built, and for what this autoencoder does not have:
        attention at chosen resolutions, `double_z`, images that are not RGB.
        """
        ddconfig = config.get("ddconfig", {})
        if not isinstance(ddconfig, Mapping):
            raise ConfigError(f"First stage: ddconfig is {ddconfig!r}; it must hold the autoencoder's sizes.")
        for key in ("attn_resolutions", "double_z"):
            if ddconfig.get(key):
                raise ConfigError(
                    f"First stage: ddconfig.{key} is {ddconfig[key]!r}; only models without it load."
                )
        known = {key: ddconfig[key] for key in cls.__dataclass_fields__ if key in ddconfig}
        known |= {key: config[key] for key in ("embed_dim", "n_embed") if key in config}
        multipliers = known.get("ch_mult", cls.ch_mult)
        if not isinstance(multipliers, list | tuple) or not multipliers:
            raise ConfigError(
                f"First stage: ddconfig.ch_mult is {multipliers!r}; it must be a list with one entry a level."
            )
        settings = cls(**known | {"ch_mult": tuple(multipliers)})
        settings._check()
        return settings

    def _check(self) -> None:
        check_whole("First stage: ddconfig.ch", self.ch, lowest=NORM_GROUPS, step=NORM_GROUPS)
        for level, multiplier in enumerate(self.ch_mult):
            check_whole(
                f"First stage: ddconfig.ch_mult[{level}]", multiplier, highest=MOST_CHANNELS // self.ch
            )
        check_whole(
            "First stage: ddconfig.num_res_blocks", self.num_res_blocks, lowest=0, highest=MOST_BLOCKS
        )
        check_whole("First stage: ddconfig.z_channels", self.z_channels)
        check_whole("First stage: embed_dim", self.embed_dim)
        check_whole("First stage: n_embed", self.n_embed, highest=MOST_ENTRIES)
        if (self.in_channels, self.out_ch) != (3, 3):
            raise ConfigError(
                f"First stage: ddconfig.in_channels is {self.in_channels!r} and ddconfig.out_ch "
                f"{self.out_ch!r}; images here are RGB: both must be 3."
            )

    def to_config(self) -> dict[str, Any]:
        """The inverse of `from_config`, in plain types."""
        ddconfig = {key: getattr(self, key) for key in self.__dataclass_fields__}
        outer = {key: ddconfig.pop(key) for key in ("embed_dim", "n_embed")}
        return {**outer, "ddconfig": {**ddconfig, "ch_mult": list(self.ch_mult)}}


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


def _activated(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.silu(norm(x), inplace=True)


def _layout(x: Tensor) -> torch.memory_format:
    by_pixel = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if by_pixel else torch.contiguous_format


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the channels change."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = _norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, channels, H, W)` to `(N, out, H, W)`."""
        h = self.conv1(_activated(self.norm1, x))
        return self.nin_shortcut(x) + self.conv2(_activated(self.norm2, h))


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, with 1x1 convolutions as projections."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, C, H, W)` to the same shape."""
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(mixed.transpose(1, 2).reshape(x.shape))


class MiddleBlock(nn.Module):
    """Residual block, attention, residual block at the latent resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, C, H, W)` to the same shape."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Halve height and width by a strided 3x3 convolution that is padded on the right and below only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, C, H, W)` to `(N, C, H/2, W/2)`."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by repeating pixels, then a 3x3 convolution.

    Of the nine pixels that a kernel covers many are the same one repeated, so their weights are added up
    first: the output pixels of each parity of row and column are a 2x2 convolution of `x` itself. That is
    the same up to rounding, with 4/9 of the multiplications, and the repeated pixels are never stored.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, C, H, W)` to `(N, C, 2H, 2W)`."""
        height, width = x.shape[2:]
        padded = F.pad(x, (1, 1, 1, 1))
        parts = []
        for row, kernel_rows in enumerate(_without_repeats(self.conv.weight, dim=2)):
            for column, kernel in enumerate(_without_repeats(kernel_rows, dim=3)):
                seen = padded[:, :, row : row + height + 1, column : column + width + 1]
                parts.append(F.conv2d(seen, kernel, self.conv.bias))
        result = torch.empty(
            (*parts[0].shape[:2], 2 * height, 2 * width),
            dtype=parts[0].dtype,
            device=x.device,
            memory_format=_layout(parts[0]),
        )
        for i, part in enumerate(parts):
            result[:, :, i // 2 :: 2, i % 2 :: 2] = part
        return result


def _without_repeats(kernel: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The two weights along `dim` that even and odd output pixels give to the pixels before repetition."""
    first, middle, last = kernel.unbind(dim)
    return torch.stack((first, middle + last), dim), torch.stack((first + middle, last), dim)


class EncoderLevel(nn.Module):
    """The residual blocks of one resolution on the way down, then a downsampling unless it is the last."""

    def __init__(self, channels: int, out: int, blocks: int, last: bool):
        super().__init__()
        self.block = nn.Sequential(*(ResnetBlock(channels if i == 0 else out, out) for i in range(blocks)))
        self.downsample = nn.Identity() if last else Downsample(out)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, channels, H, W)` to `(N, out, H/2, W/2)`, or `(N, out, H, W)` on the last level."""
        return self.downsample(self.block(x))


class DecoderLevel(nn.Module):
    """The residual blocks of one resolution on the way up, then an upsampling unless it is the last."""

    def __init__(self, channels: int, out: int, blocks: int, last: bool):
        super().__init__()
        self.block = nn.Sequential(*(ResnetBlock(channels if i == 0 else out, out) for i in range(blocks)))
        self.upsample = nn.Identity() if last else Upsample(out)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, channels, H, W)` to `(N, out, 2H, 2W)`, or `(N, out, H, W)` on the last level."""
        return self.upsample(self.block(x))


class Encoder(nn.Module):
    """Images to unprojected latents `(N, z_channels, H/f, W/f)`."""

    def __init__(self, s: FirstStageSettings):
        super().__init__()
        widths = [s.ch] + [s.ch * multiplier for multiplier in s.ch_mult]
        last = len(s.ch_mult) - 1
        self.conv_in = nn.Conv2d(s.in_channels, s.ch, 3, padding=1)
        self.down = nn.Sequential(
            *(EncoderLevel(widths[i], widths[i + 1], s.num_res_blocks, i == last) for i in range(last + 1))
        )
        self.mid = MiddleBlock(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], s.z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map `(N, in_channels, H, W)` to `(N, z_channels, H/f, W/f)`."""
        h = self.mid(self.down(self.conv_in(images)))
        return self.conv_out(_activated(self.norm_out, h))


class Decoder(nn.Module):
    """Projected latents `(N, z_channels, h, w)` to images `(N, out_ch, f h, f w)`."""

    def __init__(self, s: FirstStageSettings):
        super().__init__()
        widths = [s.ch * multiplier for multiplier in s.ch_mult]
        widths.append(widths[-1])
        self.conv_in = nn.Conv2d(s.z_channels, widths[-1], 3, padding=1)
        self.mid = MiddleBlock(widths[-1])
        # level 0 is the highest resolution: it is first in the state dict and last in the computation
        self.up = nn.ModuleList(
            DecoderLevel(widths[i + 1], widths[i], s.num_res_blocks + 1, i == 0)
            for i in range(len(s.ch_mult))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], s.out_ch, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Map `(N, z_channels, h, w)` to `(N, out_ch, f h, f w)`."""
        h = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(_activated(self.norm_out, h))


class Codebook(nn.Module):
    """The codes that latents are quantised to."""

    def __init__(self, n_embed: int, embed_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_embed, 1.0 / n_embed)

    def nearest(self, latents: Tensor) -> Tensor:
        """Index of the nearest code of every latent pixel: `(N, embed_dim, h, w)` to `(N, h, w)` int64.

        argmin_k |z - e_k|^2 = argmin_k (|e_k|^2 - 2 z e_k), in blocks: the whole matrix of distances would
        take 32 MiB an image with 8,192 codes and 32x32 latents. Products are those of float32 whatever the
        decoder's own: TF32 rounds them to a thousandth, which makes other codes the nearest.
        """
        codes = self.embedding.weight
        squares = codes.square().sum(dim=1)
        pixels = latents.permute(0, 2, 3, 1).reshape(-1, codes.shape[1])
        rows = max(1, SEARCH_BLOCK[latents.device.type] // codes.shape[0])
        with products_in("fp32", latents.device):
            # `min` looks for the place in half the time of `argmin`
            found = [
                torch.addmm(squares, some, codes.T, alpha=-2.0).min(dim=1).indices
                for some in pixels.split(rows)
            ]
        return torch.cat(found).view(latents.shape[0], *latents.shape[2:])

    def forward(self, latents: Tensor) -> Tensor:
        """Replace every latent pixel by its nearest code; `(N, embed_dim, h, w)` to the same shape."""
        # contiguous: group norms on a CPU are many times slower on the channels-last strides of the look-up
        return self.embedding(self.nearest(latents)).permute(0, 3, 1, 2).contiguous()


class VQEncoder(nn.Module):
    """Images to latents."""

    def __init__(self, settings: FirstStageSettings):
        super().__init__()
        self.settings = settings
        self.encoder = Encoder(settings)
        self.quant_conv = nn.Conv2d(settings.z_channels, settings.embed_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map `(N, 3, H, W)` in [-1, 1] to latents `(N, embed_dim, H/f, W/f)`, not quantised."""
        return self.quant_conv(self.encoder(images))


class VQDecoder(nn.Module):
    """Latents to images."""

    def __init__(self, settings: FirstStageSettings):
        super().__init__()
        self.settings = settings
        self.decoder = Decoder(settings)
        self.quantize = Codebook(settings.n_embed, settings.embed_dim)
        self.post_quant_conv = nn.Conv2d(settings.embed_dim, settings.z_channels, 1)

    def forward(self, latents: Tensor, quantize: bool = True) -> Tensor:
        """Map `(N, embed_dim, h, w)` to `(N, 3, f h, f w)` float32, nominally in [-1, 1] but not clipped.

        `quantize=False` decodes the latents as they are.
        """
        codes = self.quantize(latents) if quantize else latents
        return self.decoder(self.post_quant_conv(codes.to(self.post_quant_conv.weight.dtype))).float()

    def in_precision(self, dtype: torch.dtype) -> "VQDecoder":
        """This decoder where `dtype` is its own; otherwise a copy with weights of that type, laid out for it.

        The codebook stays in float32: rounded codes would change which of them is nearest. Types of 16 bits
        take the channels last, the order that matrix units read.
        """
        if dtype == self.post_quant_conv.weight.dtype:
            return self
        decoder = copy.deepcopy(self)
        for part in (decoder.decoder, decoder.post_quant_conv):
            part.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return decoder

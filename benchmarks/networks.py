"""The networks that the engine's benchmark runs: full-size ones of random weights, tiny ones, and stubs."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from floors import unit_vectors
from numpy.typing import NDArray
from torch import Tensor, nn

from negfacediff_core.diffusion.checkpoint import Generator
from negfacediff_core.diffusion.first_stage import FirstStageSettings, VQDecoder
from negfacediff_core.diffusion.schedule import NoiseSchedule, schedule_from_config
from negfacediff_core.diffusion.unet import ConditionalUNet

#: Model section, first stage and side of the images. Full: the published generator, 216,341,187 parameters.
SIZES: dict[str, tuple[Mapping[str, Any], FirstStageSettings, int]] = {
    "full": ({}, FirstStageSettings(), 128),
    "tiny": (
        {
            "initial_channels": 32,
            "channel_multipliers": (1, 2),
            "is_attention": (False, True),
            "n_blocks_per_resolution": 1,
            "context_input_channels": 16,
            "context_channels": 32,
        },
        FirstStageSettings(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, n_embed=64),
        32,
    ),
}

#: Images of an identity that stand together in the engine's batches.
REPLICATES = 8


def random_generator(size: str, device: str) -> Generator:
    """Make a generator of random weights, all of them, as a fresh network ends in zeros."""
    model, first_stage, side = SIZES[size]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet, decoder = ConditionalUNet(**model), VQDecoder(first_stage)
        for weights in (*unet.parameters(), *decoder.parameters()):
            weights.requires_grad_(False)
            if weights.ndim > 1 and not weights.any():
                nn.init.normal_(weights, std=0.02)
        # codes as far apart as latents: those of a fresh network nearly tie, and rounding would choose
        nn.init.normal_(decoder.quantize.embedding.weight)
    latent = side // first_stage.downsampling
    return Generator(
        unet=unet.eval().to(device),
        schedule=schedule_from_config({"T": 1000, "schedule_type": "linear"}),
        decoder=decoder.eval().to(device),
        encoder=None,
        latent_shape=(3, latent, latent),
        context_width=unet.context_width,
        image_size=side,
        folder=Path("random weights"),
    )


def with_timesteps(generator: Generator, count: int) -> Generator:
    """The same generator with the first timesteps alone, so that DDPM takes that many steps."""
    return replace(generator, schedule=NoiseSchedule(generator.schedule.betas[:count]))


class NoDecoder(nn.Module):
    """Stands for the decoder where the time of the steps is wanted: gives grey, and `seen` the latents."""

    def __init__(self, side: int, seen: Callable[[Tensor], None]):
        super().__init__()
        self.side, self.seen = side, seen

    def quantize(self, latents: Tensor) -> Tensor:
        """Leave the latents as they are."""
        return latents

    def in_precision(self, dtype: torch.dtype) -> "NoDecoder":
        """The same in every precision."""
        return self

    def forward(self, latents: Tensor, quantize: bool = True) -> Tensor:
        """Map latents to grey images `(N, 3, H, W)`."""
        self.seen(latents)
        return torch.zeros((), device=latents.device).expand(len(latents), 3, self.side, self.side)


def without_decoder(generator: Generator, seen: Callable[[Tensor], None] = lambda latents: None) -> Generator:
    """The same generator, whose decoding costs nothing."""
    return replace(generator, decoder=NoDecoder(generator.image_size, seen))


def without_networks(generator: Generator) -> Generator:
    """The same generator, whose evaluations and decoding cost nothing: what is left lies outside of them."""
    unet = copy.copy(generator.unet)

    def forward(x: Tensor, *others: Any) -> Tensor:
        rows = next(other.rows for other in others if hasattr(other, "rows"))
        return x.new_zeros(()).expand(rows, *x.shape[1:])

    unet.forward = forward
    return replace(without_decoder(generator), unet=unet)


def rows_of(generator: Generator, count: int) -> tuple[NDArray[Any], ...]:
    """What `SamplingEngine.sample` takes for `count` images: contexts, negatives, shares, rows."""
    images = np.arange(count)
    identities = images // REPLICATES
    contexts = unit_vectors(identities[-1] + 1, generator.context_width, seed=1)
    negatives = unit_vectors(identities[-1] + 1, generator.context_width, seed=2)
    shares = np.ones((count, 1), np.float32)
    return contexts[identities], negatives[identities][:, None], shares, identities, images % REPLICATES


def operations(unet: ConditionalUNet, side: int, contexts: int = 1) -> dict[str, int]:
    """Count the operations of one evaluation by formula, two a multiply-add, for networks of type CA.

    `every pass`: what a latent of `side` pixels costs in each evaluation. `context`: projecting `contexts`
    contexts, which the plain form does in every evaluation as well.
    """
    every, of_contexts, pixels = 0, 0, side**2
    areas = _areas(unet, pixels)
    for name, layer in unet.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d):
            continue
        multiplications = layer.weight.numel()
        if name.startswith("context_emb") or name.endswith("c_proj_in"):
            of_contexts += 2 * multiplications
        elif name.endswith(("cross_attention.to_k", "cross_attention.to_v")):
            of_contexts += 2 * multiplications * 32
        elif name.endswith("_emb") or "time_emb" in name:
            every += 2 * multiplications
        else:
            every += 2 * multiplications * areas[name]
        if name.endswith("to_q"):
            keys = 32 if "cross_attention" in name else areas[name]
            every += 4 * areas[name] * keys * layer.out_channels
    return {"every pass": every, "context": of_contexts * contexts}


def _areas(unet: ConditionalUNet, pixels: int) -> dict[str, int]:
    """The pixels that every layer works on: of its output, or of its input if that is what it spreads."""
    areas = {}
    for part, factor in (("down", 0.25), ("middle", 1.0), ("up", 4.0)):
        stages = [("middle", unet.middle)] if part == "middle" else getattr(unet, part).named_children()
        for number, stage in stages:
            path = part if part == "middle" else f"{part}.{number}"
            resamples = hasattr(stage, "conv")
            if resamples and part == "down":
                pixels = int(pixels * factor)
            areas |= {f"{path}.{name}": pixels for name, _ in stage.named_modules()}
            if resamples and part == "up":
                pixels = int(pixels * factor)
    return areas | {"image_proj": pixels, "final": pixels}

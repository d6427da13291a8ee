"""Reference outputs of the diffusion networks and samplers, and small networks for tests without them."""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from negfacediff_core.diffusion.checkpoint import save_generator
from negfacediff_core.diffusion.first_stage import FirstStageSettings, VQDecoder, VQEncoder
from negfacediff_core.diffusion.unet import ConditionalUNet

DATA = Path(__file__).parent / "data"

TINY_MODEL = {
    "input_channels": 3,
    "initial_channels": 32,
    "channel_multipliers": (1, 2),
    "is_attention": (False, True),
    "n_blocks_per_resolution": 1,
    "context_input_channels": 16,
    "context_channels": 32,
}

TINY_FIRST_STAGE = FirstStageSettings(ch=32, ch_mult=(1, 2), num_res_blocks=1, n_embed=16)
TINY_DIFFUSION = {"T": 50, "schedule_type": "linear"}

# Where a release that this project saves keeps its weights.
UNET_FILE = "checkpoints/ema_averaged_model.ckpt"
DECODER_FILE = "first_stage_decoder_state_dict.pt"
ENCODER_FILE = "first_stage_encoder_state_dict.pt"


class Reference(NamedTuple):
    """One file of reference outputs: its configuration, the weights, and the other arrays."""

    config: dict
    weights: dict[str, torch.Tensor]
    arrays: dict[str, torch.Tensor]


@cache
def reference(name: str) -> Reference:
    """Read `tests/data/NAME.npz`; its weights lie on a coarse grid, so half precision holds them exactly."""
    with np.load(DATA / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "config_json"}
        config = json.loads(str(file["config_json"]))
    weights = {
        key.removeprefix("sd/"): value.float() for key, value in arrays.items() if key.startswith("sd/")
    }
    return Reference(
        config, weights, {key: value for key, value in arrays.items() if not key.startswith("sd/")}
    )


def manifest(name: str) -> dict:
    """Read `tests/data/NAME.json`: the keys, shapes and types of a full-size state dict, in order."""
    return json.loads((DATA / f"{name}.json").read_text())


def described(module: nn.Module, prefix: str = "") -> list[list]:
    """A module's state dict as a manifest lists it."""
    return [
        [prefix + key, list(value.shape), str(value.dtype).removeprefix("torch.")]
        for key, value in module.state_dict().items()
    ]


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter with random numbers: a fresh network ends in zeros and would predict nothing."""
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 1.0 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=numbers) * scale)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1.0)
    return module.eval()


def reference_unet(file: Reference) -> ConditionalUNet:
    """The network that a reference was computed with."""
    unet = ConditionalUNet(**file.config.get("unet", file.config))
    unet.load_state_dict(file.weights)
    return unet.eval()


def save_tiny(folder: Path, **model) -> tuple[ConditionalUNet, VQDecoder, VQEncoder]:
    """Save a tiny random generator for images of 16 pixels; `model` changes TINY_MODEL."""
    model = TINY_MODEL | model
    unet = randomised(ConditionalUNet(**model))
    decoder, encoder = randomised(VQDecoder(TINY_FIRST_STAGE)), randomised(VQEncoder(TINY_FIRST_STAGE))
    save_generator(
        folder,
        unet,
        decoder,
        encoder,
        model=model,
        diffusion=TINY_DIFFUSION,
        image_size=16,
        conditioner_sha256="ab12",
    )
    return unet, decoder, encoder


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether two networks have the same keys in the same order, and bit for bit the same float32 weights."""
    states = first.state_dict(), second.state_dict()
    return list(states[0]) == list(states[1]) and all(
        value.dtype == torch.float32 and torch.equal(value, states[1][key])
        for key, value in states[0].items()
    )

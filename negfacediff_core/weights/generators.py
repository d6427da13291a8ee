"""Inspection of generators, and of state dicts that belong into one."""

import inspect
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from negfacediff_core.diffusion.checkpoint import (
    Release,
    fill,
    open_release,
    read_weights,
    weight_file,
    weight_files,
)
from negfacediff_core.diffusion.first_stage import VQDecoder
from negfacediff_core.diffusion.release_config import CONFIG_FILE
from negfacediff_core.diffusion.state_dicts import (
    FIRST_STAGE_PARTS,
    FIRST_STAGE_PREFIX,
    UNET_PREFIX,
    read_nested,
)
from negfacediff_core.diffusion.unet import ConditionalUNet
from negfacediff_core.errors import WeightsError
from negfacediff_core.weights.inspection import (
    GENERATOR,
    SINGLE_FILE,
    Inspection,
    Part,
    Trial,
    WeightFile,
    finite_or_not,
    hash_file,
    licence_of,
    tried,
    types_of,
)


def inspect_generator(folder: Path) -> Inspection:
    """Inspect a release folder: every key of its networks, then one evaluation and one decoding."""
    files = weight_files(folder)
    release = open_release(folder)
    networks: dict[str, nn.Module] = {"unet": release.unet, "decoder": release.decoder}
    try:
        files["encoder"] = weight_file(folder, "encoder")
        networks["encoder"] = release.encoder
    except WeightsError:
        pass  # only training encodes
    parts, states, problem = [], {}, None
    for role, network in networks.items():
        parameters = sum(parameter.numel() for parameter in network.parameters())
        try:
            states[role] = read_weights(release, role)
            keys = f"{len(states[role]):,} keys, all as configured"
            parts.append(Part(role, parameters, types_of(states[role].values()), keys))
        except WeightsError as error:
            parts.append(Part(role, parameters, "", "does not fit"))
            problem = problem or str(error)
    inspection = Inspection(
        kind=GENERATOR,
        facts=_generator_facts(release),
        parts=tuple(parts),
        files=_hashed(files),
        licence=licence_of(folder),
        problem=problem,
    )
    if problem:
        return inspection
    unet, decoder = (fill(networks[role], states.pop(role), "cpu") for role in ("unet", "decoder"))
    return tried(inspection, _sample_once, unet, decoder, release)


def inspect_state_dict(path: Path) -> Inspection:
    """Say what a lone state dict is. It cannot run: its configuration stands in another file."""
    state = read_nested(path)
    name = _recognise(state)
    count = sum(value.numel() for value in state.values())
    return Inspection(
        kind=SINGLE_FILE,
        facts={"holds": name},
        parts=(Part(path.name, count, types_of(state.values()), f"{len(state):,} keys, not compared"),),
        files=(hash_file("state dict", path),),
        licence=licence_of(path),
        problem=f"{path} is {name} and cannot run alone: a generator is a folder with {CONFIG_FILE}, the "
        "U-Net under checkpoints/ and the first stage beside it. Put it into one and check that folder.",
    )


def _hashed(paths: Mapping[str, Path]) -> tuple[WeightFile, ...]:
    """Hash files given by role; one that serves several roles is listed once."""
    roles: dict[Path, list[str]] = {}
    for role, path in paths.items():
        roles.setdefault(path, []).append(role)
    return tuple(hash_file(", ".join(names), path) for path, names in roles.items())


def _generator_facts(release: Release) -> dict[str, str]:
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(ConditionalUNet).parameters.items()
    }
    model = defaults | dict(release.config["model"])
    settings, diffusion = release.decoder.settings, release.config["diffusion"]
    channels, _, side = release.latent_shape
    heads = (
        f"heads of {model['attention_head_channels']}"
        if model["attention_heads"] == -1
        else f"{model['attention_heads']} heads"
    )
    facts = {
        "condition": "none (unconditional)",
        "channels": f"{model['initial_channels']} x {_list(model['channel_multipliers'])}",
        "attention": f"{_list('yes' if used else 'no' for used in model['is_attention'])}, {heads}",
        "blocks": f"{model['n_blocks_per_resolution']} a resolution",
        "schedule": f"{diffusion.get('schedule_type', 'linear')}, T = {release.schedule.T:,}",
        "latents": f"{channels} x {side} x {side}, {settings.n_embed:,} codes",
        "images": f"{release.image_size} x {release.image_size} RGB",
    }
    if release.unet.is_context_conditional:
        classes, width = release.unet.context_classes, release.unet.context_width
        learned = release.unet.learn_empty_context
        facts |= {
            "condition": str(model["condition_type"]),
            "contexts": f"{classes:,} classes" if classes else f"vectors of {width}",
            "projected to": str(model["context_channels"]),
            "partial dropout": f"{model['context_dropout_probability']:.0%} (CPD, in training)",
            "empty context": "learned" if learned else "zeros",
        }
    conditioner = release.config["constants"].get("conditioner_sha256")
    return facts | ({"conditioned by": f"recogniser with sha256 {conditioner}"} if conditioner else {})


@torch.inference_mode()
def _sample_once(unet: ConditionalUNet, decoder: VQDecoder, release: Release) -> Iterable[Trial]:
    """One evaluation of the network and one decoding, both at batch 1, from Gaussian latents."""
    latents = torch.randn(1, *release.latent_shape, generator=torch.Generator().manual_seed(0))
    context = None
    if unet.context_classes:
        context = torch.zeros(1, dtype=torch.int64)
    elif unet.context_width:
        context = torch.full((1, unet.context_width), unet.context_width**-0.5)
    started = time.perf_counter()
    noise = unet(latents, torch.tensor([release.schedule.T - 1]), context)
    yield Trial("network evaluation", time.perf_counter() - started, finite_or_not(noise))
    started = time.perf_counter()
    image = decoder(latents)
    yield Trial("decoding", time.perf_counter() - started, finite_or_not(image))


def _recognise(state: Mapping[str, Tensor]) -> str:
    """What a state dict is, by its keys."""
    autoencoder = tuple(prefix for prefixes in FIRST_STAGE_PARTS.values() for prefix in prefixes)
    if f"{UNET_PREFIX}image_proj.weight" in state or "image_proj.weight" in state:
        return "a U-Net in the IDiff-Face layout"
    if any(key.startswith(FIRST_STAGE_PREFIX) for key in state):
        return "a whole latent-diffusion model with its first stage"
    if any(key.startswith(autoencoder) for key in state):
        return "a VQ first stage in the CompVis layout"
    return "a state dict of nothing that is used here"


def _list(values: Iterable[object]) -> str:
    return "-".join(str(value) for value in values)

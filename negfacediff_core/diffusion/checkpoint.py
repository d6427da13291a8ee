"""Reading and writing generators in the release layout of IDiff-Face (arXiv 2308.04995).

FOLDER/.hydra/config.yaml                        constants, latent_diffusion, diffusion, model
FOLDER/checkpoints/ema_averaged_model.ckpt       or ema_averaged_model_<step>.ckpt, or model.ckpt
FOLDER/first_stage_decoder_state_dict.pt         or under checkpoints/
FOLDER/first_stage_encoder_state_dict.pt         likewise; only training needs it
FOLDER/first_stage.ckpt                          in place of these two: a checkpoint of latent diffusion

Each may be a `.safetensors` file instead; where both stand, the one named above is taken.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import Tensor, nn

from negfacediff_core.diffusion.first_stage import VQDecoder, VQEncoder
from negfacediff_core.diffusion.release_config import (
    CONFIG_FILE,
    first_stage_settings,
    read_config,
    side_of_images,
)
from negfacediff_core.diffusion.schedule import NoiseSchedule, schedule_from_config
from negfacediff_core.diffusion.state_dicts import (
    UNET_PREFIX,
    check_fit,
    read_first_stage,
    read_state_dict,
    unet_weights,
)
from negfacediff_core.diffusion.unet import ConditionalUNet
from negfacediff_core.errors import ConfigError, WeightsError
from negfacediff_core.tensor_files import replacing, write_tensors

Module = TypeVar("Module", bound=nn.Module)

SUFFIXES = {"unet": (".ckpt", ".safetensors"), "first stage": (".pt", ".safetensors")}
WHOLE_FIRST_STAGE = ("first_stage.ckpt", "first_stage.safetensors")


@dataclass(frozen=True, eq=False)
class Generator:
    """A loaded generator: networks in evaluation mode on one device, and what a caller must know of them.

    `latent_shape` is (channels, height, width); `context_width` the length of an identity context, 0 where
    the generator takes no vectors (it is unconditional, or its contexts are classes); `image_size` the side
    of its square images. `encoder` is None unless asked for.
    """

    unet: ConditionalUNet
    schedule: NoiseSchedule
    decoder: VQDecoder
    encoder: VQEncoder | None
    latent_shape: tuple[int, int, int]
    context_width: int
    image_size: int
    folder: Path


@dataclass(frozen=True, eq=False)
class Release:
    """What the configuration of a release folder describes: the networks have shapes but no weights yet.

    `unet`, `decoder` and `encoder` are on the meta device; `latent_shape` and `image_size` as in `Generator`.
    """

    folder: Path
    config: Mapping[str, Mapping[str, Any]]
    schedule: NoiseSchedule
    unet: ConditionalUNet
    decoder: VQDecoder
    encoder: VQEncoder
    latent_shape: tuple[int, int, int]
    image_size: int


def load_generator(
    folder: str | Path, device: torch.device | str = "cpu", with_encoder: bool = False
) -> Generator:
    """Load a release folder onto `device`, in float32.

    Raises `WeightsError` for missing, damaged or mismatching files, naming the first keys that are missing,
    unknown or of another shape, and `ConfigError` for a configuration that cannot be built.
    """
    weight_files(folder)  # what is missing is said before anything is read
    release = open_release(folder)
    encoder = None
    if with_encoder:
        encoder = fill(release.encoder, read_weights(release, "encoder"), device)
    return Generator(
        unet=fill(release.unet, read_weights(release, "unet"), device),
        schedule=release.schedule,
        decoder=fill(release.decoder, read_weights(release, "decoder"), device),
        encoder=encoder,
        latent_shape=release.latent_shape,
        context_width=release.unet.context_width,
        image_size=release.image_size,
        folder=release.folder,
    )


def open_release(folder: str | Path) -> Release:
    """Read the configuration of a release folder and lay out its networks; no weights are read.

    Raises `WeightsError` where there is no configuration, `ConfigError` for one that cannot be built.
    """
    config = read_config(folder)
    schedule = schedule_from_config(config["diffusion"])
    settings = first_stage_settings(config)
    with torch.device("meta"):
        unet = _build_unet(config["model"])
        decoder, encoder = VQDecoder(settings), VQEncoder(settings)
    if unet.input_channels != settings.embed_dim:
        raise ConfigError(
            f"{CONFIG_FILE}: model.input_channels is {unet.input_channels}, but the first stage's latents "
            f"have {settings.embed_dim} channels; one of the two belongs to another release."
        )
    size = side_of_images(config, settings)
    side = size // settings.downsampling
    return Release(
        folder=Path(folder),
        config=config,
        schedule=schedule,
        unet=unet,
        decoder=decoder,
        encoder=encoder,
        latent_shape=(unet.input_channels, side, side),
        image_size=size,
    )


def read_weights(release: Release, role: str) -> dict[str, Tensor]:
    """Read the weights of `unet`, `decoder` or `encoder` as they are stored, once they fit that network.

    Raises `WeightsError` for a missing or damaged file and for keys that do not fit.
    """
    path = weight_file(release.folder, role)
    if role == "unet":
        state = unet_weights(read_state_dict(path), release.schedule, path)
    elif path.name in WHOLE_FIRST_STAGE:
        state = read_first_stage(path, role)
    else:
        state = read_state_dict(path)
    check_fit(getattr(release, role), state, path)
    return state


def fill(module: Module, state: Mapping[str, Tensor], device: torch.device | str) -> Module:
    """Give a network on the meta device its weights, in float32 on `device`, and make it ready to use."""
    module = module.to_empty(device=device)
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


def save_generator(
    folder: str | Path,
    unet: ConditionalUNet,
    decoder: VQDecoder,
    encoder: VQEncoder,
    *,
    model: Mapping[str, Any],
    diffusion: Mapping[str, Any],
    image_size: int,
    conditioner_sha256: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a release folder that `load_generator` reads back.

    `unet` holds the averaged weights and `model` the keywords that it was built with; `diffusion` holds `T`
    and `schedule_type`. `conditioner_sha256` identifies the recogniser that made the contexts, so that nobody
    judges the generator by it. Weights are stored as `dtype`; the schedule's constants stay float32. Each
    file is replaced in one piece, the configuration last.
    """
    folder = Path(folder)
    constants: dict[str, Any] = {"input_channels": unet.input_channels, "image_size": image_size}
    if conditioner_sha256 is not None:
        constants["conditioner_sha256"] = conditioner_sha256
    config = {
        "constants": constants,
        "latent_diffusion": {"first_stage": decoder.settings.to_config()},
        "diffusion": dict(diffusion),
        "model": {key: list(value) if isinstance(value, tuple) else value for key, value in model.items()},
    }
    weights = {UNET_PREFIX + key: value for key, value in _stored(unet, dtype).items()}
    states = {
        folder / "checkpoints" / "ema_averaged_model.ckpt": schedule_from_config(diffusion).buffers()
        | weights,
        folder / "first_stage_decoder_state_dict.pt": _stored(decoder, dtype),
        folder / "first_stage_encoder_state_dict.pt": _stored(encoder, dtype),
    }
    for path, state in states.items():
        write_tensors(path, state)
    with replacing(folder / CONFIG_FILE) as file:
        file.write(yaml.safe_dump(config, sort_keys=False).encode())


def weight_files(folder: str | Path) -> dict[str, Path]:
    """The files that decide what a generator makes, by role: `config`, `unet`, `decoder`. Hash these.

    Raises `WeightsError` if one is missing.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise WeightsError(
            f"There is no generator at {folder}: {CONFIG_FILE} is missing. Give the folder of a release, "
            f"which holds {CONFIG_FILE}, checkpoints/ and the first stage's state dicts."
        )
    return {"config": folder / CONFIG_FILE} | {
        role: weight_file(folder, role) for role in ("unet", "decoder")
    }


def weight_file(folder: str | Path, role: str) -> Path:
    """The file with the weights of `unet`, `decoder` or `encoder`. Raises `WeightsError` if there is none."""
    folder = Path(folder)
    return _unet_file(folder) if role == "unet" else _first_stage_file(folder, role)


def _build_unet(model: Mapping[str, Any]) -> ConditionalUNet:
    # keys such as _target_ tell Hydra what to instantiate
    keywords = {key: value for key, value in model.items() if not key.startswith("_")}
    try:
        return ConditionalUNet(**keywords)
    except TypeError as error:
        raise ConfigError(
            f"{CONFIG_FILE}: the section model does not describe this network: {error}."
        ) from error


def _unet_file(folder: Path) -> Path:
    checkpoints = folder / "checkpoints"
    numbered = {
        int(found[1]): path.stem
        for path in checkpoints.glob("ema_averaged_model_*")
        if (found := re.fullmatch(r"ema_averaged_model_(\d+)", path.stem)) and path.suffix in SUFFIXES["unet"]
    }
    last = [numbered[max(numbered)]] if numbered else []
    for name in ("ema_averaged_model", *last, "model"):
        for suffix in SUFFIXES["unet"]:
            if (path := checkpoints / (name + suffix)).is_file():
                return path
    raise WeightsError(
        f"{checkpoints} holds no weights: put ema_averaged_model.ckpt, ema_averaged_model_<step>.ckpt or "
        "model.ckpt there (or the same as .safetensors)."
    )


def _first_stage_file(folder: Path, part: str) -> Path:
    name = f"first_stage_{part}_state_dict"
    for file in (*(name + suffix for suffix in SUFFIXES["first stage"]), *WHOLE_FIRST_STAGE):
        for path in (folder / file, folder / "checkpoints" / file):
            if path.is_file():
                return path
    raise WeightsError(
        f"{folder} holds no {name}.pt: put the first stage's {part} there or under checkpoints/ (or as "
        f".safetensors, or a whole autoencoder as {WHOLE_FIRST_STAGE[0]})."
    )


def _stored(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.detach().to("cpu", dtype).clone() for key, value in module.state_dict().items()}

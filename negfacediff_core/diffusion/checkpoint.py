"""Reading and writing generators in the release layout of IDiff-Face (arXiv 2308.04995).

FOLDER/.hydra/config.yaml                        constants, latent_diffusion, diffusion, model
FOLDER/checkpoints/ema_averaged_model.ckpt       or ema_averaged_model_<step>.ckpt, or model.ckpt
FOLDER/first_stage_decoder_state_dict.pt         or under checkpoints/
FOLDER/first_stage_encoder_state_dict.pt         likewise; only training needs it
"""

import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from negfacediff_core.diffusion.unet import ConditionalUNet
from negfacediff_core.errors import ConfigError, WeightsError
from negfacediff_core.tensor_files import read_tensors

UNET_PREFIX = "eps_model."

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Generator:
    """A loaded generator: networks in evaluation mode on one device, and what a caller must know of them.

    `latent_shape` is (channels, height, width); `context_width` the length of an identity context, 0 for an
    unconditional generator; `image_size` the side of its square images. `encoder` is None unless asked for.
    """

    unet: ConditionalUNet
    schedule: NoiseSchedule
    decoder: VQDecoder
    encoder: VQEncoder | None
    latent_shape: tuple[int, int, int]
    context_width: int
    image_size: int
    folder: Path


def load_generator(
    folder: str | Path, device: torch.device | str = "cpu", with_encoder: bool = False
) -> Generator:
    """Load a release folder onto `device`, in float32.

    Raises `WeightsError` for missing, damaged or mismatching files, naming the first keys that are missing,
    unknown or of another shape, and `ConfigError` for a configuration that cannot be built.
    """
    folder = Path(folder)
    files = weight_files(folder)
    config = read_config(folder)
    schedule = schedule_from_config(config["diffusion"])
    settings = first_stage_settings(config)
    size = side_of_images(config, settings)
    unet = _load(lambda: _build_unet(config["model"]), files["unet"], device, schedule)
    decoder = _load(lambda: VQDecoder(settings), files["decoder"], device)
    encoder = None
    if with_encoder:
        encoder = _load(lambda: VQEncoder(settings), _first_stage_file(folder, "encoder"), device)
    latent_side = size // settings.downsampling
    return Generator(
        unet=unet,
        schedule=schedule,
        decoder=decoder,
        encoder=encoder,
        latent_shape=(unet.input_channels, latent_side, latent_side),
        context_width=unet.context_width if unet.is_context_conditional else 0,
        image_size=size,
        folder=folder,
    )


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
        with _replacing(path) as temporary:
            torch.save(state, temporary)
    with _replacing(folder / CONFIG_FILE) as temporary:
        temporary.write_text(yaml.safe_dump(config, sort_keys=False))


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
    return {
        "config": folder / CONFIG_FILE,
        "unet": _unet_file(folder),
        "decoder": _first_stage_file(folder, "decoder"),
    }


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a flat dict of tensors. Raises `WeightsError` for anything else; never runs code from the file."""
    try:
        state = read_tensors(path, "cpu")
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is damaged or holds more than tensors and was not loaded. Bring a state dict of tensors."
        ) from error
    except Exception as error:  # torch raises a dozen unrelated types for a damaged file
        raise WeightsError(f"{path} cannot be read: it is damaged or incomplete. Fetch it again.") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} does not hold a flat state dict (names to tensors).")
    return state


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

    def step(path: Path) -> int:
        found = re.fullmatch(r"ema_averaged_model_(\d+)\.ckpt", path.name)
        return int(found[1]) if found else -1

    numbered = sorted((path for path in checkpoints.glob("*.ckpt") if step(path) >= 0), key=step)
    for path in (checkpoints / "ema_averaged_model.ckpt", *numbered[-1:], checkpoints / "model.ckpt"):
        if path.is_file():
            return path
    raise WeightsError(
        f"{checkpoints} holds no weights: put ema_averaged_model.ckpt, ema_averaged_model_<step>.ckpt or "
        "model.ckpt there."
    )


def _first_stage_file(folder: Path, part: str) -> Path:
    name = f"first_stage_{part}_state_dict.pt"
    for path in (folder / name, folder / "checkpoints" / name):
        if path.is_file():
            return path
    raise WeightsError(f"{folder} holds no {name}: put the first stage's {part} there or under checkpoints/.")


def _load(
    build: Callable[[], Module], path: Path, device: torch.device | str, schedule: NoiseSchedule | None = None
) -> Module:
    """Build a network without initialising it and fill it from a state dict that must match exactly."""
    state = read_state_dict(path)
    if schedule is not None:
        state = _without_schedule(state, schedule, path)
    with torch.device("meta"):
        module = build()
    _check_keys(module, state, path)
    module = module.to_empty(device=device)
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


def _without_schedule(state: dict[str, Tensor], schedule: NoiseSchedule, path: Path) -> dict[str, Tensor]:
    """Take the network's keys out of a checkpoint that holds the schedule's constants beside them.

    Some releases hold the network's keys alone, without their prefix; those pass unchanged.
    """
    if not any(key.startswith(UNET_PREFIX) for key in state):
        return state
    constants = schedule.buffers()
    configured = constants["alpha_bars"]
    stored = state.get("alpha_bars", configured).float()
    if stored.shape != configured.shape or not torch.allclose(stored, configured, atol=1e-5):
        raise WeightsError(
            f"{path} was trained with another noise schedule than {CONFIG_FILE} says: its alpha_bars differ. "
            "Correct diffusion.T or diffusion.schedule_type."
        )
    return {key.removeprefix(UNET_PREFIX): value for key, value in state.items() if key not in constants}


def _check_keys(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    expected = module.state_dict()
    misshaped = [
        f"{key} is {tuple(state[key].shape)} and should be {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    problems = [
        f"{len(found)} {title} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for title, found in (
            ("missing", [key for key in expected if key not in state]),
            ("unknown", [key for key in state if key not in expected]),
            ("of another shape", misshaped),
        )
        if found
    ]
    if problems:
        raise WeightsError(
            f"The keys of {path} do not fit the {type(module).__name__} that {CONFIG_FILE} describes: "
            f"{'; '.join(problems)}."
        )


def _stored(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.detach().to("cpu", dtype).clone() for key, value in module.state_dict().items()}


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` once its contents are written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    yield temporary
    temporary.replace(path)

"""State dicts in the layouts of the field: reading them, cutting out a network, and whether it fits.

- A U-Net: the keys of IDiff-Face (arXiv 2308.04995) after `eps_model.`, beside the schedule's constants; some
  releases hold the network's keys alone, without the prefix.
- A first stage: one file for the decoder and one for the encoder, or a checkpoint of latent diffusion
  (arXiv 2112.10752) that holds both: the autoencoder's own, or that of a whole model, where the
  autoencoder's keys stand after `first_stage_model.`.
"""

import pickle
import re
import shlex
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from negfacediff_core.diffusion.release_config import CONFIG_FILE
from negfacediff_core.diffusion.schedule import NoiseSchedule
from negfacediff_core.errors import WeightsError
from negfacediff_core.tensor_files import read_tensors

UNET_PREFIX = "eps_model."
FIRST_STAGE_PREFIX = "first_stage_model."
FIRST_STAGE_PARTS = {
    "decoder": ("decoder.", "quantize.", "post_quant_conv."),
    "encoder": ("encoder.", "quant_conv."),
}
# what checkpoints of latent diffusion hold besides: losses, the diffusion model, averages, the conditioner
LEFT_ASIDE = ("loss.", "model.", "model_ema.", "cond_stage_model.")

STORED_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Keeps the weights of a checkpoint and nothing else. What the file asks for besides tensors is replaced by
# empty classes of its name, so that `weights_only` can stay on: none of the file's code is imported or run.
KEEP_TENSORS = (
    'python -c "import torch, torch.serialization as s; old, new = {old!r}, {new!r}; '
    "s.add_safe_globals([(type(n, (), {{}}), n) for n in s.get_unsafe_globals_in_checkpoint(old)]); "
    "torch.save(torch.load(old, 'cpu', weights_only=True)['state_dict'], new)\""
)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a flat dict of tensors. Raises `WeightsError` for anything else; never runs code from the file."""
    return _flat(_read(path), path)


def read_nested(path: Path) -> dict[str, Tensor]:
    """Read a state dict that is the whole file, or lies under `state_dict` in a training checkpoint.

    Raises `WeightsError` as `read_state_dict` does.
    """
    content = _read(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    return _flat(content, path)


def read_first_stage(path: Path, part: str) -> dict[str, Tensor]:
    """Cut the `decoder` or the `encoder` out of a checkpoint of latent diffusion that holds both.

    The file is read by `read_nested`. Other known parts of such a checkpoint are left aside; keys of no known
    part are a `WeightsError` that names them.
    """
    state = read_nested(path)
    strays: list[str] = []
    if any(key.startswith(FIRST_STAGE_PREFIX) for key in state):
        outside = [key for key in state if not key.startswith(FIRST_STAGE_PREFIX)]
        # the schedule's constants and scalars of a whole model have no dot in their names
        strays = [key for key in outside if "." in key and not key.startswith(LEFT_ASIDE)]
        for key in outside:
            del state[key]
        state = {key.removeprefix(FIRST_STAGE_PREFIX): value for key, value in state.items()}
    known = (*chain.from_iterable(FIRST_STAGE_PARTS.values()), *LEFT_ASIDE)
    strays += [key for key in state if not key.startswith(known)]
    if strays:
        raise WeightsError(
            f"{path} is no checkpoint of a latent-diffusion autoencoder: {_first(strays, 'unknown')}. Its "
            f"keys begin with {', '.join(known)}, or with {FIRST_STAGE_PREFIX} before these."
        )
    return {key: value for key, value in state.items() if key.startswith(FIRST_STAGE_PARTS[part])}


def unet_weights(state: Mapping[str, Tensor], schedule: NoiseSchedule, path: Path) -> dict[str, Tensor]:
    """Take the network's keys out of a checkpoint that holds the schedule's constants beside them.

    Some releases hold the network's keys alone, without their prefix; those pass unchanged. Raises
    `WeightsError` where the constants are not those of `schedule`.
    """
    if not any(key.startswith(UNET_PREFIX) for key in state):
        return dict(state)
    constants = schedule.buffers()
    configured = constants["alpha_bars"]
    stored = state.get("alpha_bars", configured).float()
    if stored.shape != configured.shape or not torch.allclose(stored, configured, atol=1e-5):
        raise WeightsError(
            f"{path} was trained with another noise schedule than {CONFIG_FILE} says: its alpha_bars differ. "
            "Correct diffusion.T or diffusion.schedule_type."
        )
    return {key.removeprefix(UNET_PREFIX): value for key, value in state.items() if key not in constants}


def check_fit(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Raise `WeightsError`, naming the first keys, unless `state` has just the keys and shapes of `module`.

    Any floating-point type will do (weights are computed with in float32 whatever they were stored in);
    integers are quantised weights, which mean nothing without their scales.
    """
    expected = module.state_dict()
    common = {key: value for key, value in expected.items() if key in state}
    misshaped = [
        f"{key} is {tuple(state[key].shape)} and should be {tuple(value.shape)}"
        for key, value in common.items()
        if state[key].shape != value.shape
    ]
    mistyped = [f"{key} is {_type_of(state[key])}" for key in common if not _is_plain(state[key])]
    problems = [
        _first(found, title)
        for title, found in (
            ("missing", [key for key in expected if key not in state]),
            ("unknown", [key for key in state if key not in expected]),
            ("of another shape", misshaped),
            ("not stored as plain floating-point numbers", mistyped),
        )
        if found
    ]
    if problems:
        raise WeightsError(
            f"The keys of {path} do not fit the {type(module).__name__} that {CONFIG_FILE} describes: "
            f"{'; '.join(problems)}."
        )


def _read(path: Path) -> Any:
    try:
        return read_tensors(path, "cpu")
    except pickle.UnpicklingError as error:
        raise _foreign(path, str(error)) from error
    except PermissionError as error:
        raise WeightsError(f"{path} cannot be read: this user may not. Change its permissions.") from error
    except Exception as error:  # torch raises a dozen unrelated types for a damaged file
        raise WeightsError(f"{path} cannot be read: it is damaged or incomplete. Fetch it again.") from error


def _foreign(path: Path, reason: str) -> WeightsError:
    """What to say of a file that asks for more than tensors, or is no file of torch at all."""
    asked = re.search(r"GLOBAL (\w+(?:\.\w+)+)", reason)
    # Names that a shell would read as commands must not stand in a command that people copy.
    if asked is None or shlex.quote(path.name) != path.name:
        return WeightsError(
            f"{path} is damaged or holds more than tensors and was not loaded. Bring a state dict of tensors."
        )
    recipe = KEEP_TENSORS.format(old=path.name, new=f"{path.stem}-tensors{path.suffix}")
    return WeightsError(
        f"{path} holds more than tensors (it asks for {asked[1]}) and was not loaded, because such a file "
        "can run any code. A training checkpoint keeps its weights under state_dict: to take them out "
        f"without running anything of the file, run {recipe} in its folder and put the result in its place."
    )


def _flat(content: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise WeightsError(f"{path} does not hold a flat state dict (names to tensors).")
    return dict(content)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype in STORED_TYPES and tensor.layout == torch.strided and not tensor.is_meta


def _type_of(tensor: Tensor) -> str:
    return str(tensor.dtype if tensor.dtype not in STORED_TYPES else tensor.layout).removeprefix("torch.")


def _first(found: list[str], title: str) -> str:
    """E.g. "2 missing (a, b)": the first three of `found`."""
    return f"{len(found)} {title} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"

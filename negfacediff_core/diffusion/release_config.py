"""The `.hydra/config.yaml` of a release (arXiv 2308.04995): which network, schedule and first stage."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from negfacediff_core.diffusion.checks import check_whole
from negfacediff_core.diffusion.first_stage import FirstStageSettings
from negfacediff_core.errors import ConfigError, WeightsError

CONFIG_FILE = Path(".hydra/config.yaml")
LARGEST_IMAGE = 4096

Config = Mapping[str, Mapping[str, Any]]


def read_config(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Read the sections of `.hydra/config.yaml` that describe a generator, with `${a.b}` references resolved.

    Raises `WeightsError` if the file is missing and `ConfigError` if it is not such a configuration.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise WeightsError(f"There is no generator at {folder}: {CONFIG_FILE} is missing.") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    try:
        return _sections(tree, path)
    except RecursionError:
        raise ConfigError(f"{path} is nested without end: one of its values holds itself.") from None


def first_stage_settings(config: Config) -> FirstStageSettings:
    """The first stage that a configuration describes under `latent_diffusion.first_stage`.

    Releases describe none; they all use the "ffhq256" autoencoder of latent diffusion, which is the default.
    """
    described = config["latent_diffusion"].get("first_stage")
    return FirstStageSettings.from_config(described) if isinstance(described, dict) else FirstStageSettings()


def side_of_images(config: Config, settings: FirstStageSettings) -> int:
    """Side of the generator's images in pixels. Raises `ConfigError` where the networks cannot make it."""
    size: Any = config["constants"].get("image_size")
    # the first stage and the levels of the U-Net each halve the side
    levels = len(config["model"].get("channel_multipliers", (1, 2, 2, 2)))
    step = settings.downsampling * 2 ** (levels - 1)
    check_whole(f"{CONFIG_FILE}: constants.image_size", size, lowest=step, highest=LARGEST_IMAGE, step=step)
    return size


def _sections(tree: Any, path: Path) -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {}
    for name in ("constants", "diffusion", "model"):
        section = tree.get(name) if isinstance(tree, dict) else None
        if not isinstance(section, dict):
            raise ConfigError(f"{path} has no section {name!r}; a generator's configuration needs it.")
        sections[name] = _resolve(section, tree, path, ())
    latent = tree.get("latent_diffusion")
    sections["latent_diffusion"] = _resolve(latent, tree, path, ()) if isinstance(latent, dict) else {}
    return sections


def _resolve(value: Any, tree: Mapping[str, Any], path: Path, through: tuple[str, ...]) -> Any:
    """Replace `${a.b}` by what stands at a.b, keeping its type where it is the whole value."""
    if isinstance(value, dict):
        return {key: _resolve(item, tree, path, through) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, tree, path, through) for item in value]
    if not isinstance(value, str):
        return value
    whole = re.fullmatch(r"\$\{([^${}]+)\}", value)
    if whole:
        return _look_up(whole[1], tree, path, through)
    return re.sub(r"\$\{([^${}]+)\}", lambda found: str(_look_up(found[1], tree, path, through)), value)


def _look_up(reference: str, tree: Mapping[str, Any], path: Path, through: tuple[str, ...]) -> Any:
    if reference in through:
        raise ConfigError(f"{path}: ${{{reference}}} refers to itself.")
    node: Any = tree
    for key in reference.split("."):
        if not isinstance(node, dict) or key not in node:
            raise ConfigError(f"{path}: ${{{reference}}} refers to nothing in this file.")
        node = node[key]
    return _resolve(node, tree, path, (*through, reference))

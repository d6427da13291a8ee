"""Recipes for the training of recognisers: from a name or a YAML file, and settings, to a checked config."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from flows.presets import apply_setting, explain, read_values
from negfacediff_core.errors import ConfigError
from negfacediff_core.recognition.recipe import RecogniserConfig, TrainingExecution

_Config = TypeVar("_Config", bound=BaseModel)


def recipe_texts() -> dict[str, str]:
    """Return the recipes that ship: name -> YAML text, sorted by name."""
    folder = files("deployments") / "recognisers"
    found = {
        item.name.removesuffix(".yaml"): item for item in folder.iterdir() if item.name.endswith(".yaml")
    }
    return {name: found[name].read_text(encoding="utf-8") for name in sorted(found)}


def recipe_text(name: str) -> str:
    """Return the YAML text of the recipe `name`; raises ConfigError."""
    texts = recipe_texts()
    if name not in texts:
        raise ConfigError(
            f"There is no recipe {name!r}: recipes are {', '.join(texts)}; a file of your own ends in .yaml."
        )
    return texts[name]


def load_recipe(source: str, settings: Sequence[str] = ()) -> RecogniserConfig:
    """Read a shipped recipe by name or a YAML file, and apply `field=value` settings; raises ConfigError."""
    values = read_values(source, recipe_text)
    for setting in settings:
        apply_setting(values, setting)
    return _checked(RecogniserConfig, values, f"{source}: ")


def check_training_execution(values: Mapping[str, Any]) -> TrainingExecution:
    """Validate where a training is to run; raises ConfigError."""
    return _checked(TrainingExecution, values, "")


def _checked(model: type[_Config], values: Mapping[str, Any], where: str) -> _Config:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}{explain(error, model)}") from error

"""Stored calibrations: how fast named devices are, each with how that is known."""

from collections.abc import Callable
from importlib.resources import files

import yaml
from pydantic import TypeAdapter, ValidationError

from negfacediff_core.cost import Calibration
from negfacediff_core.errors import ConfigError

_CALIBRATION = TypeAdapter(Calibration)


def calibration_names() -> list[str]:
    """Return the names of the stored calibrations, sorted."""
    return sorted(_texts())


def load_calibration(name: str) -> Calibration:
    """Read a stored calibration; ConfigError, with the names there are, for one that is not there."""
    texts = _texts()
    if name not in texts:
        raise ConfigError(
            f"There is no calibration of a device {name!r}; there are {', '.join(sorted(texts))}, and auto, "
            "cpu, cuda and cuda:N time the device that units would run on."
        )
    try:
        return _CALIBRATION.validate_python(yaml.safe_load(texts[name]()))
    except (yaml.YAMLError, ValidationError) as error:
        raise ConfigError(
            f"The calibration {name} is damaged ({' '.join(str(error).split())}); install negfacediff anew."
        ) from error


def _texts() -> dict[str, Callable[[], str]]:
    folder = files("deployments") / "calibrations"
    return {
        item.name.removesuffix(".yaml"): item.read_text
        for item in folder.iterdir()
        if item.name.endswith(".yaml")
    }

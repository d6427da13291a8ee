"""A path with what is said of it after commas, as commands and forms take it: `PATH[,option=value]...`."""

from collections.abc import Sequence
from pathlib import Path

from negfacediff_core.errors import ConfigError


def parse(text: str, options: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """Divide a text in the path and its options; ConfigError for an option that is none of `options`."""
    path, *given = text.split(",")
    found = dict(one.partition("=")[::2] for one in given)
    if not path or not all(found.values()) or not set(found) <= set(options) or len(found) < len(given):
        allowed = f"{', '.join(options[:-1])} and {options[-1]}"
        raise ConfigError(
            f"{text!r} is not understood: expected PATH, or PATH,option=value,... with the options "
            f"{allowed}, each once"
        )
    return Path(path), found

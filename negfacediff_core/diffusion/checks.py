"""Checks of what a configuration file gives: it may hold anything, of any type."""

from negfacediff_core.errors import ConfigError

MOST_CHANNELS = 1 << 16  # far above what any network has, far below what overflows
MOST_ENTRIES = 1 << 24  # of a codebook or a table of classes
MOST_BLOCKS = 1 << 6  # more would take for ever to lay out


def check_whole(
    name: str, value: object, lowest: int = 1, highest: int = MOST_CHANNELS, step: int = 1
) -> None:
    """Raise `ConfigError` unless `value` is an int in [`lowest`, `highest`] and a multiple of `step`."""
    if type(value) is not int or not lowest <= value <= highest or value % step:
        multiple = f" and a multiple of {step}" if step > 1 else ""
        raise ConfigError(
            f"{name} is {value!r}; it must be a whole number from {lowest} to {highest:,}{multiple}."
        )


def check_flag(name: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is true or false; any other word would count as true."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be true or false.")

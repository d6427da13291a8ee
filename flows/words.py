"""How commands put numbers, lists and further commands into words."""

import shlex
from collections.abc import Sequence

# Names that a list of words shows; the rest are counted.
NAMED = 8


def size_text(size: int) -> str:
    """Write a number of bytes as people do: 812 bytes, 3.2 MB."""
    if size < 1000:
        return f"{size} bytes"
    for unit, power in (("kB", 3), ("MB", 6), ("GB", 9)):
        if size < 999.95 * 10**power:
            return f"{size / 10**power:.1f} {unit}"
    return f"{size / 10**12:,.1f} TB"


def count_text(number: int, noun: str) -> str:
    """Write a number of things: 1 unit, 1,200 units."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def names_text(names: Sequence[str]) -> str:
    """List the first names, and count the rest."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return (", ".join(names[:NAMED]) or "none") + more


def command_text(command: str, *arguments: str) -> str:
    """Write a command as one can paste it into a shell."""
    return shlex.join(["negfacediff", command, *arguments])

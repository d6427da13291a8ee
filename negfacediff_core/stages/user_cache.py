"""The folder in which the user's machine keeps what is quick to make anew: it may be removed at any time."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return it: negfacediff in $XDG_CACHE_HOME, or in ~/.cache. Nothing is made there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "negfacediff"

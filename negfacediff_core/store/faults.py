"""The places of a commit that a test can observe or kill the process at; in a build they do nothing."""

from collections.abc import Callable

hook: Callable[[str], None] | None = None


def reached(point: str) -> None:
    """Tell the hook, if a test has set one, which step is about to be taken."""
    if hook is not None:
        hook(point)

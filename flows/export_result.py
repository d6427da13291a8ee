"""What an export has made, in words: for the console, and for the page of its run in Prefect."""

from collections.abc import Iterator, Mapping
from typing import Any

from flows.words import count_text, size_text


def result_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield in sentences what `export_dataset` has returned: how much it is, what lacks, and its licence."""
    yield (
        f"{count_text(result['images'], 'image')} of {result['identities']:,} identities, "
        f"{size_text(result['bytes'])}."
    )
    if result["short"]:
        yield (
            f"Left out: {result['short']:,} identities with fewer than "
            f"{count_text(result['needed'], 'usable image')}, which lack "
            f"{count_text(result['missing'], 'image')} together."
        )
    yield f"Licence: {result['licence']}. {' '.join(result['conditions'])}".rstrip()

"""What an earlier run of `verify_recogniser` left in its folder, and need not be done again."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from negfacediff_core.errors import StoreError
from negfacediff_core.faces.detect import Detector
from negfacediff_core.faces.embed import Embedder
from negfacediff_core.recognition.frcsyn import score_path
from negfacediff_core.recognition.pair_sets import PairSet
from negfacediff_core.recognition.verification_sets import VerificationSet
from negfacediff_core.store.layout import code_version, fingerprint
from negfacediff_core.store.location import Location

RESULTS = "results.json"


def settings_of(
    embedders: Mapping[str, Embedder],
    how: Mapping[str, Any],
    detector: Detector | None,
    training: PairSet | None,
) -> str:
    """Return a hash of all that decides the figures of a set, but for the set itself."""
    return fingerprint(
        {
            "code": code_version(),
            "recognisers": [
                [name, one.sha256, one.colour_order, one.mean, one.std] for name, one in embedders.items()
            ],
            "how": how,
            "detector": detector and [detector.sha256, *detector.input_size],
            "frcsyn": training and [training.name, training.digest],
        }
    )


def take_over(folder: Location, results: dict[str, Any], tested: Sequence[VerificationSet]) -> None:
    """Put the figures of the sets that are done in the results, from those in the folder.

    A set is done where an earlier run with the same settings came to the end of it, and it has not changed.
    """
    before = _before(folder)
    if before.get("settings") != results["settings"]:
        return
    if "frcsyn" in before:
        results["frcsyn"] = before["frcsyn"]
    for one in tested:
        name, digest = one.name, before["done"].get(one.name)
        if digest is None or digest != one.digest or not _scores_are_there(folder, name, before):
            continue
        results["done"][name] = digest
        for kind in ("figures", "differences"):
            for recogniser, sets in before[kind].items():
                if name in sets:
                    results[kind].setdefault(recogniser, {})[name] = sets[name]
        if name in before["faceless"]:
            results["faceless"][name] = before["faceless"][name]


def _before(folder: Location) -> dict[str, Any]:
    """The results in a folder; empty where there are none that can be read."""
    try:
        found = json.loads(folder.read_bytes(RESULTS)) if folder.exists(RESULTS) else {}
    except (StoreError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _scores_are_there(folder: Location, name: str, before: Mapping[str, Any]) -> bool:
    systems = before.get("frcsyn", {}).get("systems", {}).values()
    return all(folder.exists(score_path(name, system)) for system in systems)

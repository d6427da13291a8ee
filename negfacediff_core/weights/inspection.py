"""What an inspection finds, and what is asked of weights of every kind: files, licence, a trial run."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.file_hashes import file_sha256

GENERATOR = "generator in the IDiff-Face layout"
MODEL_PACK = "insightface model pack"
SINGLE_FILE = "single file"

NOT_FINITE = "NaN or infinity"
LICENCE_LENGTH = REASON_LENGTH = 300  # characters of a licence or a foreign error that are shown

# the terms that weights usually carry where none lie beside them
USUAL_LICENCES = (
    "IDiff-Face, ElasticFace: CC BY-NC-SA 4.0",
    "NegFaceDiff, AdaptDiff: CC BY-NC 4.0",
    "insightface model packs: non-commercial research",
    "FFHQ (training images of IDiff-Face): CC BY-NC-SA 4.0, not to be used to develop face recognition",
)
# What a file of a licence begins with that says nothing of its terms.
_TITLES = ("creative commons legal code",)
# Words that take something back which a file of a licence has granted further up.
_RESTRICTS = re.compile(
    r"non-?commercial|\b(no|not for) commercial|\bresearch (purposes|use|only)"
    r"|\bcommercial (use|purposes?)[^.]{0,40}\b(not|prohibit|forbid|requir)"
    r"|\b(not|never) (to )?be used (for|to)\b(?! endorse)",
    re.I,
)


class WeightFile(NamedTuple):
    """A file, what it is for, its size in bytes and its SHA-256 in hexadecimal."""

    role: str
    path: Path
    size: int
    sha256: str


class Part(NamedTuple):
    """A network: its number of parameters (or values), how they are stored, and whether it fits."""

    name: str
    parameters: int
    stored: str
    verdict: str


class Trial(NamedTuple):
    """Something that was really run once: seconds it took, and what came out."""

    name: str
    seconds: float
    outcome: str


@dataclass(frozen=True)
class Inspection:
    """All that was found. `problem` is None if the weights can be used, else says why not, and what to do.

    `licence` is what lies beside the weights, None if nothing does.
    """

    kind: str
    facts: Mapping[str, str]
    parts: tuple[Part, ...]
    files: tuple[WeightFile, ...]
    licence: str | None
    trials: tuple[Trial, ...] = ()
    problem: str | None = None


def licence_of(weights: Path) -> str | None:
    """The licence beside weights or, in a pack such as packs/demo, one folder up; None if there is none.

    It is shortened to its first paragraph, and the first sentence after it that restricts what may be done.
    Several files are read as one, since all of them bind.
    Not one of any folder further up: what is licensed there may be code that has nothing to do with the
    weights.
    """
    folder = weights if weights.is_dir() else weights.parent
    pack = folder.resolve().parent
    is_pack = (pack / "generator").is_dir() and (pack / "faces").is_dir()
    for place in (folder, pack) if is_pack else (folder,):
        files = [file for file in sorted(place.glob("LICEN[CS]E*")) if file.is_file()]
        if files:
            return "; ".join(_shortened(file.read_text("utf-8", "replace")) for file in files)
    return None


def _shortened(text: str) -> str:
    """The first paragraph of a licence that says something, and a restriction if one comes only later."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip())]
    if paragraphs[0].lower() in _TITLES and len(paragraphs) > 1:
        del paragraphs[0]
    head = paragraphs[0][:LICENCE_LENGTH]
    if _RESTRICTS.search(head):
        return head
    for paragraph in paragraphs:
        if found := _RESTRICTS.search(paragraph):
            before, stop, _ = paragraph[: found.start()].rpartition(". ")
            start = max(len(before + stop), found.start() - LICENCE_LENGTH // 2)
            return f"{head} [...] {paragraph[start : start + LICENCE_LENGTH].partition('. ')[0]}"
    return head


def hash_file(role: str, path: Path) -> WeightFile:
    """Describe one file; its bytes are read and hashed."""
    return WeightFile(role, path, path.stat().st_size, file_sha256(path))


def tried(inspection: Inspection, trials: Callable[..., Iterable[Trial]], *arguments: Any) -> Inspection:
    """Add what running gives; whatever goes wrong with strange weights is their problem, not an accident."""
    done: list[Trial] = []
    problem = None
    try:
        for trial in trials(*arguments):
            done.append(trial)
            if trial.outcome.startswith(NOT_FINITE):
                problem = (
                    f"The {trial.name} gives NaN or infinity: the weights are damaged, or overflowed when "
                    "they were saved in half precision. Fetch them again and compare their sha256."
                )
    except NegFaceDiffError as error:
        problem = str(error)
    except Exception as error:  # torch and onnxruntime raise a dozen unrelated types
        reason = " ".join(str(error).split())[:REASON_LENGTH]
        problem = f"The weights load but do not run ({type(error).__name__}: {reason})."
    return replace(inspection, trials=tuple(done), problem=problem)


def finite_or_not(values: Tensor) -> str:
    """The outcome of a trial that gave `values`."""
    return "finite" if bool(torch.isfinite(values).all()) else NOT_FINITE


def types_of(tensors: Iterable[Tensor]) -> str:
    """The names of the types that tensors are stored in."""
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))

"""What the licences of the weights allow to be done with a dataset that was made with them."""

import re
from collections.abc import Iterable
from typing import NamedTuple


class Terms(NamedTuple):
    """Terms of a dataset: their `identifier` and `name`, a `url`, and sentences on what one must and may not.

    `identifier` is Hugging Face's, "other" where it has none; `publishable` says whether the terms are known
    to allow that the dataset is passed on.
    """

    identifier: str
    name: str
    url: str
    conditions: tuple[str, ...]
    publishable: bool


_CREDIT = "Credit the authors of the weights named below."
_NON_COMMERCIAL = "Not for commercial use."
_SHARE_ALIKE = "What is made from it and passed on must carry the same licence."
_CC = "https://creativecommons.org/licenses/{}/4.0/"

# From the least strict to the strictest: the pattern that a licence's words match, and its terms.
TERMS: tuple[tuple[str, Terms], ...] = (
    (
        r"apache|\bmit\b|\bbsd\b|\bcc0\b|public domain",
        Terms("apache-2.0", "Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0", (), True),
    ),
    (r"\bcc[ -]by\b", Terms("cc-by-4.0", "CC BY 4.0", _CC.format("by"), (_CREDIT,), True)),
    (
        r"\bcc[ -]by-sa\b",
        Terms("cc-by-sa-4.0", "CC BY-SA 4.0", _CC.format("by-sa"), (_CREDIT, _SHARE_ALIKE), True),
    ),
    (
        r"\bcc[ -]by-nc\b",
        Terms("cc-by-nc-4.0", "CC BY-NC 4.0", _CC.format("by-nc"), (_NON_COMMERCIAL, _CREDIT), True),
    ),
    (
        r"\bcc[ -]by-nc-sa\b",
        Terms(
            "cc-by-nc-sa-4.0",
            "CC BY-NC-SA 4.0",
            _CC.format("by-nc-sa"),
            (_NON_COMMERCIAL, _CREDIT, _SHARE_ALIKE),
            True,
        ),
    ),
    (
        r"non-?commercial[ -]research|research[ -]only|academic",
        Terms(
            "other",
            "Non-commercial research only",
            "",
            (_NON_COMMERCIAL, "For research only.", _CREDIT),
            True,
        ),
    ),
)
UNKNOWN = Terms(
    "other",
    "Not determined",
    "",
    (
        "Do not publish or pass on before the terms of all weights named below are known and allow it.",
        "Treat it as not for commercial use meanwhile.",
    ),
    False,
)


def terms_of(licences: Iterable[str]) -> Terms:
    """Return the terms of what was made with weights of these `licences`: those of the strictest.

    One that says nothing that is known here leaves the terms open, as do two that exclude each other (CC
    BY-SA asks for its own licence, which allows commerce, and another forbids that).
    """
    ranks = [_rank(licence) for licence in licences]
    if not ranks or None in ranks:
        return UNKNOWN
    known = [rank for rank in ranks if rank is not None]
    strictest = TERMS[max(known)][1]
    names = {TERMS[rank][1].name for rank in known}
    if "CC BY-SA 4.0" in names and _NON_COMMERCIAL in strictest.conditions:
        return UNKNOWN
    return strictest


def _rank(licence: str) -> int | None:
    """Return the place of a licence's words in TERMS, the strictest that they match; None if there is none.

    Only the first sentence counts: what follows names the licences of parts.
    """
    text = re.split(r"[;\n]", licence.lower())[0]
    if re.search(r"\bnd\b|no-?deriv", text):
        return None
    matching = [rank for rank, (pattern, _) in enumerate(TERMS) if re.search(pattern, text)]
    return max(matching, default=None)

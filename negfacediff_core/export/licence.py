"""What the licences of the weights allow to be done with a dataset that was made with them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

CREDIT = "Credit the authors of the weights."
NON_COMMERCIAL = "Not for commercial use."
RESEARCH = "For research only."
SHARE_ALIKE = "What is made from it and passed on must carry the same licence."
#: What a licence file of weights does not say.
TRAINING_IMAGES = (
    "The images that the generator was trained on have terms of their own. Those of IDiff-Face are FFHQ, "
    "whose authors ask that it not be used to develop face recognition: read its terms first."
)
# The order in which conditions are named.
_ORDER = (NON_COMMERCIAL, RESEARCH, CREDIT, SHARE_ALIKE)


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

    @property
    def permissive(self) -> bool:
        """Whether anything may be done with what is under these terms, if its authors are credited."""
        return self.publishable and set(self.conditions) <= {CREDIT}

    @property
    def text(self) -> str:
        """Name and conditions in sentences."""
        return " ".join([f"{self.name}.", *self.conditions])


UNKNOWN = Terms(
    "other",
    "Not determined",
    "",
    (
        "Do not publish or pass on before the terms of all weights are known and allow it.",
        "Treat it as not for commercial use meanwhile.",
    ),
    False,
)
_OSI = "https://opensource.org/license/"
_CC0 = "https://creativecommons.org/publicdomain/zero/1.0/"
_APACHE = "https://www.apache.org/licenses/LICENSE-2.0"
# What may follow the name of a licence that is somebody's, too.
_END = r"(?=$| ?[;:,.()/]| (?:and|or|for|licen))"
# Licences that ask for nothing: the pattern that a text matches, and what they are called. The later ones
# are the longer ones, and give a mixture its name.
_PERMISSIVE = (
    (r"(?<!not in the )\bpublic domain\b", Terms("other", "Public domain", "", (), True)),
    (r"\bcc ?0\b|\bcreative commons zero\b", Terms("cc0-1.0", "CC0 1.0", _CC0, (), True)),
    (
        rf"(?:^|[;:,(/] ?|\b(?:and|or|the|is|under) )mit{_END}|\bmit licen",
        Terms("mit", "MIT", f"{_OSI}mit", (), True),
    ),
    (r"\bbsd\b(?! [23]\b)", Terms("bsd", "BSD", "", (), True)),
    (r"\bbsd 2\b", Terms("bsd-2-clause", "BSD 2-Clause", f"{_OSI}bsd-2-clause", (), True)),
    (r"\bbsd 3\b", Terms("bsd-3-clause", "BSD 3-Clause", f"{_OSI}bsd-3-clause", (), True)),
    (rf"\bapache(?: software)?(?: licen| ?v?2|{_END})", Terms("apache-2.0", "Apache-2.0", _APACHE, (), True)),
)
# Creative Commons' licences: by their short name, their title, or their address.
_CREATIVE_COMMONS = re.compile(
    r"(?P<prefix>\bcc ?|\bcreative ?commons |\blicenses/|\b)(?P<by>by|attribution)"
    r"(?P<parts>(?:[ ,/(]*(?:nc|sa|non ?commercial|share ?alike)(?![a-z]))*)(?![a-z])"
    r"(?: international| unported| generic)?[ /]*v?(?P<version>[1-4]\.\d)?"
)
# Those that Hugging Face has an identifier for, by their parts.
_IDENTIFIERS = {
    "by": ("2.0", "2.5", "3.0", "4.0"),
    "by-sa": ("3.0", "4.0"),
    "by-nc": ("2.0", "3.0", "4.0"),
    "by-nc-sa": ("2.0", "3.0", "4.0"),
}
# What forbids that something is passed on, or changed before, or a use other than commerce, and licences that
# are not understood here.
_CLOSED = (
    r"\bnd\b|\bno ?deriv|\b(?:no|not|never) (?:[a-z]+ ){0,3}(?:re)?distribut|\bproprietary\b|\bconfidential\b"
    r"|\b[al]?gpl|\bgeneral public licen|rail\b|\beula\b"
    r"|\b(?:not|never|cannot)(?: to)?(?: be)? (?:used? (?:(?:it|them|(?:this|the) [a-z]+) )?(?:for|to)|for)\b"
    r"(?! (?:any |a )?(?:[a-z]+ )?commercial| endorse)|\bexcept (?:for|to)\b"
)
_NOT_COMMERCIAL = (
    r"\bnc(?![a-z])|\bnon ?commercial|\b(?:no|not) (?:[a-z]+ ){0,3}commercial"
    r"|\bcommercial[a-z ,:()]{0,40}\b(?:not\b|prohibit|forbid|exclud|requir|needs?\b|must\b|contact"
    r"|permission)"
)
# What leaves less than a free licence does, and says nothing of commerce or research.
_LIMITED = (
    r"\b(?:evaluat|educat|personal|private|internal|scientific|stud(?:y|ies)|demo)[a-z ,]{0,40}\bonly\b"
    r"|\bonly (?:be used )?for\b"
)
_ALIKE = r"\bsa(?![a-z])|\bshare ?alike"
_FOR_RESEARCH = (
    r"\bacademic|\bresearch (?:purposes? |use )?only|\b(?:for|in|commercial) (?:[a-z]+ )?research\b"
)
_OF_RESEARCH = Terms(
    "other", "Non-commercial research only", "", (NON_COMMERCIAL, RESEARCH, CREDIT), publishable=True
)
_OF_NO_COMMERCE = Terms("other", "Non-commercial use only", "", (NON_COMMERCIAL, CREDIT), publishable=True)


def terms_of(licences: Iterable[str]) -> Terms:
    """Return the terms of what was made with weights of these `licences`: all that any of them asks.

    They are called after the strictest, or after several where none asks all that the others do. A licence
    that says nothing that is known here leaves the terms open, as do two that exclude each other (CC BY-SA
    asks for its own licence, which allows commerce, and another forbids that).
    """
    stated = [_stated(licence) for licence in licences]
    found = [terms for one in stated for terms in one]
    asked = {condition for terms in found for condition in terms.conditions}
    free_copies = any(SHARE_ALIKE in one.conditions and NON_COMMERCIAL not in one.conditions for one in found)
    if not all(stated) or not found or (free_copies and NON_COMMERCIAL in asked):
        return UNKNOWN
    kept: list[Terms] = []
    for terms in sorted(found, key=_strictness, reverse=True):
        if not any(set(terms.conditions) <= set(stricter.conditions) for stricter in kept):
            kept.append(terms)
    if len(kept) == 1:
        return kept[0]
    name = " + ".join(terms.name for terms in kept)
    return Terms("other", name, "", tuple(one for one in _ORDER if one in asked), publishable=True)


def terms_of_weights(licences: Sequence[Mapping[str, str]]) -> Terms:
    """Return the terms of what was made with weights; `licences` has a `part` and a `licence` of each.

    A generator that is not free for any use hands on, besides, what its training images ask.
    """
    terms = terms_of(one["licence"] for one in licences)
    generators = [one["licence"] for one in licences if one["part"].endswith(": generator")]
    if not generators or terms_of(generators).permissive:
        return terms
    return terms._replace(conditions=(*terms.conditions, TRAINING_IMAGES))


def _stated(licence: str) -> list[Terms]:
    """Return all terms that the words of a licence name; none if they are not understood.

    Words that restrict count wherever they stand: "MIT, the weights for non-commercial use only".
    """
    text = " ".join(re.sub(r"[-_\s\u2010-\u2015]+", " ", licence.lower()).split())
    if re.search(_CLOSED, text):
        return []
    found = [terms for pattern, terms in _PERMISSIVE if re.search(pattern, text)]
    found += [_creative_commons(match) for match in _CREATIVE_COMMONS.finditer(text) if _is_meant(match)]
    asked = {condition for terms in found for condition in terms.conditions}
    if re.search(_ALIKE, text) and SHARE_ALIKE not in asked:
        return []
    if re.search(_FOR_RESEARCH, text):
        found.append(_OF_RESEARCH)
    elif re.search(_NOT_COMMERCIAL, text):
        if NON_COMMERCIAL not in asked:
            found.append(_OF_NO_COMMERCE)
    elif re.search(_LIMITED, text):
        return []
    return found


def _is_meant(match: re.Match[str]) -> bool:
    """Tell a licence's name from the mere words "by" and "attribution"."""
    return bool(match["prefix"] or match["parts"] or (match["by"] == "attribution" and match["version"]))


def _creative_commons(match: re.Match[str]) -> Terms:
    """Return the terms of a licence of Creative Commons, as it was named."""
    version = match["version"] or ""
    commercial = not re.search(_NOT_COMMERCIAL, match["parts"])
    share_alike = re.search(_ALIKE, match["parts"])
    parts = "-".join(["by", *([] if commercial else ["nc"]), *(["sa"] if share_alike else [])])
    conditions = (
        *([] if commercial else [NON_COMMERCIAL]),
        CREDIT,
        *([SHARE_ALIKE] if share_alike else []),
    )
    return Terms(
        f"cc-{parts}-{version}" if version in _IDENTIFIERS[parts] else "other",
        f"CC {parts.upper()} {version}".rstrip(),
        f"https://creativecommons.org/licenses/{parts}/{version}/" if version else "",
        conditions,
        publishable=True,
    )


def _strictness(terms: Terms) -> tuple[int, int, str]:
    """Order terms: by how much they ask, then as the tables have them, then by version."""
    names = [one.name for _, one in _PERMISSIVE]
    return len(terms.conditions), names.index(terms.name) if terms.name in names else 0, terms.url

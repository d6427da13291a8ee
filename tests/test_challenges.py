"""Exports for public challenges: their limits are kept, and what breaks them is refused."""

import pytest
from pydantic import ValidationError

from flows.presets import load_build, preset_texts
from negfacediff_core.errors import ConfigError
from negfacediff_core.export.challenges import CHALLENGES, Challenge, check_images, check_strangers
from negfacediff_core.export.settings import ExportConfig

PUBLISHED = {
    "frcsyn-500k": (500_000, 10_000, 50),
    "sdfr-1m": (1_000_000, 20_000, 50),
    "datacv-10k": (500_000, 10_000, 50),
    "datacv-20k": (1_000_000, 20_000, 50),
    "datacv-100k": (5_000_000, 100_000, 50),
}


def test_every_challenge_has_its_published_limits():
    found = {name.value: (one.images, one.identities, one.images_each) for name, one in CHALLENGES.items()}
    assert found == PUBLISHED
    assert {name.value for name, one in CHALLENGES.items() if one.strangers} == set(list(PUBLISHED)[2:])


@pytest.mark.parametrize("challenge", PUBLISHED)
def test_a_challenge_takes_its_own_numbers_and_its_preset_makes_more(challenge):
    images, *extent = PUBLISHED[challenge]
    settings = ExportConfig(challenge=challenge)
    assert settings.extent == tuple(extent) and extent[0] * extent[1] == images
    build = load_build(challenge)
    # as the paper does: some images show no face
    assert build.identities >= 1.005 * extent[0] and build.images == extent[1]
    head = preset_texts()[challenge].partition("name:")[0]
    assert f"negfacediff export --challenge {challenge}" in head


def test_without_a_challenge_everything_is_taken_as_it_comes():
    assert ExportConfig().extent == (0, 0)
    assert ExportConfig(identities=10**6, images_per_identity=100).extent == (10**6, 100)
    check_images(Challenge.none, 10**9, "run")
    check_strangers(Challenge.none, "run", gated=False)


@pytest.mark.parametrize(
    ("challenge", "asked", "extent"),
    [
        ("frcsyn-500k", {"identities": 25_000, "images_per_identity": 20}, (25_000, 20)),
        ("sdfr-1m", {"identities": 7, "images_per_identity": 3}, (7, 3)),
        ("sdfr-1m", {"images_per_identity": 9}, (0, 9)),
        ("datacv-20k", {"identities": 20_000}, (20_000, 50)),
    ],
)
def test_less_than_the_most_may_be_asked_for(challenge, asked, extent):
    assert ExportConfig(challenge=challenge, **asked).extent == extent


@pytest.mark.parametrize(
    ("challenge", "asked", "said"),
    [
        ("frcsyn-500k", {"identities": 10_001, "images_per_identity": 50}, "allows 500,000 images"),
        ("sdfr-1m", {"identities": 1_001, "images_per_identity": 1_000}, "allows 1,000,000 images"),
        ("datacv-10k", {"identities": 9_999}, "exactly 10,000 identities of 50 images"),
        ("datacv-10k", {"images_per_identity": 51}, "exactly 10,000 identities of 50 images"),
    ],
)
def test_what_breaks_the_limits_is_refused(challenge, asked, said):
    with pytest.raises(ValidationError, match=said):
        ExportConfig(challenge=challenge, **asked)


def test_images_that_were_chosen_are_counted():
    check_images(Challenge.sdfr_1m, 1_000_000, "run")
    with pytest.raises(ConfigError, match="1,000,001 of the run mine were chosen"):
        check_images(Challenge.sdfr_1m, 1_000_001, "mine")


def test_a_challenge_without_real_people_takes_what_a_gate_has_kept_alone():
    check_strangers(Challenge.datacv_10k, "run", gated=True)
    check_strangers(Challenge.sdfr_1m, "run", gated=False)
    with pytest.raises(ConfigError, match="leakage on it with --policy drop"):
        check_strangers(Challenge.datacv_10k, "run", gated=False)

"""The limits of public challenges on synthetic training sets, which an export for one of them keeps."""

from dataclasses import dataclass
from enum import StrEnum

from negfacediff_core.errors import ConfigError


class Challenge(StrEnum):
    """A challenge and, where it has several, the size of its data."""

    none = "none"
    frcsyn_500k = "frcsyn-500k"
    sdfr_1m = "sdfr-1m"
    datacv_10k = "datacv-10k"
    datacv_20k = "datacv-20k"
    datacv_100k = "datacv-100k"


@dataclass(frozen=True)
class Limits:
    """What a challenge allows.

    `images` is the most images of a set. Where `exactly`, a set has `identities` of `images_each`; elsewhere
    these are what is taken unless something else is asked for. `strangers`: no identity may be a person of a
    public dataset.
    """

    title: str
    images: int
    identities: int
    images_each: int
    exactly: bool = False
    strangers: bool = False


def _datacv(thousands: int) -> Limits:
    count = 1000 * thousands
    return Limits(f"DataCV (ICCV 2025), {thousands}K", 50 * count, count, 50, exactly=True, strangers=True)


CHALLENGES = {
    Challenge.frcsyn_500k: Limits(
        "FRCSyn (arXiv 2404.10378), constrained tasks", 500_000, identities=10_000, images_each=50
    ),
    Challenge.sdfr_1m: Limits(
        "SDFR (arXiv 2404.04580), task 1", 1_000_000, identities=20_000, images_each=50
    ),
    Challenge.datacv_10k: _datacv(10),
    Challenge.datacv_20k: _datacv(20),
    Challenge.datacv_100k: _datacv(100),
}


def asked_for(challenge: Challenge, identities: int, images_each: int) -> tuple[int, int]:
    """Return how many identities of how many images each an export for a challenge has; 0: as it comes.

    Raises ValueError where what is asked for breaks the challenge's limits.
    """
    limits = CHALLENGES.get(challenge)
    if limits is None:
        return identities, images_each
    whole = limits.identities, limits.images_each
    if limits.exactly or not (identities or images_each):
        if (identities or whole[0], images_each or whole[1]) != whole:
            raise ValueError(
                f"{limits.title} asks for exactly {whole[0]:,} identities of {whole[1]} images: leave "
                "identities and images_per_identity out"
            )
        return whole
    if identities * images_each > limits.images:
        raise ValueError(
            f"{limits.title} allows {limits.images:,} images, but {identities:,} identities of "
            f"{images_each:,} images are {identities * images_each:,}: ask for fewer"
        )
    return identities, images_each


def check_strangers(challenge: Challenge, run: str, gated: bool) -> None:
    """Check that real people were taken out of `run` by a leakage gate where a challenge asks for it.

    Raises:
        ConfigError: if they were not.
    """
    limits = CHALLENGES.get(challenge)
    if limits is not None and limits.strangers and not gated:
        raise ConfigError(
            f"{limits.title} allows no identity that is a person of a public dataset, but no leakage gate "
            f"has taken such people out of the run {run}: run negfacediff leakage on it with --policy drop "
            "and a gallery of those datasets, and export the run that it keeps"
        )


def check_images(challenge: Challenge, images: int, run: str) -> None:
    """Check how many images of `run` were chosen against what a challenge allows.

    Raises:
        ConfigError: if there are too many.
    """
    limits = CHALLENGES.get(challenge)
    if limits is not None and images > limits.images:
        raise ConfigError(
            f"{limits.title} allows {limits.images:,} images, but {images:,} of the run {run} were chosen: "
            "set identities or images_per_identity"
        )

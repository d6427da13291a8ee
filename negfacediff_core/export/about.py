"""What the pages of an export say of it: card, datasheet and Croissant are made from one description."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from negfacediff_core.export.layout import Layout
from negfacediff_core.export.licence import Terms
from negfacediff_core.export.manifest import FileSum


@dataclass(frozen=True)
class About:
    """A finished export.

    `run` is its name in the store, `made` the date of its newest image (ISO), `settings` what was asked of
    the export, `method` how the images were made and `figures` what the evaluation of the whole run found, by
    title. `licences` are those of the weights, with `part`, `licence` and `source`, `terms` what follows from
    them, and `acknowledged` the date (ISO) when whoever built it accepted them, None where no record says so.
    `gate` says what a leakage gate took out, None where none did.
    """

    run: str
    made: str
    version: str
    layout: Layout
    settings: Mapping[str, Any]
    method: Mapping[str, str]
    figures: Mapping[str, str]
    licences: Sequence[Mapping[str, str]]
    terms: Terms
    acknowledged: str | None
    gate: str | None
    files: Sequence[FileSum]

    @property
    def title(self) -> str:
        """A title for people."""
        return f"{self.run}: synthetic faces"

    @property
    def size(self) -> str:
        """How much it is, in words."""
        layout = self.layout
        return (
            f"{layout.images:,} images of {len(layout.identities):,} synthetic identities, "
            f"{layout.width}x{layout.height} pixels, {self.settings['encoding'].upper()}"
        )

    @property
    def images_each(self) -> str:
        """How many images an identity has."""
        counts = self.layout.counts
        least, most = int(counts.min()), int(counts.max())
        return f"{least:,}" if least == most else f"{least:,} to {most:,} (on average {counts.mean():.1f})"

    @property
    def uses(self) -> str:
        """What it is for."""
        return USES if self.terms.permissive else f"{USES} Only as the terms of its licence allow."

    @property
    def accepted(self) -> str:
        """Who accepted its terms; empty where they ask for credit at most."""
        if self.terms.permissive:
            return ""
        if self.acknowledged:
            return f"Whoever built the dataset accepted these terms on {self.acknowledged}."
        return (
            "Not acknowledged: no record says that whoever built the dataset accepted these terms. Building "
            "the run again, with nothing made anew, asks for it."
        )


NO_REAL_PEOPLE = (
    "Every image was computed by a diffusion model from a random or given identity vector and random noise. "
    "The identities are not those of real people; that a face resembles somebody, in particular somebody in "
    "the generator's training images, cannot be excluded."
)
USES = (
    "Training and studying face recognition without photographs of real people, and studying synthetic data "
    "itself."
)
NOT_FOR = (
    "Measuring how well a system recognises real people; deciding anything about a real person; passing off "
    "the images as photographs."
)
LIMITS = (
    "What the generator does not vary is not in the data: pose, age, light, glasses and quality follow its "
    "training images. Images of one identity can look like different people, and two identities alike; the "
    "figures say how often by one recogniser. Demographic balance follows from the generator and the "
    "contexts and was not adjusted."
)


def checked_for_leakage(about: About) -> str:
    """Say whether it was looked for real people among the faces."""
    return about.gate or (
        "Not done: nobody looked whether faces resemble people of the generator's training images "
        "(negfacediff leakage does)."
    )

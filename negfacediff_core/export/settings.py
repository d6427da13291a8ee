"""What one asks of an export: which images of a run, and how they are written."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import Field, WithJsonSchema, model_validator

from negfacediff_core.config import Model, OptionalNumber
from negfacediff_core.errors import ConfigError
from negfacediff_core.export.challenges import Challenge, asked_for
from negfacediff_core.export.filter import read_filter
from negfacediff_core.export.manifest import MANIFEST


class ExportFormat(StrEnum):
    """What a dataset is written as: by whom it is read stands in docs/export.md."""

    imagefolder = "imagefolder"
    rec = "rec"
    webdataset = "webdataset"
    huggingface = "huggingface"


class ExportImages(StrEnum):
    """`aligned` are the 112x112 crops, `raw` the images as the generator made them."""

    aligned = "aligned"
    raw = "raw"


class Encoding(StrEnum):
    """`png` loses nothing; `jpeg` is a quarter of the size."""

    png = "png"
    jpeg = "jpeg"


class RecordVariant(StrEnum):
    """`header`: identities' records follow the images'. `headerless`: images alone, as NVIDIA DALI reads."""

    header = "header"
    headerless = "headerless"


class ImageStatus(StrEnum):
    """`ok`; `no_face`: the detector found none; `out_of_band`: left out by the band of the build."""

    ok = "ok"
    no_face = "no_face"
    out_of_band = "out_of_band"


# What stands in a list of a form says itself what it allows.
_Status = Annotated[ImageStatus, WithJsonSchema({"type": "string", "enum": [*ImageStatus]})]


class ExportConfig(Model):
    """Which images of a run are exported, and how they are written."""

    format: ExportFormat = Field(default=ExportFormat.imagefolder, description="What it is written as.")
    images: ExportImages = Field(
        default=ExportImages.aligned, description="aligned: 112x112 crops. raw: as they were generated."
    )
    encoding: Encoding = Field(default=Encoding.png, description="png loses nothing; jpeg is smaller.")
    quality: int = Field(
        default=95, ge=1, le=100, description="Quality of JPEG; colour is kept whole (4:4:4)."
    )
    variant: RecordVariant = Field(
        default=RecordVariant.header,
        description="Of the format rec. header: insightface and AdaFace. headerless: insightface, NVIDIA "
        "DALI and CVLface.",
    )
    status: tuple[_Status, ...] = Field(
        default=(ImageStatus.ok,), min_length=1, description="Images of which status are taken."
    )
    min_quality: OptionalNumber = Field(
        default=None,
        allow_inf_nan=False,
        description="Lowest quality: of the quality network, or without one the norm of the judge's "
        "embedding. None: any.",
    )
    min_cosine: float = Field(
        default=-1.0, ge=-1, le=1, description="Lowest cosine of an image to the context of its identity."
    )
    max_cosine: float = Field(default=1.0, ge=-1, le=1, description="Highest cosine to it.")
    min_images: int = Field(
        default=1, ge=1, le=10_000, description="Identities with fewer images than this are left out."
    )
    images_per_identity: int = Field(
        default=0, ge=0, le=10_000, description="Take exactly so many images of each identity. 0: all."
    )
    identities: int = Field(
        default=0, ge=0, le=10_000_000, description="Take exactly so many identities. 0: all that qualify."
    )
    challenge: Challenge = Field(
        default=Challenge.none,
        description="Keep the limits of a challenge; its numbers of identities and images are taken unless "
        "others are asked for.",
    )
    filter: str = Field(
        default="",
        description="File of the images to take, as negfacediff prune writes it. Empty: all that qualify.",
    )

    @property
    def banded(self) -> bool:
        """Whether images are chosen by their similarity to their context."""
        return self.min_cosine > -1 or self.max_cosine < 1

    @property
    def extent(self) -> tuple[int, int]:
        """How many identities are taken, and how many images of each; 0: as it comes."""
        return asked_for(self.challenge, self.identities, self.images_per_identity)

    @model_validator(mode="after")
    def _keeps_the_limits_of_its_challenge(self) -> "ExportConfig":
        _ = self.extent
        return self

    @model_validator(mode="after")
    def _selection_makes_sense(self) -> "ExportConfig":
        if self.min_cosine > self.max_cosine:
            raise ValueError(
                f"min_cosine is {self.min_cosine} and max_cosine {self.max_cosine}: no image is in that "
                "band; swap them, or leave them at -1 and 1"
            )
        if ImageStatus.no_face in self.status and self.images == ExportImages.aligned:
            raise ValueError(
                "images without a face (status no_face) have no aligned crop: export the raw images, or "
                "leave that status out"
            )
        return self


def check_places(out: str, settings: ExportConfig) -> None:
    """Check before work that `out` is a folder of this machine, and that the filter can be read.

    A folder that is there is no obstacle if it is an export: it may be this one. Raises ConfigError.
    """
    if "://" in out:
        raise ConfigError(f"out is {out!r}, no local folder: export to one, and copy it from there.")
    place = Path(out)
    if (place.exists() or place.is_symlink()) and not (place / MANIFEST).exists():
        raise ConfigError(f"{out} is there already, and is no export: remove it, or give another --out.")
    if settings.filter:
        read_filter(Path(settings.filter))


def check_refill(settings: ExportConfig, run: str, source: str | None) -> None:
    """Check that growing `run` can bring what an export lacks.

    `source` is the run of which a leakage gate kept `run`, None where none did. Raises ConfigError.
    """
    if source is not None:
        raise ConfigError(
            f"the run {run} is what a leakage gate kept of {source}, and does not grow: grow {source}, run "
            "the gate on it again, and export what that keeps, without refill"
        )
    if settings.filter:
        raise ConfigError(
            "refill makes new images, which are in no filter: leave one of the two out; for more images, "
            "grow the run, train on it and prune it again"
        )
    if not settings.extent[0]:
        raise ConfigError(
            "refill grows the run until there are enough identities: say how many, with identities (or a "
            "challenge, which says it)"
        )

"""The leakage gate's settings."""

from pydantic import Field

from negfacediff_core.config.choices import Policy
from negfacediff_core.config.model import Model, Optional


class LeakageConfig(Model):
    """The leakage gate: whom generated images are compared with, by whom, and what follows."""

    gallery: str = Field(
        description="Folder of images, one a person or a sub-folder of them a person; or embeddings of one "
        "recogniser: .npz, Parquet or Zarr with `embeddings`, and `names` that tell who it is."
    )
    recognisers: tuple[str, ...] = Field(
        default=(),
        max_length=2,
        description="One or two insightface model packs that did not condition the generator. None: the "
        "judge of the run.",
    )
    detector: Optional = Field(
        default=None, description="Model pack with the detector of the gallery's faces. Empty: the run's."
    )
    detector_size: int = Field(
        default=0, ge=0, le=1280, multiple_of=32, description="Side of its input, in pixels; 0: the run's."
    )
    policy: Policy = Field(
        default=Policy.report,
        description="report: count. flag: list the images that leak in a Parquet file beside the run as "
        "well. drop: make a run without them as well.",
    )
    fmr: float = Field(
        default=1e-5,
        gt=0,
        lt=1,
        description="Images are flagged or dropped at this false match rate of real impostors: 0.001, 0.0001 "
        "or 0.00001.",
    )
    pictures: bool = Field(default=False, description="Draw the most similar pairs.")

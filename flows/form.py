"""Parameters that several flows have, as Prefect's forms show them."""

from typing import Annotated, Any

from pydantic import Field

#: The name of a run: of a build, or of what a gate has made of one.
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,199}$")]
#: The name of a run, or nothing.
MaybeName = Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9._-]{0,199})?$")]
More = Annotated[int, Field(ge=0, le=10_000_000)]

#: The default of the parameter `store`; forms show it first.
STORE: Any = Field(
    default="store",
    description="Folder, as the machine that runs this sees it, or fsspec URL (s3://bucket/faces) that "
    "datasets are kept in.",
    # an empty box, or a variable that was not set, is no folder
    json_schema_extra={"position": -1, "minLength": 1},
)

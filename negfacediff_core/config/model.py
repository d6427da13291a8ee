"""What every configuration is made of: an immutable model that also makes a good form."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

#: Titles of fields in a form, where the name alone does not say it.
TITLES = {
    "aligned": "Alignment",
    "block_identities": "Identities in a work unit",
    "block_images": "Images of each identity in a work unit",
    "cfg": "Classifier-free guidance",
    "ddim_alpha": "Previous alpha of DDIM",
    "eta": "Noise of DDIM (eta)",
    "final_noise": "Final noise of DDPM",
    "fmr": "False match rate",
    "mid": "Median of the rule mid",
    "rand": "Draw of the rule rand",
    "samples": "Sampling",
    "w": "Negative weight (w)",
    "weight": "Course of the weight",
}


def title_of(name: str, field: Any = None) -> str:
    """Return what stands above the field `name` in a form."""
    return TITLES.get(name) or name.replace("_", " ").capitalize()


def _for_forms(schema: dict[str, Any]) -> None:
    """Add the limits of each number to its description, which is all that a form shows.

    A default of null is left out: Prefect refuses null, which whole configurations hold, where one is stated.
    """
    words = {
        "minimum": "from",
        "exclusiveMinimum": "above",
        "maximum": "to",
        "exclusiveMaximum": "and below",
        "multipleOf": "in steps of",
    }
    for field in schema.get("properties", {}).values():
        if field.get("default", "") is None:
            del field["default"]
        limits = [f"{said} {_plain(field[key])}" for key, said in words.items() if key in field]
        if limits and "Allowed" not in field["description"]:
            field["description"] = f"{field['description']} Allowed: {' '.join(limits)}."


def _plain(number: float) -> str:
    """Write a limit as people do: 1,000,000 and 0.5."""
    return f"{int(number) if number == int(number) else number:,}"


class Model(BaseModel):
    """Base of every configuration: unknown keys are refused, instances are immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_enum_values=True,
        field_title_generator=title_of,
        json_schema_extra=_for_forms,
    )


_none_if_empty = BeforeValidator(lambda value: None if value == "" else value)
#: Something that may be left out: None, or an empty box of a form, which shows no two kinds to choose from.
Optional = Annotated[str | None, _none_if_empty, WithJsonSchema({"type": "string"})]
OptionalNumber = Annotated[float | None, _none_if_empty, WithJsonSchema({"type": "number"})]

Seed = Annotated[int, Field(ge=0, lt=2**63, description="Random seed. Allowed: from 0 to 2^63 - 1.")]

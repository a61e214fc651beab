"""What the sections of a recipe are made of. Source: this project."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from rayfed_lora.recipe.filling import plain

Auto = Literal["auto"]
# Key of the validation's context: endpoints of object stores that the user has named.
ENDPOINTS = "endpoints"
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
# A boolean is the class that data with booleans have.
ClassLabel = Annotated[
    int | str,
    BeforeValidator(
        lambda given: str(given).lower() if isinstance(given, bool) else given,
        json_schema_input_type=int | str | bool,
    ),
]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


def option(default: Any, description: str, unit: str | None = None) -> Any:
    """Return a field with its description and, where it has one, its unit."""
    extra: dict[str, JsonValue] | None = None if unit is None else {"unit": unit}
    return Field(default, description=description, json_schema_extra=extra, validate_default=True)


def section(kind: type[BaseModel], description: str) -> Any:
    """Return a field that holds a sub-section with that section's defaults."""
    return Field(default_factory=kind, description=description)


class Section(BaseModel):
    """A mapping of a recipe: unknown keys are faults, values cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _of_plain_values(cls, given: Any) -> Any:
        """Take sections made in Python, paths, and numpy's numbers."""
        return plain(given)

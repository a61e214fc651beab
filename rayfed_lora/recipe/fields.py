"""Types of keys, and the base class of a recipe's sections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from rayfed_lora.recipe.plain_values import plain

Auto = Literal["auto"]
# Key of the validation's context: endpoints of object stores that the user has named.
ENDPOINTS = "endpoints"
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
# A boolean names the class of a boolean label.
ClassLabel = Annotated[
    int | str,
    BeforeValidator(
        lambda given: str(given).lower() if isinstance(given, bool) else given,
        json_schema_input_type=int | str | bool,
    ),
]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


@dataclass(frozen=True)
class NameIn:
    """Annotation of a key that names an entry of a table, such as a rule.

    The table is read when a recipe is validated: entries may be added to it.
    """

    table: Mapping[str, object]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._checked)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        return {"enum": [*self.table], "type": "string"}

    def _checked(self, value: Any) -> Any:
        if isinstance(value, str) and value in self.table:
            return value
        *first, last = (repr(name) for name in self.table)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(first)} or {last}"})


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
        """Accept sections made in Python, paths, and numpy's numbers."""
        return plain(given)

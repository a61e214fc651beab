"""Types of keys, and the base class of a recipe's sections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    ModelWrapValidatorHandler,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import (
    CoreSchema,
    InitErrorDetails,
    PydanticCustomError,
    PydanticKnownError,
    core_schema,
)

from rayfed_lora.plugins.options import Options
from rayfed_lora.plugins.registry import Method, Table
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


@dataclass(frozen=True, eq=False)
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


# Tags of a number and of a section that may stand in its place, in pydantic's places of faults.
MEMBERS = ("number", "mapping")


def _member(value: Any) -> str:
    return MEMBERS[isinstance(value, (Mapping, BaseModel))]


# Annotation of a union of the two, each with its tag: a fault is of the one that was meant.
NUMBER_OR_MAPPING = Discriminator(_member)


def short_for(stands_for: Mapping[type, str]) -> Any:
    """Return a validator that lets a plain value stand for one key of a section, by type."""

    def expanded(value: Any) -> Any:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        key = stands_for.get(float if number else type(value))
        return value if key is None else {key: value}

    return BeforeValidator(expanded)


def also_plain(schema: dict[str, Any], *types: str) -> None:
    """Let a section's schema accept plain values of these types too."""
    schema["anyOf"] = [{"$ref": schema.pop("$ref")}, *({"type": kind} for kind in types)]


class Section(BaseModel):
    """A mapping of a recipe: unknown keys are faults, values cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _of_plain_values(cls, given: Any) -> Any:
        """Accept sections made in Python, paths, and numpy's numbers."""
        return plain(given)


class Choosing(Section):
    """A section in which one key names a method; the method's options stand beside it.

    Keys that are neither the section's own nor options of the method are faults.
    """

    model_config = ConfigDict(extra="allow")
    # The key, and the table of its methods.
    choice: ClassVar[tuple[str, Table[Any]]]

    @model_validator(mode="wrap")
    @classmethod
    def _with_options(cls, given: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        if not isinstance(given, Mapping):
            return handler(given)
        own = {key: value for key, value in given.items() if key in cls.model_fields}
        made = handler(own)
        others = {key: value for key, value in given.items() if key not in own}
        options = cls._checked(str(getattr(made, cls.choice[0])), others)
        return handler({**own, **options}) if options else made

    @classmethod
    def _checked(cls, name: str, others: Mapping[Any, Any]) -> dict[str, Any]:
        """Return the values of all options of a method that are no keys of the section."""
        _, table = cls.choice
        model = table.method(name).options if name in table else Options
        known = [option for option in model.model_fields if option not in cls.model_fields]
        unknown = [option for option in others if option not in known]
        if unknown:
            expected = [*cls.model_fields, *known]
            raise ValidationError.from_exception_data(
                cls.__name__, [_unknown(option, others[option], expected) for option in unknown]
            )
        beside = _left(model, tuple(known))
        return beside.model_validate(dict(others)).model_dump(mode="json") if known else {}

    @property
    def chosen(self) -> Method[Any] | None:
        """The method; None where the key may hold something else, and does."""
        key, table = self.choice
        name = getattr(self, key)
        return table.method(name) if isinstance(name, str) and name in table else None

    @property
    def own_options(self) -> dict[str, Any]:
        """The values of the method's options alone."""
        if self.chosen is None:
            return {}
        known, found = self.chosen.options.model_fields, self.options
        return {name: found[name] for name in known if name in found}

    @property
    def options(self) -> dict[str, Any]:
        """The values that options of the method take: keys beside the name of the method."""
        return {**dict(self), **(self.__pydantic_extra__ or {})}


@lru_cache(maxsize=256)  # a millisecond each, for many values of each recipe
def _left(model: type[BaseModel], names: tuple[str, ...]) -> type[BaseModel]:
    """Return the model of some options of a method."""
    kept: Any = {
        name: (model.model_fields[name].annotation, model.model_fields[name]) for name in names
    }
    return create_model(model.__name__, __base__=Options, **kept)


def _unknown(key: str, value: Any, known: list[str]) -> InitErrorDetails:
    kind = PydanticCustomError("unknown_option", "", {"known": known})
    return InitErrorDetails(type=kind, loc=(key,), input=value)


@dataclass(frozen=True, eq=False)
class TextOr:
    """Annotation of a key that names a method by a text, or by a section with its options.

    The value is the text wherever the method has no options of its own.
    """

    section: type[Choosing]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        key, _ = self.section.choice
        made = core_schema.no_info_before_validator_function(
            lambda given: {key: given} if isinstance(given, str) else given,
            handler.generate_schema(self.section),
        )
        return core_schema.no_info_after_validator_function(
            lambda found: found if found.own_options else getattr(found, key),
            made,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: value if isinstance(value, str) else value.model_dump(mode="json")
            ),
        )

    def of(self, value: Any) -> Any:
        """Return the section that a value of the key stands for."""
        return value if isinstance(value, self.section) else self.section(name=value)

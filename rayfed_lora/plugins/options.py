"""The typed options of a method, read from its signature. Source: this project."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, PydanticUserError, create_model

from rayfed_lora.errors import PluginError


class Options(BaseModel):
    """The base of all options: other names are faults, values cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


def options_of(target: Callable[..., Any], name: str) -> type[BaseModel]:
    """Return the model of a method's options.

    Options are the keyword-only parameters of a function, the fields of a dataclass or of a
    pydantic model, and the keyword-only parameters of another class.

    Args:
        target: the function or class.
        name: of the method, for errors.

    Raises:
        PluginError: an option has no type annotation, or one that pydantic does not know.
    """
    if isinstance(target, type) and issubclass(target, BaseModel):
        return target
    try:
        found: Any = {key: (kind, default) for key, kind, default in _declared(target)}
        model: type[BaseModel] = create_model(f"Options of {name}", __base__=Options, **found)
        model.model_json_schema()
    except (NameError, TypeError, PydanticUserError) as error:
        raise PluginError(
            f"method {name!r}: each option needs a type annotation that pydantic knows, e.g."
            f" `*, share: float = 0.1`; {error}"
        ) from error
    return model


def _declared(target: Callable[..., Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, type and default of each option; `...` where there is no default."""
    if is_dataclass(target):
        hints = get_type_hints(target, include_extras=True)
        for each in fields(target):
            if each.init and not each.name.startswith("_"):
                default = each.default if each.default is not MISSING else each.default_factory
                yield each.name, hints[each.name], ... if default is MISSING else _value(each)
        return
    function = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    if function is object.__init__:
        return
    named = inspect.signature(function).parameters.values()
    options = [p for p in named if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for option in options:
        if option.annotation is option.empty:
            raise TypeError(f"option {option.name!r} has none")
    # Of the options alone: other annotations may name what is imported for type checks only.
    own = type("own", (), {"__annotations__": {p.name: p.annotation for p in options}})
    hints = get_type_hints(own, function.__globals__, include_extras=True)
    for option in options:
        default = ... if option.default is option.empty else option.default
        yield option.name, hints[option.name], default


def _value(each: Any) -> Any:
    return each.default if each.default is not MISSING else each.default_factory()

"""How the classes of a source's head relate to those of the data. Source: this project."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rayfed_lora.errors import ModelError
from rayfed_lora.models import base_models
from rayfed_lora.models.wording import listed
from rayfed_lora.recipe.model import Model

# Names that only number a class, as written by transformers or by the data.
_NUMBER = re.compile(r"(?:LABEL_)?(\d+)")


@dataclass(frozen=True)
class HeadMatch:
    """How the classes of a source's head relate to those of the data.

    Attributes:
        kind: `unknown`: the source names no classes | `same`: the names are equal, in any order |
            `numbers`: the data number the classes 0 .. n - 1 | `other`: other classes.
        order: index of the data's class for each output of the head; 0 .. n - 1 unless `same`.
        names: of the head's classes, if it names them.
    """

    kind: Literal["unknown", "same", "numbers", "other"]
    order: tuple[int, ...]
    names: tuple[str, ...] = ()

    @property
    def reorders(self) -> bool:
        """Whether the head numbers the classes in another order than the data."""
        return self.order != tuple(range(len(self.order)))


def match_head(model: Model, labels: Sequence[str]) -> HeadMatch:
    """Return how the classes of the source's head relate to the data's.

    Names that the recipe gives in `model.config.id2label` take precedence over the source's own.

    Raises:
        ModelError: the source's configuration cannot be read, or the recipe names other classes
            than the data's.
    """
    given = model.config.get("id2label")
    if given:
        match = match_classes(class_names({"id2label": given}), labels)
        # transformers' defaults carry no information about the classes.
        generic = all(name.startswith("LABEL_") for name in match.names)
        if match.kind == "other" or (match.kind == "unknown" and not generic):
            raise ModelError(
                f"model.config.id2label: expected the data's classes, {listed(labels)}, got"
                f" {listed(match.names)}"
            )
        return match
    if model.source == "config":
        return match_classes((), labels)
    plain = model.model_copy(update={"config": {}})
    return match_classes(class_names(base_models.configuration(plain, {}).to_dict()), labels)


def class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the name of each class of a configuration's head; none where it has no classes.

    Raises:
        ModelError: `id2label` is no mapping, or its classes are not numbered 0 .. n - 1.
    """
    architectures = config.get("architectures") or []
    named = config.get("id2label")
    if not named or (architectures and "Classification" not in str(architectures)):
        return ()
    if not isinstance(named, Mapping):
        raise ModelError(
            f"model.config.id2label: expected {{0: name, 1: name, ...}}, got {named!r}"
        )
    by_number = {str(key): str(name) for key, name in named.items()}
    expected = [str(i) for i in range(len(named))]
    if by_number.keys() != set(expected):
        got = ", ".join(map(str, [*named][:10]))
        raise ModelError(
            f"model.config.id2label: expected classes 0 .. {len(named) - 1}, got {got}"
        )
    return tuple(by_number[number] for number in expected)


def match_classes(head: Sequence[str], data: Sequence[str]) -> HeadMatch:
    """Return how the named classes of a head relate to those of the data.

    Names are compared exactly, then ignoring case and outer blanks.

    >>> match_classes(["POSITIVE", "NEGATIVE"], ["negative", "positive"]).order
    (1, 0)
    >>> match_classes(["cat", "dog"], ["0", "1"]).kind
    'numbers'
    """
    names, as_given = tuple(head), tuple(range(len(data)))
    for form in (str, lambda name: name.strip().casefold()):
        known, wanted = [form(name) for name in head], [form(name) for name in data]
        if len(set(wanted)) == len(wanted) and sorted(known) == sorted(wanted):
            return HeadMatch("same", tuple(wanted.index(name) for name in known), names)
    if all(_NUMBER.fullmatch(name) for name in head):
        return HeadMatch("unknown", as_given, names)
    numbers = [_NUMBER.fullmatch(name) for name in data]
    if [number and int(number[1]) for number in numbers] == [*range(len(head))]:
        return HeadMatch("numbers", as_given, names)
    return HeadMatch("other", as_given, names)

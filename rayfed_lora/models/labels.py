"""Whether the classes of a source's head are those of the data, and in which order.

Source: this project.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rayfed_lora.errors import ModelError

# Names that say nothing of a class: its number, as written by transformers or by the data.
_NUMBER = re.compile(r"(?:LABEL_)?(\d+)")


@dataclass(frozen=True)
class HeadMatch:
    """How the classes of a source's head relate to those of the data.

    Attributes:
        kind: `unknown`: the source names no classes | `same`: the names are equal, in any order |
            `numbers`: the data number the classes 0 .. n - 1 | `other`: other classes.
        order: the data's class for each output of the head; of the data's own order unless `same`.
    """

    kind: Literal["unknown", "same", "numbers", "other"]
    order: tuple[int, ...]


def names_in(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the name of each class of the head that a configuration describes.

    Args:
        config: of a source, as a dictionary: `id2label`, and `architectures` where it is known.

    Returns:
        None where the architecture has no classes.

    Raises:
        ModelError: `id2label` is no mapping, or its classes are not numbered 0 .. n - 1.
    """
    architectures = config.get("architectures") or []
    named = config.get("id2label")
    if not named or (architectures and "Classification" not in str(architectures)):
        return None
    if not isinstance(named, Mapping):
        raise ModelError(
            f"model.config.id2label: expected {{0: name, 1: name, ...}}, got {named!r}"
        )
    numbers = [str(key) for key in named]
    if sorted(numbers) != sorted(str(i) for i in range(len(numbers))):
        raise ModelError(
            f"model.config.id2label: expected classes 0 .. {len(numbers) - 1},"
            f" got {', '.join(numbers[:10])}"
        )
    texts = {int(key): str(name) for key, name in named.items()}
    return tuple(texts[i] for i in range(len(texts)))


def matched(source: Sequence[str] | None, data: Sequence[str]) -> HeadMatch:
    """Return how the classes of a head relate to those of the data.

    Names are compared exactly; where that fails, without regard to case and outer blanks.

    Args:
        source: name of each class of the head, or None.
        data: name of each class of the data.

    >>> matched(["POSITIVE", "NEGATIVE"], ["negative", "positive"])
    HeadMatch(kind='same', order=(1, 0))
    >>> matched(["cat", "dog"], ["0", "1"]).kind
    'numbers'
    """
    own = tuple(range(len(data)))
    if source is None:
        return HeadMatch("unknown", own)
    for known, wanted in ((list(source), list(data)), (_folded(source), _folded(data))):
        if len(set(wanted)) == len(wanted) and sorted(known) == sorted(wanted):
            return HeadMatch("same", tuple(wanted.index(name) for name in known))
    if all(_NUMBER.fullmatch(name) for name in source):
        return HeadMatch("unknown", own)
    numbers = [_NUMBER.fullmatch(name) for name in data]
    if len(source) == len(data) and all(
        found is not None and int(found[1]) == i for i, found in enumerate(numbers)
    ):
        return HeadMatch("numbers", own)
    return HeadMatch("other", own)


def _folded(names: Sequence[str]) -> list[str]:
    return [name.strip().casefold() for name in names]

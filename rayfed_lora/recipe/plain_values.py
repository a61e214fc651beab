"""Bounds of what users and files hand in: documents of plain values, not too deep, not too many.

Source: this project.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

MOST_LEVELS = 32
# A YAML alias counts each time it is used.
MOST_VALUES = 100_000
_LARGEST = 2**63 - 1


def excess(value: Any) -> str | None:
    """Return what is too much about a document, None where nothing is.

    >>> excess({"seed": 2**64})
    'expected numbers of at most 64 bits'

    Args:
        value: of mappings, lists and anything else; may hold itself.
    """
    left = MOST_VALUES
    waiting = [(value, 0)]
    while waiting:
        found, level = waiting.pop()
        left -= 1
        if level > MOST_LEVELS:
            return f"expected at most {MOST_LEVELS} levels of lists and mappings"
        if isinstance(found, int) and abs(found) > _LARGEST:
            return "expected numbers of at most 64 bits"
        inside = list(_inside(found))
        left -= len(inside)
        if left < 0:
            return f"expected at most {MOST_VALUES:,} values"
        waiting += [(item, level + 1) for item in inside]
    return None


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value


def strange(value: Any) -> str | None:
    """Return the first thing in a document that YAML and JSON cannot both hold, None if none.

    >>> strange({"a": [1, 2.5, "x", None]})
    >>> strange({"a": [float("nan")]})
    'nan'

    Args:
        value: one in which nothing is too much.
    """
    if isinstance(value, Mapping):
        return next((s for item in (*value.keys(), *value.values()) if (s := strange(item))), None)
    if isinstance(value, list):
        return next((s for item in value if (s := strange(item))), None)
    if isinstance(value, str):
        return None if _is_text(value) else ascii(value)
    if isinstance(value, float):
        return None if math.isfinite(value) else repr(value)
    return None if value is None or isinstance(value, int) else f"a {type(value).__name__}"


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True

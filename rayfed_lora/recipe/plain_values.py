"""Plain values: what YAML and JSON can hold, and limits on their depth, number and size.

Source: this project.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel

MOST_LEVELS = 32
# A YAML alias counts each time it is used.
MOST_VALUES = 100_000
_LARGEST = 2**63 - 1


def plain(given: Any) -> Any:
    """Return nested values as a file would hold them.

    Sections become mappings of the keys that were set, paths texts, tuples and arrays lists, and
    numbers of numpy Python's own. Other objects are kept; the validation rejects them.

    >>> from pathlib import Path
    >>> plain({"ranks": (np.int64(4), 8), "path": Path("runs/a")})
    {'ranks': [4, 8], 'path': 'runs/a'}
    """
    if isinstance(given, BaseModel):
        return plain({k: v for k, v in vars(given).items() if k in given.model_fields_set})
    if isinstance(given, Mapping):
        return {plain(key): plain(value) for key, value in given.items()}
    if isinstance(given, (list, tuple)):
        return [plain(value) for value in given]
    if isinstance(given, (np.generic, np.ndarray)):
        return given.tolist()
    return os.fspath(given) if isinstance(given, os.PathLike) else given


def values_of(section: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    """Return all values of a section as nested mappings.

    Includes values that a changed copy holds under names that are no fields: the validation
    rejects them.
    """
    held = vars(section) if isinstance(section, BaseModel) else section
    return {k: values_of(v) if isinstance(v, BaseModel) else v for k, v in held.items()}


def excess(value: Any) -> str | None:
    """Return the limit that a document exceeds, None where it exceeds none.

    >>> excess({"seed": 2**64})
    'expected numbers of at most 64 bits'

    Args:
        value: nested mappings and lists of any objects; may contain itself.
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


def unsupported(value: Any) -> str | None:
    """Return the first value of a document that YAML and JSON cannot both hold, None if none.

    >>> unsupported({"a": [1, 2.5, "x", None]})
    >>> unsupported({"a": [float("nan")]})
    'nan'

    Args:
        value: a document within the limits of `excess`.
    """
    if isinstance(value, (Mapping, list)):
        return next((s for item in _inside(value) if (s := unsupported(item))), None)
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

"""What the code of a method is that no import finds, as a text that changes with it.

Source: this project.
"""

from __future__ import annotations

import dis
import inspect
from typing import Any


def source_of(target: Any) -> str:
    """Return the source of a function or class, with the plain values that it encloses."""
    return _source(target) + _enclosed(target)


def _source(target: Any) -> str:
    """Return the source of a function or class; its bytecode where nothing has the source."""
    try:
        return inspect.getsource(inspect.unwrap(target))
    except (OSError, TypeError):
        pass
    if isinstance(target, type):
        # Of a class of a notebook inspect knows no file, but of its methods it does.
        parts = [_source(part) for part in vars(target).values() if inspect.isfunction(part)]
        return "\n".join([repr(inspect.get_annotations(target)), *parts])
    return dis.Bytecode(target).dis()


def _enclosed(target: Any) -> str:
    """Return the plain values that a function, or a class's methods, take from around them."""
    parts = vars(target).values() if isinstance(target, type) else [inspect.unwrap(target)]
    found = []
    for part in filter(inspect.isfunction, parts):
        for name, cell in zip(part.__code__.co_freevars, part.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # assigned later
                continue
            if isinstance(value, (bool, int, float, str, bytes)):
                found.append(f"\n{name} = {value!r}")
    return "".join(found)

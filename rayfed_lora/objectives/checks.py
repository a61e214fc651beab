"""Checks of what the hooks of an objective return. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rayfed_lora.errors import RunError
from rayfed_lora.objectives.objective import Shapes
from rayfed_lora.types import FloatArray


def checked(where: str, found: Any, shapes: Shapes) -> dict[str, FloatArray]:
    """Return arrays as float32 copies, in the order of their names, as checkpoints have them.

    Args:
        where: objective, part, client and round, for errors.
        found: what a hook returned.
        shapes: declared, by name.

    Raises:
        RunError: other names, another shape, no floating-point numbers, or values that are not
            finite as float32.
    """
    if not isinstance(found, Mapping) or set(found) != set(shapes):
        got = sorted(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
        raise RunError(f"{where}: expected arrays by the names {sorted(shapes)}, got {got}")
    arrays = {}
    for name, shape in sorted(shapes.items()):
        array = np.asarray(found[name])
        if array.shape != tuple(shape) or array.dtype.kind != "f":
            raise RunError(
                f"{where}, tensor {name!r}: expected floats of shape {tuple(shape)}, got"
                f" {array.dtype} of {array.shape}"
            )
        with np.errstate(over="ignore"):
            kept = np.array(array, np.float32, order="C")
        if not np.isfinite(kept).all():
            raise RunError(f"{where}, tensor {name!r}: expected finite values")
        arrays[name] = kept
    return arrays


def read_only(arrays: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Return views that cannot be written to, in the order of their names.

    A hook may not change the state of a run, and adds up in the same order after a resume.
    """
    views = {}
    for name, array in sorted(arrays.items()):
        view = array.view()
        view.flags.writeable = False
        views[name] = view
    return views

"""What clients have come to when their steps are done. Source: this project."""

from __future__ import annotations

import math
from statistics import fmean
from typing import NamedTuple

import numpy as np

from rayfed_lora.training.groups import ClientTask
from rayfed_lora.types import AdapterState, ClientUpdate, FloatArray


class Left(NamedTuple):
    """A client that has done all its steps, and whether all who left with it are finite."""

    state: AdapterState
    finite: bool


def all_finite(values: FloatArray) -> bool:
    """Return whether no value is infinite or NaN.

    A sum of squares takes a quarter of the time of looking at each; it is finite if they are,
    unless it is too large itself.

    >>> all_finite(np.float32([[1e30, 2.0]])), all_finite(np.float32([1.0, np.inf]))
    (True, False)
    """
    flat = values.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        square = flat @ flat
    return math.isfinite(square) or bool(np.isfinite(flat).all())


def update_of(task: ClientTask, left: Left, losses: list[float], seconds: float) -> ClientUpdate:
    """Return what a client sends back: no state where a loss or a weight is not finite.

    Args:
        task: what it did.
        left: what it has come to.
        losses: of its steps.
        seconds: that it took.
    """
    error = _fault(losses, None if left.finite else left.state)
    return ClientUpdate(
        client=task.client,
        examples=task.examples,
        state=left.state if error is None else None,
        train_loss=fmean(losses) if error is None else float("nan"),
        seconds=seconds,
        error=error,
    )


def _fault(losses: list[float], update: AdapterState | None) -> str | None:
    """Return why a trained client cannot be used, or None; no update: it is known to be finite."""
    bad = [step for step, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        return f"loss is {losses[bad[0]]} in local step {bad[0] + 1} of {len(losses)}"
    if update is None:
        return None
    tensors = [*update.dense.values()]
    for factors in update.factors.values():
        tensors += [factors.a, factors.b]
    if not all(np.isfinite(tensor).all() for tensor in tensors):
        return f"weights are not finite after {len(losses)} local steps"
    return None

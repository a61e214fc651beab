"""The clients of a group that have done their steps, and what they send back.

Source: this project.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np
import torch

from rayfed_lora.lora.stacked import StackedStates
from rayfed_lora.models.adapted import AdaptedModel
from rayfed_lora.tasks.training import BlockUpdate
from rayfed_lora.training.groups import ClientTask
from rayfed_lora.types import AdapterState, ClientReport, FloatArray


class Finished:
    """Reads clients out of the model as they finish: those at the end of the group come first."""

    def __init__(self, model: AdaptedModel, starts: Sequence[AdapterState]) -> None:
        """Take a group that has not begun.

        Args:
            model: loaded with the group.
            starts: the states of its clients.
        """
        self._model, self._starts = model, starts
        self._training = len(starts)
        # Clients that left together: the place of the first of them, their states, and whether all
        # of these are finite.
        self._left: list[tuple[int, StackedStates, bool]] = []

    def leave(self, staying: int) -> bool:
        """Read out the clients from place `staying` on; return whether there are any."""
        leaving = self._starts[staying : self._training]
        if not leaving:
            return False
        states = self._model.read_from(leaving, staying)
        self._left.append((staying, states, all_finite(states.rows)))
        self._training = staying
        if staying > 0:
            self._model.keep(staying)
        return True

    def update(
        self,
        tasks: Sequence[ClientTask],
        clients: Sequence[int],
        losses: Sequence[torch.Tensor],
        seconds: float,
    ) -> BlockUpdate:
        """Return what the clients send back, once all have left.

        Args:
            tasks: of the clients, in the order of the group.
            clients: in the order of the update.
            losses: of each step, (clients that took part,).
            seconds: of each client.
        """
        numbers = [step.cpu().tolist() for step in losses]
        place = {task.client: i for i, task in enumerate(tasks)}
        reports, usable = [], []
        for client in clients:
            i = place[client]
            first, stack, finite = next(each for each in self._left if each[0] <= i)
            own = [step[i] for step in numbers if i < len(step)]
            report = _report(tasks[i], own, None if finite else stack[i - first], seconds)
            reports.append(report)
            usable += [(stack, i - first)] if report.usable else []
        if usable and all(stack is usable[0][0] for stack, _ in usable):
            return BlockUpdate(tuple(reports), usable[0][0].taken([row for _, row in usable]))
        return BlockUpdate(tuple(reports), [stack[row] for stack, row in usable])


def joined(updates: Sequence[BlockUpdate]) -> BlockUpdate:
    """Return the updates of clients that were trained one after the other as one."""
    if len(updates) == 1:
        return updates[0]
    reports = tuple(report for update in updates for report in update.reports)
    return BlockUpdate(reports, [state for update in updates for state in update.states])


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


def _report(
    task: ClientTask, losses: list[float], state: AdapterState | None, seconds: float
) -> ClientReport:
    """Return a client's report: an error where a loss or a weight is not finite.

    Args:
        task: what it did.
        losses: of its steps.
        state: where its weights stand; None: they are known to be finite.
        seconds: that it took.
    """
    error = _fault(losses, state)
    return ClientReport(
        client=task.client,
        examples=task.examples,
        train_loss=fmean(losses) if error is None else float("nan"),
        seconds=seconds,
        error=error,
        steps=len(losses),
    )


def _fault(losses: list[float], state: AdapterState | None) -> str | None:
    bad = [step for step, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        return f"loss is {losses[bad[0]]} in local step {bad[0] + 1} of {len(losses)}"
    if state is None:
        return None
    tensors = [*state.dense.values()]
    for factors in state.factors.values():
        tensors += [factors.a, factors.b]
    if not all(np.isfinite(tensor).all() for tensor in tensors):
        return f"weights are not finite after {len(losses)} local steps"
    return None

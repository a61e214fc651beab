"""Short ways to run tasks on a trainer; a trained client comes back with its own state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

from rayfed_lora.tasks.engine import Trainer
from rayfed_lora.tasks.messages import Evaluate, Initial, Train
from rayfed_lora.types import (
    AdapterState,
    Base,
    ClientReport,
    GlobalModel,
    LocalPlan,
    Predictions,
    Split,
    Trainable,
)


@dataclass(frozen=True)
class Update(ClientReport):
    """A client's report and the state that it sends back; None where that is not usable."""

    state: AdapterState | None = None


class _Kept:
    """Takes the place of the means of a rule, and keeps every state."""

    def __init__(self) -> None:
        self.weights: list[float] = []
        self.states: list[AdapterState] = []

    def add_all(
        self, weights: Sequence[float], states: Sequence[AdapterState], clients: Sequence[int]
    ) -> None:
        del clients
        self.weights += weights
        self.states += states

    def pack(self) -> None:
        """Keep the states as they are."""


def local_plan(**values: Any) -> LocalPlan:
    """Return the plan of a second round; its fields may be others."""
    return replace(LocalPlan(round=1, trainable="adapter", lr=0.1, proximal_weight=0.0), **values)


def train(
    trainer: Trainer,
    clients: Sequence[int],
    state: AdapterState,
    plan: LocalPlan,
    base: Base | None = None,
    **values: Any,
) -> list[Update]:
    """Train clients in one block from one state.

    Args:
        trainer: answers a `Train` whose rule keeps the states.
        clients: of the block.
        state: that they start from.
        plan: the round.
        base: None: the source's own weights.
        values: further fields of `Train`.
    """
    model = GlobalModel(state, base or Base(), plan.trainable)
    task = Train(model, plan, "keep", (tuple(clients),), **values)
    rules = {"keep": SimpleNamespace(means=_Kept, personal=False, alone=False)}
    with patch("rayfed_lora.tasks.training.RULES", rules):
        found: Any = trainer.run(task)
    usable = [report for report in found.reports if report.usable]
    assert [float(report.examples) for report in usable] == found.means.weights
    sent = dict(zip([report.client for report in usable], found.means.states, strict=True))
    return [Update(**vars(report), state=sent.get(report.client)) for report in found.reports]


def predict(
    trainer: Trainer,
    rows: slice,
    state: AdapterState,
    base: Base | None = None,
    trainable: Trainable = "adapter",
    split: Split = "test",
) -> Predictions:
    """Return the predictions on some rows of a split."""
    model = GlobalModel(state, base or Base(), trainable)
    (found,) = trainer.run(Evaluate(model, split, (rows,)))
    return found


def initial_tensors(trainer: Trainer, trainable: Trainable) -> dict[str, np.ndarray]:
    """Return the dense tensors that the first round starts from."""
    return trainer.run(Initial(trainable))

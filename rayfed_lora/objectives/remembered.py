"""The objective of a round with what clients and server remember, and its hooks after training.

Source: this project.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rayfed_lora.errors import RunError
from rayfed_lora.lora.stacked import A, B
from rayfed_lora.objectives.checks import checked, read_only
from rayfed_lora.objectives.objective import (
    Arrays,
    Done,
    ModelStep,
    Objective,
    Part,
    Shapes,
    trained_shapes,
    trained_tensors,
)
from rayfed_lora.objectives.objectives import OBJECTIVES
from rayfed_lora.types import AdapterState, ClientReport, LocalPlan

# Arrays by name, of each client that has taken part.
Memory = Mapping[int, Arrays]
# Begins the names of what a codec has lost of a client's update; the rest is the objective's.
LOST = "lost|"


def of_objective(memory: Arrays) -> dict[str, Any]:
    """Return a client's memory without what codecs have lost."""
    return {name: array for name, array in memory.items() if not name.startswith(LOST)}


@dataclass(frozen=True)
class Remembered:
    """The objective of a round, by name, and what it works with.

    Attributes:
        name, options: of the objective.
        memory: of clients that have any, of the objective and of error feedback.
        shared: of the server; empty where the objective shares nothing.
    """

    name: str = "none"
    options: Mapping[str, Any] = field(default_factory=dict)
    memory: Memory = field(default_factory=dict)
    shared: Arrays = field(default_factory=dict)

    @property
    def objective(self) -> Objective:
        """The objective with its options."""
        return OBJECTIVES.with_options(self.name, self.options)

    def of(self, clients: Iterable[int]) -> Remembered:
        """Return the same with the memory of some clients alone, as they get it."""
        known = replace(self, shared={}) if self.objective.steps_model else self
        if not self.memory:
            return known
        return replace(known, memory={k: self.memory[k] for k in clients if k in self.memory})

    def memory_of(self, client: int, trained: Shapes) -> Arrays:
        """Return a client's memory, 0 where it has none yet."""
        found = of_objective(self.memory.get(client, {}))
        return found or self.objective.zeros("memory", trained)

    def lost_of(self, client: int) -> Arrays:
        """Return what codecs have lost of a client's updates, by tensor; may be empty."""
        found = self.memory.get(client, {})
        return {n.removeprefix(LOST): x for n, x in found.items() if n.startswith(LOST)}

    def reported(
        self, report: ClientReport, start: AdapterState, end: AdapterState, plan: LocalPlan
    ) -> ClientReport:
        """Return the report of a usable client with its new memory and its message.

        Raises:
            RunError: the hook returned something else than declared.
        """
        objective, client = self.objective, report.client
        after = objective.hook("after")
        if after is None:
            return report
        trained = trained_shapes(start, plan.frozen)
        done = Done(
            client=client,
            round=plan.round,
            start=read_only(trained_tensors(start, plan.frozen)),
            end=read_only(trained_tensors(end, plan.frozen)),
            memory=read_only(self.memory_of(client, trained)),
            shared=read_only(self.shared),
            steps=report.steps,
            lr=plan.lr_of(client),
            examples=report.examples,
        )
        found = after(done)
        if not isinstance(found, tuple) or len(found) != 2:
            raise RunError(
                f"objective {self.name!r}, client {client} in round {plan.round + 1}: expected"
                f" after() to return (memory, message), got {type(found).__name__}"
            )
        parts: tuple[Part, Part] = ("memory", "message")
        memory, message = (
            checked(self._where(part, plan.round, client), given, objective.shapes(part, trained))
            for part, given in zip(parts, found, strict=True)
        )
        return replace(report, memory=memory or None, message=message or None)

    def model_after(
        self,
        start: AdapterState,
        mean: AdapterState,
        plan: LocalPlan,
        arrived: int,
        clients: int,
    ) -> tuple[AdapterState, Arrays]:
        """Return the server's next state, and the shared arrays where its hook steps the model.

        Args:
            start: the state that clients started from.
            mean: the state after the rule's step.
            plan: the round.
            arrived: number of clients whose update was used.
            clients: number of all clients of the run.

        Raises:
            RunError: the hook returned something else than declared.
        """
        model = self.objective.hook("model")
        if model is None or arrived == 0:
            return mean, self.shared
        begun, now = (trained_tensors(state, plan.frozen) for state in (start, mean))
        begun, now, shared = read_only(begun), read_only(now), read_only(self.shared)
        found = model(ModelStep(begun, now, shared, arrived, clients, plan.round))
        if not isinstance(found, tuple) or len(found) != 2:
            raise RunError(
                f"objective {self.name!r} in round {plan.round + 1}: expected model() to return"
                f" (model, shared), got {type(found).__name__}"
            )
        shapes = {name: array.shape for name, array in now.items()}
        where = f"objective {self.name!r}, model in round {plan.round + 1}"
        stepped = checked(where, found[0], shapes)
        factors = {
            name: replace(f, a=stepped.get(A + name, f.a), b=stepped.get(B + name, f.b))
            for name, f in mean.factors.items()
        }
        dense = {name: stepped.get(name, tensor) for name, tensor in mean.dense.items()}
        kept = {name: array.shape for name, array in self.shared.items()}
        new = checked(self._where("shared", plan.round), found[1], kept)
        return AdapterState(factors, dense), new

    def after_round(
        self, reports: Sequence[ClientReport], clients: int, round_index: int
    ) -> tuple[Memory, Arrays]:
        """Return the memory of all clients and the shared arrays after a round.

        Args:
            reports: of the cohort, in its order; clients that are not usable keep their memory.
            clients: number of all clients of the run.
            round_index: from 0.

        Raises:
            RunError: the hook returned something else than declared.
        """
        # Copies: arrays of a report are part of a message that would live as long as they do.
        new = {
            report.client: {name: array.copy() for name, array in report.memory.items()}
            for report in reports
            if report.memory is not None
        }
        memory = {**self.memory, **new} if new else self.memory
        server = self.objective.hook("server")
        usable = [report for report in reports if report.usable]
        if server is None or not usable:
            return memory, self.shared
        sent = [report.message or {} for report in usable]
        messages = {name: np.stack([each[name] for each in sent]) for name in sent[0]}
        found = server(read_only(self.shared), messages, clients)
        shapes = {name: array.shape for name, array in self.shared.items()}
        return memory, checked(self._where("shared", round_index), found, shapes)

    def _where(self, part: Part, round_index: int, client: int | None = None) -> str:
        of_client = "" if client is None else f" of client {client}"
        return f"objective {self.name!r}, {part}{of_client} in round {round_index + 1}"

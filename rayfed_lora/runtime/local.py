"""Everything in this process, without Ray. Source: this project."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from rayfed_lora.aggregation.means import Means
from rayfed_lora.federation.executor import (
    Call,
    Population,
    Starts,
    Trained,
    Training,
    joined,
    joins,
)
from rayfed_lora.training.protocol import Trainer
from rayfed_lora.types import (
    AdapterState,
    Base,
    ClientScore,
    FloatArray,
    LocalPlan,
    Predictions,
    Split,
    Trainable,
)


class LocalExecutor:
    """Runs one trainer in this process."""

    concurrent = False

    def __init__(self, rule: str, make: Callable[[], tuple[Trainer, Population]]) -> None:
        """Keep how the trainer is made.

        Args:
            rule: name of the aggregation rule.
            make: called by `open`; returns the trainer and what it serves.
        """
        self._rule = rule
        self._make = make
        self._trainer: Trainer | None = None

    def open(self) -> Population:
        """Make the trainer."""
        self._trainer, population = self._make()
        return population

    def _opened(self) -> Trainer:
        if self._trainer is None:
            raise RuntimeError("the executor is not open: call open() first")
        return self._trainer

    def initial_tensors(self, trainable: Trainable) -> dict[str, FloatArray]:
        """Return the dense tensors that the first round starts from."""
        return self._opened().initial_tensors(trainable)

    def train(
        self, state: AdapterState, base: Base, plan: LocalPlan, calls: Sequence[Call]
    ) -> Generator[Trained, None, None]:
        """Yield what comes of each call, in order."""
        trainer = self._opened()
        for run in joins(calls):
            parts: list[Means] = []
            for i, call in enumerate(run):
                training = Training(trainer, call, state, base, plan, self._rule)
                training.train()
                reports, means = training.reduced()
                parts.append(means)
                if i + 1 < len(run):
                    yield Trained(reports, None)
            whole = parts[0] if len(run) == 1 else joined(parts, self._rule)
            yield Trained(reports, whole)

    def evaluate(
        self,
        split: Split,
        shards: Sequence[slice],
        state: AdapterState,
        base: Base,
        trainable: Trainable,
    ) -> Callable[[], list[Predictions]]:
        """Return what computes the predictions on each shard of rows, in order."""
        trainer = self._opened()
        return lambda: [trainer.evaluate(split, rows, state, base, trainable) for rows in shards]

    def test_clients(
        self, calls: Sequence[Call], state: AdapterState, base: Base, trainable: Trainable
    ) -> Callable[[], list[ClientScore]]:
        """Return what tests clients on their own examples, in order."""
        trainer = self._opened()

        def tested() -> list[ClientScore]:
            found: list[ClientScore] = []
            for call in calls:
                starts = Starts(state, call)
                states = [starts.of(client) for client in call.clients]
                found += trainer.test_clients(call.clients, states, base, trainable)
            return found

        return tested

    def export(self, state: AdapterState, base: Base, trainable: Trainable) -> dict[str, bytes]:
        """Return the files of the trained model."""
        return self._opened().export(state, base, trainable)

    def close(self) -> None:
        """Let the trainer go."""
        self._trainer = None

"""Everything in this process, without Ray. Source: this project."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rayfed_lora.federation.executor import Population
from rayfed_lora.training.protocol import Trainer
from rayfed_lora.types import (
    AdapterState,
    Base,
    ClientUpdate,
    EvaluationSums,
    FloatArray,
    LocalPlan,
    Split,
    Trainable,
)


class LocalExecutor:
    """Runs one trainer in this process."""

    def __init__(self, make: Callable[[], tuple[Trainer, Population]]) -> None:
        """Keep how the trainer is made.

        Args:
            make: called by `open`; returns the trainer and what it serves.
        """
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
        self, state: AdapterState, base: Base, plan: LocalPlan, blocks: Sequence[tuple[int, ...]]
    ) -> Iterator[ClientUpdate]:
        """Yield one update a client, in the order of the blocks."""
        trainer = self._opened()
        for block in blocks:
            yield from trainer.train(block, state, base, plan)

    def evaluate(
        self,
        split: Split,
        shards: Sequence[slice],
        state: AdapterState,
        base: Base,
        trainable: Trainable,
    ) -> list[EvaluationSums]:
        """Return the sums over each shard of rows, in order."""
        trainer = self._opened()
        return [trainer.evaluate(split, rows, state, base, trainable) for rows in shards]

    def export(self, state: AdapterState, base: Base, trainable: Trainable) -> dict[str, bytes]:
        """Return the files of the trained model."""
        return self._opened().export(state, base, trainable)

    def close(self) -> None:
        """Let the trainer go."""
        self._trainer = None

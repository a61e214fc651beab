"""The seam between the round loop and where clients train. Source: this project."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from rayfed_lora.types import (
    AdapterState,
    Base,
    ClientUpdate,
    EvaluationSums,
    FloatArray,
    LocalPlan,
    ModelShape,
    Split,
    Trainable,
)


@dataclass(frozen=True)
class Population:
    """What the round loop needs to know of the workload.

    Attributes:
        shape: the model's sizes.
        clients: number of clients.
        examples: number of examples of each split.
        label_names: name of class i at place i.
    """

    shape: ModelShape
    clients: int
    examples: dict[Split, int]
    label_names: tuple[str, ...] = ()


class Executor(Protocol):
    """Trains and evaluates. Results never depend on which executor it is or on its size."""

    def open(self) -> Population:
        """Make everything ready and say what there is."""
        ...

    def initial_tensors(self, trainable: Trainable) -> dict[str, FloatArray]:
        """Return the dense tensors that the first round starts from."""
        ...

    def train(
        self, state: AdapterState, base: Base, plan: LocalPlan, blocks: Sequence[tuple[int, ...]]
    ) -> Iterator[ClientUpdate]:
        """Yield one update a client, in the order of the blocks.

        Raises:
            ClientError: a client's training raised.
        """
        ...

    def evaluate(
        self,
        split: Split,
        shards: Sequence[slice],
        state: AdapterState,
        base: Base,
        trainable: Trainable,
    ) -> list[EvaluationSums]:
        """Return the sums over each shard of rows, in order."""
        ...

    def export(self, state: AdapterState, base: Base, trainable: Trainable) -> dict[str, bytes]:
        """Return the files of the trained model, by path inside the run folder."""
        ...

    def close(self) -> None:
        """Free what `open` took."""
        ...

"""The seam between the round loop and where clients train. Source: this project."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.aggregation.step import Reduction
from rayfed_lora.federation.sampling import Block
from rayfed_lora.types import (
    AdapterState,
    Base,
    ClientUpdate,
    Device,
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
        device: kind of device that clients are trained on.
    """

    shape: ModelShape
    clients: int
    examples: dict[Split, int]
    label_names: tuple[str, ...] = ()
    device: Device = "cpu"


@dataclass(frozen=True)
class Trained:
    """What comes back of some consecutive clients of a round.

    Attributes:
        clients: a report of each, in order; their states are left out.
        reduction: of the usable updates, by the run's rule; None where a later one covers them.
    """

    clients: tuple[ClientUpdate, ...]
    reduction: Reduction | None


# Calls whose reductions the server joins by itself; of more, trainers join runs of `JOINED_CALLS`.
_CALLS_OF_ONE_SERVER = 64
JOINED_CALLS = 32
_T = TypeVar("_T")


def joins(calls: Sequence[_T]) -> list[Sequence[_T]]:
    """Cut the calls of a round into the runs whose reductions are joined before the server's turn.

    >>> [len(run) for run in joins(range(3))], [len(run) for run in joins(range(70))]
    ([1, 1, 1], [32, 32, 6])
    """
    step = 1 if len(calls) <= _CALLS_OF_ONE_SERVER else JOINED_CALLS
    return [calls[i : i + step] for i in range(0, len(calls), step)]


def reduced(
    updates: Iterable[ClientUpdate], rule: str
) -> tuple[tuple[ClientUpdate, ...], Reduction]:
    """Reduce updates as they come; return the clients' reports and the reduction.

    Args:
        updates: in client order.
        rule: name of the aggregation rule.
    """
    reduction = RULES[rule].reduction()
    reports = []
    for update in updates:
        reports.append(replace(update, state=None))
        if update.state is not None:
            reduction.add(float(update.examples), update.state)
    return tuple(reports), reduction


def joined(parts: Iterable[Reduction], rule: str) -> Reduction:
    """Join reductions of consecutive clients, in order.

    Args:
        parts: reductions by the same rule.
        rule: its name.
    """
    whole = RULES[rule].reduction()
    for part in parts:
        whole.join(part)
    return whole


class Executor(Protocol):
    """Trains and evaluates. Results never depend on which executor it is or on its size."""

    def open(self) -> Population:
        """Make everything ready and say what there is."""
        ...

    def initial_tensors(self, trainable: Trainable) -> dict[str, FloatArray]:
        """Return the dense tensors that the first round starts from."""
        ...

    def train(
        self, state: AdapterState, base: Base, plan: LocalPlan, calls: Sequence[tuple[Block, ...]]
    ) -> Iterator[Trained]:
        """Train all clients from `state`; yield what comes of each call, in order.

        Args:
            state: the global state.
            base: what is frozen.
            plan: the round.
            calls: blocks of clients; a block is trained together, a call by one trainer.

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
    ) -> Callable[[], list[EvaluationSums]]:
        """Start an evaluation; what is returned waits for the sums over each shard, in order."""
        ...

    def export(self, state: AdapterState, base: Base, trainable: Trainable) -> dict[str, bytes]:
        """Return the files of the trained model, by path inside the run folder."""
        ...

    def close(self) -> None:
        """Free what `open` took."""
        ...

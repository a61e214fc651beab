"""The seam between the round loop and where clients train. Source: this project."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from rayfed_lora.aggregation.means import Means
from rayfed_lora.federation.sampling import Block
from rayfed_lora.types import (
    AdapterState,
    Base,
    ClientScore,
    ClientUpdate,
    Device,
    DeviceFacts,
    FloatArray,
    LocalPlan,
    ModelShape,
    Predictions,
    Split,
    Trainable,
)

IndexArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Population:
    """What the round loop needs to know of the workload.

    Attributes:
        shape: the model's sizes.
        clients: number of clients.
        examples: number of examples of each split.
        label_names: name of class i at place i.
        device: kind of device that clients are trained on.
        devices: number of examples of each client, and what its device is like.
        label_counts: clients (k,) that stand for all, and how many training examples of each class
            they hold (k, classes).
        notes: what the user should know of data and model before the first round, one line each.
        client_names: (clients,) what the data call each client; None where they do not.
        fingerprint: digest by part of the data, empty where none was made.
    """

    shape: ModelShape
    clients: int
    examples: dict[Split, int]
    label_names: tuple[str, ...] = ()
    device: Device = "cpu"
    devices: DeviceFacts = field(default_factory=lambda: DeviceFacts(np.zeros(0, np.int64)))
    label_counts: tuple[IndexArray, IndexArray] | None = None
    notes: tuple[str, ...] = ()
    client_names: tuple[str, ...] | None = None
    fingerprint: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """What comes back of some consecutive clients of a round.

    Attributes:
        clients: a report of each, in order; their states are left out.
        means: of the usable updates, as the run's rule needs them; None where later ones cover
            them.
        retries: how often they were trained again because an actor was lost.
    """

    clients: tuple[ClientUpdate, ...]
    means: Means | None
    retries: int = 0


@dataclass(frozen=True)
class Call:
    """What one trainer does in one go.

    Attributes:
        blocks: clients that are trained together, block by block.
        limits: largest rank of a client, where it is limited.
        personal: B by module, of each client that has one of its own.
    """

    blocks: tuple[Block, ...]
    limits: Mapping[int, int] = field(default_factory=dict)
    personal: Mapping[int, Mapping[str, FloatArray]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        blocks: tuple[Block, ...],
        limits: IndexArray | None,
        personal: Mapping[int, Mapping[str, FloatArray]],
    ) -> Call:
        """Return the call for some blocks, with what sets their clients apart.

        Args:
            blocks: clients that are trained together, block by block.
            limits: largest rank of each client there is, where any is limited.
            personal: B by module, of each client there is that has one of its own.
        """
        call = cls(blocks)
        limited = {} if limits is None else {k: int(limits[k]) for k in call.clients}
        own = {k: personal[k] for k in call.clients if k in personal}
        return replace(call, limits=limited, personal=own)

    @property
    def clients(self) -> tuple[int, ...]:
        """All clients, in order."""
        return tuple(chain.from_iterable(self.blocks))

    def halved(self, times: int) -> Call:
        """Return the call with each block in two, so many times.

        >>> Call(((0, 1, 2), (3,))).halved(1).blocks
        ((0,), (1, 2), (3,))
        """
        blocks = self.blocks
        for _ in range(times):
            blocks = tuple(
                part
                for block in blocks
                for part in (block[: len(block) // 2], block[len(block) // 2 :])
                if part
            )
        return replace(self, blocks=blocks)


# Calls whose means the server joins by itself; of more, trainers join runs of `JOINED_CALLS`.
_CALLS_OF_ONE_SERVER = 64
JOINED_CALLS = 32
_T = TypeVar("_T")
_R = TypeVar("_R")
_S = TypeVar("_S")


def joins(calls: Sequence[_T]) -> list[Sequence[_T]]:
    """Cut the calls of a round into the runs whose means are joined before the server's turn.

    >>> [len(run) for run in joins(range(3))], [len(run) for run in joins(range(70))]
    ([1, 1, 1], [32, 32, 6])
    """
    step = 1 if len(calls) <= _CALLS_OF_ONE_SERVER else JOINED_CALLS
    return [calls[i : i + step] for i in range(0, len(calls), step)]


# For executors that do several things at once.
PATIENCE = 2


class Pending(Generic[_R]):
    """Work that was started: called, it waits for the result."""

    def __init__(self, wait: Callable[[], _R], done: Callable[[], bool]) -> None:
        """Take what waits for the result, and what tells whether it is there as far as is known."""
        self._wait = wait
        self.done = done

    def __call__(self) -> _R:
        """Return the result, once it is there."""
        return self._wait()

    def then(self, change: Callable[[_R], _S]) -> Pending[_S]:
        """Return what waits for something that is made of the result."""
        return Pending(lambda: change(self()), self.done)


class Executor(Protocol):
    """Trains and evaluates. Results never depend on which executor it is or on its size.

    Attributes:
        concurrent: whether what is started goes on while the server does something else.
        patience: how many rounds may be trained before an earlier one is tested, beside the one
            that its test was begun behind.
    """

    concurrent: bool
    patience: int

    def open(self) -> Population:
        """Make everything ready and say what there is."""
        ...

    def initial_tensors(self, trainable: Trainable) -> dict[str, FloatArray]:
        """Return the dense tensors that the first round starts from."""
        ...

    def train(
        self, state: AdapterState, base: Base, plan: LocalPlan, calls: Sequence[Call]
    ) -> Generator[Trained, None, None]:
        """Train all clients from `state`; yield what comes of each call, in order.

        Closed before its end, it begins no more calls.

        Args:
            state: the global state.
            base: what is frozen.
            plan: the round.
            calls: clients; a block is trained together, a call by one trainer.

        Raises:
            ClientError: a client's training raised, and the plan is not tolerant.
        """
        ...

    def evaluate(
        self,
        split: Split,
        shards: Sequence[slice],
        state: AdapterState,
        base: Base,
        trainable: Trainable,
        before: int = 0,
    ) -> Pending[list[Predictions]]:
        """Start an evaluation; what is returned waits for the shards' predictions, in order.

        Args:
            split: whose rows.
            shards: rows.
            state: the global state.
            base: what is frozen.
            trainable: `full` or `adapter`.
            before: the first round whose training may not be begun before it.
        """
        ...

    def test_clients(
        self,
        calls: Sequence[Call],
        state: AdapterState,
        base: Base,
        trainable: Trainable,
        before: int = 0,
    ) -> Pending[list[ClientScore]]:
        """Start tests on clients' own examples; what is returned waits for them, in order.

        Args:
            calls: clients; one with a B of its own is tested with that.
            state: the global state.
            base: what is frozen.
            trainable: `full` or `adapter`.
            before: as of `evaluate`.
        """
        ...

    def export(self, state: AdapterState, base: Base, trainable: Trainable) -> dict[str, bytes]:
        """Return the files of the trained model, by path inside the run folder."""
        ...

    def close(self) -> None:
        """Free what `open` took."""
        ...

"""The seam between the round loop and where clients train. Source: this project."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from threading import Lock
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from rayfed_lora.aggregation.means import Means
from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.errors import BlockMemoryError, ClientError
from rayfed_lora.federation.sampling import Block
from rayfed_lora.types import (
    AdapterState,
    Base,
    ClientScore,
    ClientUpdate,
    Device,
    DeviceFacts,
    Factors,
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
    """

    shape: ModelShape
    clients: int
    examples: dict[Split, int]
    label_names: tuple[str, ...] = ()
    device: Device = "cpu"
    devices: DeviceFacts = field(default_factory=lambda: DeviceFacts(np.zeros(0, np.int64)))
    label_counts: tuple[IndexArray, IndexArray] | None = None


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


class Training:
    """The clients of a call on their way to the means of their updates.

    Each step may be another thread's, and `train` any trainer's.
    """

    def __init__(
        self, call: Call, state: AdapterState, base: Base, plan: LocalPlan, rule: str
    ) -> None:
        """Begin nothing yet.

        Args:
            call: the clients.
            state: the global state.
            base: what is frozen.
            plan: the round.
            rule: name of the aggregation rule.
        """
        self._rule = RULES[rule]
        self._call, self._state, self._base, self._plan = call, state, base, plan
        self._drawn: list[object] | None = None
        self._drawing = Lock()
        self._means: Means = self._rule.means()
        self._reports: list[ClientUpdate] = []
        self._last: list[ClientUpdate] = []

    def draw(self, trainer: Trains) -> None:
        """Draw the batches, unless that is done: any trainer's will do, whatever it trains."""
        with self._drawing:
            if self._drawn is None:
                self._drawn = [_drawn(trainer, block, self._plan) for block in self._call.blocks]

    def train(self, trainer: Trains) -> None:
        """Train block by block; all but the last one are taken in meanwhile."""
        self.draw(trainer)
        start = Starts(self._state, self._call, own_b=self._rule.personal)
        for block, drawn in zip(self._call.blocks, self._drawn or (), strict=True):
            self._take()
            updates = _updates(trainer, block, start, self._base, self._plan, drawn)
            self._last = list(updates)

    def reduced(self) -> tuple[tuple[ClientUpdate, ...], Means]:
        """Take in the last block; return the clients' reports, without states, and the means."""
        self._take()
        self._means.pack()
        return tuple(self._reports), self._means

    def _take(self) -> None:
        # Gone before the next block is trained.
        updates, self._last = self._last, []
        self._means.add_all([(float(u.examples), u.state) for u in updates if u.state is not None])
        for update in updates:
            own = None
            if self._rule.personal and update.state is not None and update.state.factors:
                own = {name: f.b for name, f in update.state.factors.items()}
            self._reports.append(replace(update, state=None, personal=own))


def _drawn(trainer: Trains, block: Block, plan: LocalPlan) -> object:
    try:
        return trainer.draw(block, plan)
    except ClientError:
        # It is raised again when it is the block's turn, which then knows what to do.
        return None


def _updates(
    trainer: Trains,
    block: Block,
    start: Starts,
    base: Base,
    plan: LocalPlan,
    drawn: object = None,
) -> Iterator[ClientUpdate]:
    """Train a block: in halves where memory is short, without those who raise where that may be.

    Args:
        trainer: trains it.
        block: the clients.
        start: their states.
        base: what is frozen.
        plan: the round.
        drawn: what a trainer has drawn for this block, if any.

    Raises:
        ClientError: a client raised, or does not even fit into memory alone.
    """
    failure: BlockMemoryError | ClientError
    try:
        # Whole before its first update is used: what is trained again must not be used twice.
        starts = [start.of(client) for client in block]
        found = list(trainer.train(block, starts, base, plan, drawn))
    except (BlockMemoryError, ClientError) as error:
        if isinstance(error, ClientError) and not plan.tolerant:
            raise
        # Without what it was raised in, which would stay in memory while others are trained.
        failure = error.with_traceback(None)
        failure.__cause__ = failure.__context__ = None
    else:
        yield from found
        return
    if isinstance(failure, BlockMemoryError) and len(block) > 1:
        half = len(block) // 2
        first, *others = _updates(trainer, block[:half], start, base, plan)
        yield replace(first, note=_joined_notes(f"{failure}; trained in halves", first.note))
        yield from others
        yield from _updates(trainer, block[half:], start, base, plan)
        return
    if isinstance(failure, BlockMemoryError):
        failure = ClientError(block[0], plan.round, str(failure))
        if not plan.tolerant:
            raise failure
    lone = _raised(failure)
    rest = tuple(client for client in block if client != lone.client)
    trained_ones = list(_updates(trainer, rest, start, base, plan)) if rest else []
    yield from sorted([*trained_ones, lone], key=lambda update: block.index(update.client))


def _joined_notes(*notes: str | None) -> str:
    return "; ".join(note for note in notes if note is not None)


def _raised(error: ClientError) -> ClientUpdate:
    nothing = float("nan")
    return ClientUpdate(error.client, 0, None, nothing, 0.0, error.reason, error.trace)


class Starts:
    """The states that clients start a round from.

    A limited client gets the first rows of A and columns of B: HetLoRA's cut, and the best
    approximation of its rank where B is 0 or the factors come from an SVD. A client with a B of
    its own has that in place of the global one.
    """

    def __init__(self, state: AdapterState, call: Call, *, own_b: bool = False) -> None:
        """Take the global state and the clients that differ from it.

        Args:
            state: the global state.
            call: the clients.
            own_b: whether each client has a B of its own: one that has none yet starts from 0.
        """
        self._state = state
        self._call = call
        if own_b:
            zero = {n: replace(f, b=np.zeros_like(f.b)) for n, f in state.factors.items()}
            self._state = replace(state, factors=zero)
        self._cut: dict[int, AdapterState] = {}

    def of(self, client: int) -> AdapterState:
        """Return a client's state; the same object for clients of the same rank."""
        own = self._call.personal.get(client)
        if own is not None:
            factors = {n: replace(f, b=own[n]) for n, f in self._state.factors.items()}
            return replace(self._state, factors=factors)
        limit = self._call.limits.get(client)
        if limit is None:
            return self._state
        if limit not in self._cut:
            factors = {n: _leading(f, limit) for n, f in self._state.factors.items()}
            self._cut[limit] = replace(self._state, factors=factors)
        return self._cut[limit]


def _leading(f: Factors, rank: int) -> Factors:
    return f if f.rank <= rank else Factors(f.a[:rank], f.b[:, :rank], f.scale)


def joined(parts: Iterable[Means], rule: str) -> Means:
    """Join means of consecutive clients, in order.

    Args:
        parts: as the same rule needs them.
        rule: its name.
    """
    whole = RULES[rule].means()
    for part in parts:
        whole.join(part)
    whole.pack()
    return whole


class Trains(Protocol):
    """What trains a block: a part of `training.protocol.Trainer`."""

    def draw(self, clients: Sequence[int], plan: LocalPlan) -> object:
        """Return what `train` needs of a block that takes no model, such as its batches."""
        ...

    def train(
        self,
        clients: Sequence[int],
        starts: Sequence[AdapterState],
        base: Base,
        plan: LocalPlan,
        drawn: object = None,
    ) -> Iterator[ClientUpdate]:
        """Train each client of a block from its state; one update a client, in the same order."""
        ...


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

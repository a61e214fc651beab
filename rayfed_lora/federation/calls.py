"""The clients of a call on their way to the means of their updates. Source: this project."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from threading import Lock
from typing import Protocol

import numpy as np

from rayfed_lora.aggregation.means import Means
from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.errors import BlockMemoryError, ClientError
from rayfed_lora.federation.executor import Call
from rayfed_lora.federation.sampling import Block
from rayfed_lora.types import AdapterState, Base, ClientUpdate, Factors, LocalPlan

# Blocks of a call that are drawn ahead: what is drawn stays in memory until its turn, and a call
# of a large cohort has a hundred of them.
_DRAWN_AHEAD = 4


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
        """Draw for the first blocks, unless that is done: any trainer will do, also a busy one."""
        with self._drawing:
            if self._drawn is None:
                ahead = self._call.blocks[:_DRAWN_AHEAD]
                self._drawn = [_drawn(trainer, block, self._plan) for block in ahead]

    def train(self, trainer: Trains) -> None:
        """Train block by block; all but the last one are taken in meanwhile."""
        self.draw(trainer)
        start = Starts(self._state, self._call, own_b=self._rule.personal)
        for block in self._call.blocks:
            drawn = self._drawn.pop(0) if self._drawn else None
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

"""Trainers in threads of one process: who does what, and when."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from rayfed_lora.federation.calls import Training
from rayfed_lora.federation.executor import Call

from rayfed_lora.engines.local import LocalExecutor
from rayfed_lora.types import AdapterState, Base, ClientUpdate, LocalPlan

PLAN = LocalPlan(0, "adapter", 0.1, 0.0, None, False)
STATE = AdapterState({}, {})


class Watched:
    """A trainer of which several share what they write down."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared

    def draw(self, clients: Sequence[int], plan: LocalPlan) -> list[int]:
        self.shared.ask(clients[0])
        return [*clients]

    def train(
        self, clients: Sequence[int], starts: Any, base: Base, plan: LocalPlan, drawn: object = None
    ) -> Iterator[ClientUpdate]:
        assert drawn == [*clients]
        self.shared.compute(clients[0])
        for client in clients:
            state = AdapterState({}, {"w": np.full(2, 2, np.float32)})
            yield ClientUpdate(client, 1 + client, state, 0.5, 0.1)


class Shared:
    """What the trainers do; who computes a client that `held` names waits for `go_on`."""

    def __init__(self, held: frozenset[int] = frozenset(), ill: int | None = None) -> None:
        self.asked: list[int] = []
        self.computed: list[int] = []
        self.held, self.ill, self.go_on = held, ill, threading.Event()

    def ask(self, client: int) -> None:
        self.asked.append(client)
        if client == self.ill:
            raise RuntimeError("no batches")

    def compute(self, client: int) -> None:
        self.computed.append(client)
        if client in self.held:
            assert self.go_on.wait(10)


def opened(shared: Shared, threads: int) -> LocalExecutor:
    trainers: Any = [Watched(shared) for _ in range(threads)]
    executor = LocalExecutor("product-svd", lambda: (trainers, None))  # type: ignore[arg-type,return-value]
    executor.open()
    return executor


def calls(count: int) -> list[Call]:
    return [Call(((k,),)) for k in range(count)]


def until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_batches_of_a_call_are_drawn_while_the_one_before_it_is_computed():
    shared = Shared(held=frozenset(range(5)))
    executor = opened(shared, 2)
    parts = executor.train(STATE, Base(), PLAN, calls(5))
    # Two are computed, and one more for each of them has been asked for; the fifth has not.
    until(lambda: len(shared.asked) == 4 and len(shared.computed) == 2)
    time.sleep(0.05)
    assert sorted(shared.asked) == [0, 1, 2, 3]
    assert len(shared.computed) == 2
    shared.go_on.set()
    reports = [report.client for part in parts for report in part.clients]
    assert reports == [0, 1, 2, 3, 4]
    assert sorted(shared.computed) == [0, 1, 2, 3, 4]
    executor.close()


def test_only_the_first_blocks_of_a_large_call_are_drawn_ahead():
    class Trainer(Watched):
        def train(self, clients: Any, *args: Any) -> Iterator[ClientUpdate]:
            trained.append((clients[0], args[-1] is not None))
            return super().train(clients, *args[:-1], [*clients])

    trained: list[tuple[int, bool]] = []
    shared = Shared()
    trainer = Trainer(shared)
    call = Call(tuple((k,) for k in range(6)))
    training = Training(call, STATE, Base(), PLAN, "product-svd")
    training.draw(trainer)
    assert shared.asked == [0, 1, 2, 3]
    training.train(trainer)
    assert shared.asked == [0, 1, 2, 3]
    # The others are drawn by the trainer in their turn.
    assert trained == [(k, k < 4) for k in range(6)]
    assert [report.client for report in training.reduced()[0]] == [*range(6)]


def test_what_one_trainer_is_at_keeps_no_call_from_another():
    # The call after the long one was drawn beside it, and is the other trainer's.
    shared = Shared(held=frozenset([0]))
    executor = opened(shared, 2)
    parts = executor.train(STATE, Base(), PLAN, calls(5))
    until(lambda: sorted(shared.computed) == [0, 1, 2, 3, 4])
    shared.go_on.set()
    assert [report.client for part in parts for report in part.clients] == [0, 1, 2, 3, 4]
    assert sorted(shared.asked) == [0, 1, 2, 3, 4]
    executor.close()


def test_one_trainer_does_all_when_it_is_asked_for():
    shared = Shared()
    executor = opened(shared, 1)
    parts = executor.train(STATE, Base(), PLAN, calls(3))
    assert shared.asked == []
    assert [report.client for part in parts for report in part.clients] == [0, 1, 2]
    executor.close()


def test_what_goes_wrong_before_its_turn_is_raised_to_who_asks_for_it():
    shared = Shared(ill=3)
    executor = opened(shared, 2)
    parts = executor.train(STATE, Base(), PLAN, calls(5))
    with pytest.raises(RuntimeError, match="no batches"):
        list(parts)
    executor.close()


def test_once_it_is_closed_no_more_calls_are_computed():
    shared = Shared(held=frozenset(range(6)))
    executor = opened(shared, 2)
    executor.train(STATE, Base(), PLAN, calls(6))
    until(lambda: len(shared.asked) == 4)
    executor.close()
    shared.go_on.set()
    time.sleep(0.1)
    # What was reserved may still have begun.
    assert set(shared.computed) <= {0, 1, 2, 3}

"""What runs inside Ray's workers, without Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from rayfed_lora.engines.on_ray.messages import Message, packed, unpacked
from rayfed_lora.federation.executor import Call

from rayfed_lora.engines.on_ray.actors import ClientActor, EvaluateTask, TrainTask, calls_at_once
from rayfed_lora.engines.threads import TrainerThreads
from rayfed_lora.launching.simulation_server import SimulationServer
from rayfed_lora.training import python_lock
from rayfed_lora.types import AdapterState, Base, ClientUpdate, LocalPlan

PLAN = LocalPlan(0, "adapter", 0.1, 0.0, None, False)
BASE = packed(Base())


def opened(*trainers: Any) -> ClientActor:
    actor = ClientActor(0.0, "client-actor-00", len(trainers))
    actor._threads, actor._rule = TrainerThreads(trainers), "product-svd"
    return actor


def evaluated(actor: ClientActor, rows: slice, state: Message, number: int) -> Any:
    task = packed(EvaluateTask("test", rows, "adapter", number))
    return unpacked(actor.evaluate(task, state, BASE)).value


def trained(actor: ClientActor, block: tuple[int, ...]) -> tuple[tuple[ClientUpdate, ...], Any]:
    task = packed(TrainTask(Call((block,)), PLAN, 0, means_apart=False))
    message = actor.train(task, packed(AdapterState({}, {})), BASE)
    reports, means = unpacked(message).value
    return reports, means


class Watched:
    """A trainer that writes down which thread computes, and how many at the same time."""

    def __init__(self) -> None:
        self.threads: list[int] = []
        self.rows: list[slice] = []
        self.most_at_once = self._computing = 0

    def evaluate(self, split: str, rows: slice, *_: Any) -> slice:
        self._computing += 1
        self.most_at_once = max(self.most_at_once, self._computing)
        self.threads.append(threading.get_ident())
        self.rows.append(rows)
        time.sleep(0.02)
        self._computing -= 1
        return rows


def test_calls_that_come_at_once_are_computed_by_one_thread_in_turn():
    trainer = Watched()
    actor = opened(trainer)

    state = packed(AdapterState({}, {}))

    def evaluate(row: int) -> Any:
        return evaluated(actor, slice(row, row + 1), state, 0)

    with ThreadPoolExecutor(calls_at_once(1)) as callers:
        found = list(callers.map(evaluate, range(6)))
        own = {callers.submit(threading.get_ident).result() for _ in range(20)}
    assert found == [slice(row, row + 1) for row in range(6)]
    assert sorted(trainer.rows, key=lambda rows: rows.start) == found
    assert trainer.most_at_once == 1
    assert len(set(trainer.threads)) == 1
    assert not own & set(trainer.threads)


def test_shards_of_a_split_are_tested_with_the_same_object():
    class Tested:
        def __init__(self) -> None:
            self.states: list[AdapterState] = []

        def evaluate(self, split: str, rows: slice, state: AdapterState, *_: Any) -> None:
            self.states.append(state)

    trainer = Tested()
    actor = opened(trainer)
    state = packed(AdapterState({}, {}))
    for number in (1, 1, 2):
        evaluated(actor, slice(0, 1), state, number)
    first, again, other = trainer.states
    assert first is again
    assert other is not first


class Slow(dict[str, np.ndarray]):
    """Tensors that are summed slowly: the first time they wait until something is set."""

    def __init__(self, awaited: threading.Event) -> None:
        super().__init__(w=np.ones(2, np.float32))
        self.awaited, self.threads = awaited, set[int]()

    def values(self) -> Any:
        self.threads.add(threading.get_ident())
        assert self.awaited.wait(10), "nothing was computed while this was summed up"
        return super().values()


class TwoBlocks:
    """A trainer of two blocks: the sum of the first one waits until the second one is trained."""

    def __init__(self) -> None:
        self.threads: set[int] = set()
        self.second = threading.Event()
        self.sent = Slow(self.second)

    def draw(self, clients: tuple[int, ...], plan: LocalPlan) -> None:
        """Nothing."""

    def train(self, clients: tuple[int, ...], *_: Any) -> Iterator[ClientUpdate]:
        self.threads.add(threading.get_ident())
        for client in clients:
            state = AdapterState({}, self.sent)
            yield ClientUpdate(client, 1 + client, state, 0.5, 0.1)
        if clients == (2, 3):
            self.second.set()


def test_what_a_call_has_come_to_is_summed_up_while_the_next_one_is_computed():
    trainer = TwoBlocks()
    actor = opened(trainer)
    with ThreadPoolExecutor(calls_at_once(1)) as callers:
        first = callers.submit(trained, actor, (0, 1))
        while not trainer.threads:
            time.sleep(0.001)
        second = callers.submit(trained, actor, (2, 3))
        (reports, means), (others, _) = first.result(), second.result()
    assert [each.client for each in (*reports, *others)] == [0, 1, 2, 3]
    assert all(each.state is None for each in reports)
    assert means.tensors()["w"].tolist() == [1.0, 1.0]
    assert len(trainer.threads) == len(trainer.sent.threads) == 1
    assert not trainer.threads & trainer.sent.threads


class Ahead:
    """A trainer whose first block is not done before the second one is asked for."""

    def __init__(self) -> None:
        self.computing: list[int] = []
        self.asked = threading.Event()

    def draw(self, clients: tuple[int, ...], plan: LocalPlan) -> None:
        if self.computing:
            self.asked.set()

    def train(self, clients: tuple[int, ...], *_: Any) -> Iterator[ClientUpdate]:
        self.computing.append(threading.get_ident())
        assert self.asked.wait(10), "nothing was asked for while this was trained"
        for client in clients:
            state = AdapterState({}, {"w": np.ones(2, np.float32)})
            yield ClientUpdate(client, 1 + client, state, 0.5, 0.1)


def test_a_block_is_asked_for_while_the_one_before_it_is_trained():
    trainer = Ahead()
    actor = opened(trainer)
    with ThreadPoolExecutor(calls_at_once(1)) as callers:
        first = callers.submit(trained, actor, (0, 1))
        while not trainer.computing:
            time.sleep(0.001)
        second = callers.submit(trained, actor, (2, 3))
        clients = [each.client for call in (first, second) for each in call.result()[0]]
    assert clients == [0, 1, 2, 3]
    assert len(set(trainer.computing)) == 1


class InPython:
    """A trainer that needs Python's lock at first, and then waits for the next block to come."""

    def __init__(self) -> None:
        self.began, self.go_on, self.asked_again = (threading.Event() for _ in range(3))
        # Of each block, whether the lock was needed when it was asked for.
        self.disturbed: list[bool] = []
        self._in_python = False

    def draw(self, clients: tuple[int, ...], plan: LocalPlan) -> None:
        if self.disturbed:
            self.asked_again.set()
        self.disturbed.append(self._in_python)

    def train(self, clients: tuple[int, ...], *_: Any) -> Iterator[ClientUpdate]:
        with python_lock.needed():
            self._in_python = True
            self.began.set()
            assert self.go_on.wait(10)
            self._in_python = False
            python_lock.rarely_needed()
            assert self.asked_again.wait(10), "the next block waited for the end of this one"
        for client in clients:
            yield ClientUpdate(client, 1, AdapterState({}, {}), 0.5, 0.1)


class Meeting:
    """Trainers of one actor that wait for each other: alone none of them gets on."""

    def __init__(self, count: int) -> None:
        self.met = threading.Barrier(count, timeout=10)

    def draw(self, clients: tuple[int, ...], plan: LocalPlan) -> None:
        """Nothing."""

    def train(self, clients: tuple[int, ...], *_: Any) -> Iterator[ClientUpdate]:
        self.met.wait()
        for client in clients:
            state = AdapterState({}, {"w": np.full(2, client, np.float32)})
            yield ClientUpdate(client, 1, state, 0.5, 0.1)


def test_an_actor_of_two_trainers_trains_two_blocks_at_once():
    trainer = Meeting(2)
    actor = opened(trainer, trainer)
    blocks = [(0, 1), (2, 3), (4, 5), (6, 7)]
    with ThreadPoolExecutor(calls_at_once(2)) as callers:
        found = [callers.submit(trained, actor, block) for block in blocks]
        reports = [[each.client for each in call.result()[0]] for call in found]
        sums = [call.result()[1].tensors()["w"].tolist() for call in found]
    assert reports == [list(block) for block in blocks]
    assert sums == [[sum(block) / 2] * 2 for block in blocks]


def test_a_call_is_not_looked_at_while_the_one_before_it_needs_python(monkeypatch):
    monkeypatch.setattr(python_lock, "_LONGEST_S", 10.0)
    trainer = InPython()
    actor = opened(trainer)
    with ThreadPoolExecutor(calls_at_once(1)) as callers:
        first = callers.submit(trained, actor, (0, 1))
        assert trainer.began.wait(10)
        second = callers.submit(trained, actor, (2, 3))
        # It would have been asked by now.
        assert not trainer.asked_again.wait(0.1)
        trainer.go_on.set()
        assert [len(call.result()[0]) for call in (first, second)] == [2, 2]
    assert trainer.disturbed == [False, False]


def test_nobody_waits_for_a_computing_thread_for_ever():
    with python_lock.needed():
        began = time.monotonic()
        python_lock.wait()
        assert time.monotonic() - began < 1.0


@pytest.mark.parametrize("kind", [ClientActor, SimulationServer])
def test_an_actor_that_could_not_be_made_says_who_it_is(kind: type) -> None:
    # Ray asks for it when it tells why; if that raised, it would start the actor again for ever.
    assert isinstance(repr(object.__new__(kind)), str)

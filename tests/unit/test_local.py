"""Engines in one process: which trainer answers what, and when; halves and joined runs."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rayfed_lora.engines.local import LocalEngine
from rayfed_lora.engines.on_ray.actors import ClientActor, NotOpenError
from rayfed_lora.engines.on_ray.messages import packed, unpacked
from rayfed_lora.engines.threads import TrainerThreads
from rayfed_lora.errors import BlockMemoryError, ClientError
from rayfed_lora.federation.evaluation import joined, scores
from rayfed_lora.launching.simulation_server import SimulationServer
from rayfed_lora.tasks.engine import answer, runs
from rayfed_lora.tasks.messages import Evaluate, TestClients, Train
from rayfed_lora.types import AdapterState, Base, GlobalModel, LocalPlan
from tests.fakes import Behaviour as Fake
from tests.fakes import FakeTrainer

MODEL = GlobalModel(AdapterState({}, {}), Base(), "adapter")
PLAN = LocalPlan(0, "adapter", 0.1, 0.0, None, False)


class Watched:
    """Writes down what several trainers answer; rows that begin at one of `held` wait."""

    def __init__(self, *held: int) -> None:
        self.seen: list[int] = []
        self.threads: set[int] = set()
        self.held, self.go_on = held, threading.Event()

    def run(self, task: Any) -> Any:
        self.threads.add(threading.get_ident())
        first = task.shards[0].start
        if first in self.held:
            assert self.go_on.wait(10)
        self.seen.append(first)
        return (first,)


def evaluation(count: int) -> Evaluate:
    return Evaluate(MODEL, "test", tuple(slice(k, k + 1) for k in range(count)))


def opened(trainer: Any, count: int) -> LocalEngine:
    engine = LocalEngine(lambda: ([trainer] * count, None))  # type: ignore[arg-type, return-value]
    engine.open()
    return engine


def until(true: Any) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_one_trainer_answers_when_it_is_asked_in_the_callers_thread():
    trainer = Watched()
    running = opened(trainer, 1).submit(evaluation(3))
    assert trainer.seen == []
    assert running.result() == (0, 1, 2)
    assert trainer.threads == {threading.get_ident()}


def test_what_one_trainer_is_at_keeps_no_part_from_another_one():
    trainer = Watched(0)
    engine = opened(trainer, 2)
    running = engine.submit(evaluation(5))
    until(lambda: sorted(trainer.seen) == [1, 2, 3, 4])
    trainer.go_on.set()
    assert running.result() == (0, 1, 2, 3, 4)
    assert len(trainer.threads) == 2
    engine.close()


def test_once_an_engine_is_closed_no_more_parts_are_begun():
    trainer = Watched(*range(6))
    engine = opened(trainer, 2)
    engine.submit(evaluation(6))
    until(lambda: len(trainer.threads) == 2)
    engine.close()
    trainer.go_on.set()
    until(lambda: len(trainer.seen) >= 2)
    time.sleep(0.1)
    assert set(trainer.seen) == {0, 1}


def test_an_engine_that_is_not_open_says_so():
    engine = LocalEngine(lambda: ([], None))  # type: ignore[arg-type, return-value]
    with pytest.raises(RuntimeError, match="call open"):
        engine.submit(evaluation(1))


def training(*blocks: tuple[int, ...], **settings: Any) -> Train:
    return Train(MODEL, PLAN, "factor-average", blocks, **settings)


@pytest.mark.parametrize(("together", "halvings"), [(1, 0), (2, 0), (3, 0), (5, 0), (5, 1), (5, 3)])
def test_a_block_that_does_not_fit_is_answered_in_halves_and_that_is_said(together, halvings):
    trainer = FakeTrainer(Fake(together=together), "cpu")
    found = answer(trainer, training((4, 3, 2, 1, 0)), halvings)
    assert [report.client for report in found.reports] == [4, 3, 2, 1, 0]
    notes = [report.note for report in found.reports]
    # Who lost an actor over the block has been told already.
    halved = together < 5
    assert ("trained in halves" in str(notes[0])) == halved
    assert any(notes) == halved
    whole = answer(FakeTrainer(Fake(), "cpu"), training((4, 3, 2, 1, 0)))
    assert found.means.tensors().keys() == whole.means.tensors().keys()


def test_a_client_that_does_not_even_fit_alone_is_named():
    trainer = FakeTrainer(Fake(together=0), "cpu")
    with pytest.raises(ClientError, match="1 clients do not fit") as raised:
        answer(trainer, training((4, 3)))
    assert raised.value.client == 4


def test_what_has_no_halves_raises_what_the_trainer_raised():
    class Full:
        def run(self, task: Any) -> Any:
            raise BlockMemoryError("no room")

    with pytest.raises(BlockMemoryError, match="no room"):
        answer(Full(), evaluation(1))  # type: ignore[arg-type]


@pytest.mark.parametrize("fitting", [1, 2, 4])
def test_a_test_that_does_not_fit_is_answered_in_halves_to_the_same_scores(fitting: int) -> None:
    task = Evaluate(MODEL, "test", (slice(0, 5),))
    small = FakeTrainer(Fake(rows_together=fitting), "cpu")
    with pytest.raises(BlockMemoryError, match="5 rows do not fit"):
        small.run(task)
    found, whole = answer(small, task), answer(FakeTrainer(Fake(), "cpu"), task)
    assert len(found) > len(whole) == 1
    assert scores(found) == scores(whole)
    np.testing.assert_array_equal(joined(found).losses, whole[0].losses)


def test_clients_that_are_not_tested_together_are_tested_in_halves() -> None:
    task = TestClients(MODEL, ((0, 1, 2), (3, 4)), limits={4: 1})
    first, second = task.halves(None)
    assert (first.blocks, second.blocks) == (((0, 1, 2),), ((3, 4),))
    assert (first.limits, second.limits) == ({}, {4: 1})
    assert [half.blocks for half in first.halves(None)] == [((0,),), ((1, 2),)]
    small = FakeTrainer(Fake(together=1), "cpu")
    assert answer(small, task) == answer(FakeTrainer(Fake(), "cpu"), task)


def test_one_row_and_one_client_have_no_halves() -> None:
    assert Evaluate(MODEL, "test", (slice(3, 4),)).halves(None) == ()
    assert TestClients(MODEL, ((3,),)).halves(None) == ()


def test_parts_are_blocks_with_what_sets_their_clients_apart():
    own = {1: {}, 2: {}, 9: {}}
    task = training((0, 1), (2,), limits={0: 3, 2: 1}, personal=own)
    first, second = task.parts()
    assert (first.blocks, first.limits, first.personal) == (((0, 1),), {0: 3}, {1: {}})
    assert (second.blocks, second.limits, second.personal) == (((2,),), {2: 1}, {2: {}})
    assert [part.name for part in (task, first, second)] == [
        "round 1",
        "round 1 block 0",
        "round 1 block 1",
    ]
    assert [part.size for part in (task, first, second)] == [3, 2, 1]


def test_very_many_blocks_are_trained_in_1024_parts():
    task = training(*((k,) for k in range(3000)))
    parts = task.parts()
    assert len(parts) == 1024
    assert [k for part in parts for k in part.clients] == [*range(3000)]
    assert len(runs(task)) == 32
    assert len(runs(evaluation(3000))) == 3000


def test_a_round_without_clients_has_no_parts():
    assert training().parts() == []


@pytest.mark.parametrize("kind", [ClientActor, SimulationServer])
def test_an_actor_that_could_not_be_made_says_who_it_is(kind: type) -> None:
    # Ray asks for it when it tells why; if that raised, it would start the actor again for ever.
    assert isinstance(repr(object.__new__(kind)), str)


def actor_of(*trainers: Any) -> ClientActor:
    actor = ClientActor(0.0, "client-actor-00", len(trainers))
    actor._threads = TrainerThreads(trainers)
    return actor


def test_an_actor_answers_with_the_seconds_and_keeps_a_result_apart_where_it_is_to():
    state = AdapterState({}, {"w": 0})  # type: ignore[dict-item]

    class Telling:
        def run(self, task: Any) -> Any:
            time.sleep(0.01)
            return task.model.state.dense, task.model.base.root

    actor = actor_of(Telling())
    sent = (packed(part) for part in (evaluation(1), state, Base(7)))
    seconds, value = unpacked(actor.run(*sent, apart=False))
    assert value == ({"w": 0}, 7) and 0.01 <= seconds < 5


def test_an_actor_tells_reports_at_once_and_keeps_means_apart_where_they_are_joined():
    actor = actor_of(FakeTrainer(Fake(), "cpu"))
    model = replace(MODEL, state=AdapterState({}, {"w": np.zeros(2, np.float32)}))
    task = training((3,), (1,)).on(MODEL)
    sent = [packed(part) for part in (task, model.state, Base())]
    (_, told), kept = map(unpacked, actor.run(*sent, apart=True))
    assert [report.client for report in told.reports] == [3, 1] and kept.reports == ()
    # Client k has k + 1 examples and moves by k: (4 * 3 + 2 * 1) / 6.
    np.testing.assert_allclose(kept.means.tensors()["w"], [14 / 6] * 2)
    assert not told.means.tensors()
    whole = unpacked(actor.join(sent[0], packed(told), packed(kept)))
    assert [report.client for report in whole.reports] == [3, 1]
    np.testing.assert_allclose(whole.means.tensors()["w"], [14 / 6] * 2)


def test_an_actor_that_was_restarted_while_idle_says_so():
    actor = ClientActor(0.0, "client-actor-00")
    with pytest.raises(NotOpenError, match="was restarted while it was idle"):
        actor.run(evaluation(1), MODEL.state, Base(), apart=False)
    with pytest.raises(NotOpenError, match="was restarted while it was idle"):
        actor.join(training((0,)))


def test_of_joined_parts_each_tells_its_reports_when_it_is_done():
    engine = opened(FakeTrainer(Fake(), "cpu"), 1)
    state = AdapterState({}, {"w": np.zeros(2, np.float32)})
    running = engine.submit(training(*((k,) for k in range(70))).on(replace(MODEL, state=state)))
    first = running.pending.popleft().result()
    assert [report.client for report in first.reports] == [0]
    assert not first.means.tensors()


def test_an_actor_of_two_trainers_answers_two_calls_at_once():
    meeting = threading.Barrier(2, timeout=10)

    class Meeting:
        def run(self, task: Any) -> Any:
            meeting.wait()
            return ()

    actor = actor_of(Meeting(), Meeting())
    sent = [packed(part) for part in (evaluation(1), MODEL.state, Base())]
    calls = [threading.Thread(target=actor.run, args=(*sent, False)) for _ in range(2)]
    for call in calls:
        call.start()
    for call in calls:
        call.join(10)
    assert not meeting.broken and not any(call.is_alive() for call in calls)

"""Where a run stands, as a watcher sees it."""

from __future__ import annotations

import threading

import pytest

from rayfed_lora.federation.records import RoundRecord
from rayfed_lora.runs import status as status_module
from rayfed_lora.runs.status import Status, StatusBoard
from rayfed_lora.types import RoundPlan


def record(t: int) -> RoundRecord:
    return RoundRecord(
        round=t,
        stage="heating",
        rank=2.0,
        ranks={"q": 2},
        trainable_params=20,
        proximal_weight=0.0,
        clients=3,
        failed_clients=0,
        train_loss=1.0,
        evaluation={},
        validation_accuracy=None,
        validation_loss=None,
        aggregation_error=None,
        params_up=10,
        params_down=20,
        bytes_up=40,
        bytes_down=80,
        bytes_base=1000,
        learning_rate=0.1,
        proposal=None,
        seconds=0.5,
    )


def play(board: StatusBoard, t: int) -> None:
    board.round_started(RoundPlan(t, "heating", "adapter", 2, 0.0), (0, 2, 5))
    for _ in range(3):
        board.clients_done(1)
    board.round_done(record(t))


def test_a_new_board_is_starting():
    assert StatusBoard(6).status() == Status(phase="starting", rounds=6)


def test_rounds_clients_and_bytes_are_counted():
    board = StatusBoard(6)
    play(board, 0)
    board.round_started(RoundPlan(1, "cooling", "adapter", 1, 0.0), (1, 4))
    board.clients_done(2)
    status = board.status()
    assert (status.phase, status.stage, status.rank) == ("training", "cooling", 1)
    assert (status.rounds_done, status.rounds) == (1, 6)
    assert (status.clients_done, status.clients, status.updates) == (2, 2, 5)
    assert status.bytes_total == 40 + 80  # the base is not counted
    assert status.records == (record(0),)


def test_rounds_of_earlier_sessions_are_done_but_not_counted_for_the_speed():
    board = StatusBoard(10)
    board.resumed(4)
    play(board, 4)
    status = board.status()
    assert (status.rounds_done, status.rounds_before) == (5, 4)
    assert status.training_since is not None
    # One round took 2 s, five are left.
    assert status.eta_s(status.training_since + 2.0) == pytest.approx(10.0)
    assert status.clients_per_s(status.training_since + 2.0) == pytest.approx(1.5)


def test_before_the_first_round_there_is_no_speed_and_no_time_left():
    board = StatusBoard(10)
    board.resumed(4)
    assert board.status().eta_s(123.0) is None
    assert board.status().clients_per_s(123.0) == 0.0
    board.round_started(RoundPlan(4, "heating", "adapter", 2, 0.0), (0,))
    status = board.status()
    assert status.training_since is not None
    assert status.eta_s(status.training_since + 1.0) is None
    assert status.clients_per_s(status.training_since) == 0.0


def test_a_watcher_is_given_only_the_records_and_notes_it_has_not_seen():
    board = StatusBoard(6)
    board.note("first")
    play(board, 0)
    play(board, 1)
    board.note("second")
    news = board.status(records_seen=1, notes_seen=1)
    assert [r.round for r in news.records] == [1]
    assert news.notes == ("second",)
    assert board.status(2, 2).records == ()
    assert board.status().notes == ("first", "second")


def test_a_watcher_who_comes_late_is_given_the_newest_records_once(monkeypatch):
    monkeypatch.setattr(status_module, "_NEWEST", 3)
    board = StatusBoard(10)
    for t in range(5):
        play(board, t)
    late = board.status()
    assert [r.round for r in late.records] == [2, 3, 4]
    play(board, 5)
    assert [r.round for r in board.status(late.rounds_done).records] == [5]


def test_every_change_is_told_once_with_its_own_record_or_note_only():
    told: list[Status] = []
    board = StatusBoard(6, told.append)
    board.note("careful")
    play(board, 0)
    board.phase("exporting")
    # A note, a round's start, three clients, a round's end, a phase.
    assert len(told) == 1 + 1 + 3 + 1 + 1
    assert [s.notes for s in told] == [("careful",), *[()] * 6]
    assert [[r.round for r in s.records] for s in told] == [[], [], [], [], [], [0], []]
    assert [s.clients_done for s in told] == [0, 0, 1, 2, 3, 3, 3]
    assert [s.phase for s in told] == ["starting", *["training"] * 5, "exporting"]


def test_a_status_read_from_another_thread_is_never_half_of_a_change():
    board = StatusBoard(300)
    seen: list[Status] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(board.status())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for t in range(300):
        play(board, t)
    done.set()
    watcher.join()
    seen.append(board.status())
    assert all(len(s.records) == s.rounds_done for s in seen)
    assert all(s.bytes_total == 120 * s.rounds_done for s in seen)
    assert seen[-1].rounds_done == 300

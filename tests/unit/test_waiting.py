"""Who may pass whom."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from rayfed_lora.engines.waiting import LAST, put


@dataclass
class Job:
    name: str
    round: int = LAST
    before: int = 0


def names(waiting: deque[Job]) -> str:
    return " ".join(job.name for job in waiting)


def test_rounds_are_trained_before_earlier_tests_up_to_the_one_that_may_not() -> None:
    waiting: deque[Job] = deque()
    assert put(waiting, [Job("a", 1), Job("b", 1)]) == 0
    put(waiting, [Job("test-0", before=4), Job("more-0", before=4)])
    assert put(waiting, [Job("c", 2), Job("d", 2)]) == 2
    put(waiting, [Job("test-1", before=5)])
    put(waiting, [Job("e", 3)])
    assert names(waiting) == "a b c d e test-0 more-0 test-1"
    # The fourth round passes the tests of the second, and not those of the first.
    put(waiting, [Job("f", 4)])
    assert names(waiting) == "a b c d e test-0 more-0 f test-1"


def test_what_is_never_passed_and_what_trains_no_round_keep_their_order() -> None:
    waiting = deque([Job("export"), Job("test", before=9)])
    put(waiting, [Job("tensors")])
    assert names(waiting) == "export test tensors"
    put(waiting, [Job("a", 1)])
    assert names(waiting) == "export test tensors a"


def test_what_is_begun_is_not_passed() -> None:
    waiting = deque([Job("begun", before=9), Job("test", before=9)])
    assert put(waiting, [Job("a", 1)], begun=1) == 1
    assert names(waiting) == "begun a test"


def test_nothing_passes_nobody() -> None:
    waiting = deque([Job("test", before=9)])
    assert put(waiting, []) == 1
    assert names(waiting) == "test"

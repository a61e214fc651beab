"""What runs inside Ray's workers, without Ray."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rayfed_lora.runtime.actors import CALLS_AT_ONCE, ClientActor
from rayfed_lora.types import AdapterState, Base


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
    actor, trainer = ClientActor(0.0, "client-actor-00"), Watched()
    actor._trainer = trainer  # type: ignore[assignment]

    def evaluate(row: int) -> slice:
        rows = slice(row, row + 1)
        return actor.evaluate("test", rows, AdapterState({}, {}), Base(), "adapter").value

    with ThreadPoolExecutor(CALLS_AT_ONCE) as callers:
        found = list(callers.map(evaluate, range(6)))
        own = {callers.submit(threading.get_ident).result() for _ in range(20)}
    assert found == [slice(row, row + 1) for row in range(6)]
    assert sorted(trainer.rows, key=lambda rows: rows.start) == found
    assert trainer.most_at_once == 1
    assert len(set(trainer.threads)) == 1
    assert not own & set(trainer.threads)

"""Which rounds of a long plan are worth a row. Source: this project."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rayfed_lora.launching.planning import PlannedRound

MOST_ROWS = 60
# Rounds that are shown at each end of a stage.
_AT_AN_END = 3


def shown_rounds(rounds: Sequence[PlannedRound], most: int = MOST_ROWS) -> list[int | range]:
    """Return the rounds to show: an index is a row, a range stands for rounds that are left out.

    All of them up to `most`. Of more, the first and last rounds of each stage, and as many of the
    rounds in which the rank changes as there is room for, evenly spaced.

    Args:
        rounds: every round, in order.
        most: number of rows, without those of left-out rounds; at least 24.
    """
    count = len(rounds)
    if count <= most:
        return list(range(count))
    stages = [i for i in range(1, count) if rounds[i].stage != rounds[i - 1].stage]
    kept: set[int] = set()
    for start, end in zip([0, *stages], [*stages, count], strict=True):
        kept.update(range(start, min(start + _AT_AN_END, end)))
        kept.update(range(max(end - _AT_AN_END, start), end))
    changes = [i for i in range(1, count) if rounds[i].rank != rounds[i - 1].rank and i not in kept]
    room = most - len(kept)
    if len(changes) > room:
        places = np.linspace(0, len(changes) - 1, room).astype(int)
        changes = [changes[i] for i in places.tolist()]
    rows: list[int | range] = []
    following = 0
    for i in sorted({*kept, *changes}):
        if i - following == 1:
            rows.append(following)  # a row says more than a row that says that one is left out
        elif i > following:
            rows.append(range(following, i))
        rows.append(i)
        following = i + 1
    return rows

"""Who comes next: what trains a round may pass what tests an earlier one, but not for ever.

Source: this project.
"""

from __future__ import annotations

import sys
from collections.abc import MutableSequence, Sequence
from typing import Protocol, TypeVar

# As a `round`: passes nobody.
LAST = sys.maxsize


class Waits(Protocol):
    """What waits for its turn."""

    @property
    def round(self) -> int:
        """The round that it trains; what trains none has `LAST`."""
        ...

    @property
    def before(self) -> int:
        """The first round that may not be trained before it; 0: it is never passed."""
        ...


_T = TypeVar("_T", bound=Waits)


def put(waiting: MutableSequence[_T], new: Sequence[_T], begun: int = 0) -> int:
    """Put what comes behind what waits, but before those at the end that it may pass.

    Args:
        waiting: in order; changed in place.
        new: in order, all of one round.
        begun: how many of the first do not wait any more.

    Returns:
        The place of the first of the new ones.
    """
    latest = max((each.round for each in new), default=LAST)
    place = len(waiting)
    while place > begun and waiting[place - 1].before > latest:
        place -= 1
    for offset, each in enumerate(new):
        waiting.insert(place + offset, each)
    return place

"""What the workers of a run have done. Source: this project."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Usage:
    """What the client actors of a run have done since they were opened.

    Attributes:
        actors: how many there are.
        busy_s: seconds in which they trained or tested, summed.
        losses: how often one of them was lost.
        retried_clients: clients whose training was begun again because of that.
        at_once: how many calls each does at the same time.
    """

    actors: int
    busy_s: float
    losses: int
    retried_clients: int
    at_once: int = 1

"""Trackers: observers of finished rounds, beside tables and status. Source: this project."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Literal, Protocol

import pyarrow as pa

from rayfed_lora.errors import BadInputError
from rayfed_lora.federation.records import ClientRecord, RoundRecord
from rayfed_lora.recipe.recipe import Recipe

Outcome = Literal["done", "stopped", "failed"]


class Tracker(Protocol):
    """Receives the finished rounds of a run."""

    def resumed(self, rounds: pa.Table) -> None:
        """Take the rows of rounds.parquet of earlier processes of the run; called first, once."""
        ...

    def round_done(
        self, record: RoundRecord, clients: Sequence[ClientRecord], aggregation_s: float
    ) -> None:
        """Take a finished round.

        Args:
            record: of the round.
            clients: one record for each client of its cohort.
            aggregation_s: seconds of the server's aggregation.
        """
        ...

    def close(self, outcome: Outcome) -> None:
        """End the records of this process."""
        ...


class Tracking:
    """The trackers of a run. A tracker that fails is dropped with a note, and the run continues."""

    def __init__(self, trackers: Sequence[Tracker], note: Callable[[str], None]) -> None:
        """Keep the trackers; `note` is called with a line about each failure."""
        self._trackers = list(trackers)
        self._note = note

    def add(self, tracker: Tracker) -> None:
        """Add a tracker."""
        self._trackers.append(tracker)

    def resumed(self, rounds: pa.Table) -> None:
        """Call `resumed` of all trackers."""
        self._for_each(lambda tracker: tracker.resumed(rounds))

    def round_done(
        self, record: RoundRecord, clients: Sequence[ClientRecord], aggregation_s: float
    ) -> None:
        """Call `round_done` of all trackers."""
        self._for_each(lambda tracker: tracker.round_done(record, clients, aggregation_s))

    def close(self, outcome: Outcome) -> None:
        """Call `close` of all trackers, and drop them."""
        self._for_each(lambda tracker: tracker.close(outcome))
        self._trackers = []

    def _for_each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self._trackers):
            try:
                call(tracker)
            except Exception as error:  # a failure of a tracker must not end the run
                self._trackers.remove(tracker)
                self._note(f"{type(tracker).__name__} failed and gets no more rounds: {error}")


def check_tracking(recipe: Recipe) -> None:
    """Check that the packages of the trackers that a recipe asks for are installed.

    Raises:
        BadInputError: one is not.
    """
    wanted = [name for name, value in recipe.tracking.model_dump().items() if value]
    missing = [
        f"tracking.{name}: expected the Python package {name} to be installed, it is not;"
        f" pip install 'rayfed-lora[{name}]'"
        for name in wanted
        if find_spec(name) is None
    ]
    if missing:
        raise BadInputError("\n".join(missing))

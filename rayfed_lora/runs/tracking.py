"""Who is told of finished rounds, beside tables and status. Source: this project."""

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
    """Is told of finished rounds."""

    def resumed(self, rounds: pa.Table) -> None:
        """Note the rows of rounds.parquet that earlier sittings wrote; called first, once."""
        ...

    def round_done(
        self, record: RoundRecord, clients: Sequence[ClientRecord], aggregation_s: float
    ) -> None:
        """Note a finished round.

        Args:
            record: its row.
            clients: the rows of its clients.
            aggregation_s: how long the server took to turn updates into the next state.
        """
        ...

    def close(self, outcome: Outcome) -> None:
        """Note that this sitting ends."""
        ...


class Tracking:
    """The trackers of a run. One that fails is let go, with a note: the run goes on."""

    def __init__(self, trackers: Sequence[Tracker], note: Callable[[str], None]) -> None:
        """Keep the trackers; `note` is told of failures."""
        self._trackers = list(trackers)
        self._note = note

    def add(self, tracker: Tracker) -> None:
        """Tell another one too."""
        self._trackers.append(tracker)

    def resumed(self, rounds: pa.Table) -> None:
        """Tell all of the rounds of earlier sittings."""
        self._tell(lambda tracker: tracker.resumed(rounds))

    def round_done(
        self, record: RoundRecord, clients: Sequence[ClientRecord], aggregation_s: float
    ) -> None:
        """Tell all of a finished round."""
        self._tell(lambda tracker: tracker.round_done(record, clients, aggregation_s))

    def close(self, outcome: Outcome) -> None:
        """Tell all that the sitting ends."""
        self._tell(lambda tracker: tracker.close(outcome))
        self._trackers = []

    def _tell(self, news: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self._trackers):
            try:
                news(tracker)
            except Exception as error:  # whatever it is, it must not cost the run
                self._trackers.remove(tracker)
                self._note(f"{type(tracker).__name__} is told no more of this run: {error}")


def check_tracking(recipe: Recipe) -> None:
    """Check that what `tracking` names is installed.

    Raises:
        BadInputError: it is not.
    """
    asked = recipe.tracking
    missing = [
        f"tracking.{name}: expected the Python package {name} to be installed, it is not;"
        f" pip install 'rayfed-lora[{name}]'"
        for name, wanted in (
            ("tensorboard", asked.tensorboard),
            ("wandb", asked.wandb is not None),
            ("mlflow", asked.mlflow is not None),
        )
        if wanted and find_spec(name) is None
    ]
    if missing:
        raise BadInputError("\n".join(missing))

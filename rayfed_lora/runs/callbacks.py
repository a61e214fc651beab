"""Callables of the user that see each finished round, and may end the run. Source: this project."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rayfed_lora.errors import RunError
from rayfed_lora.federation.bills import Bill
from rayfed_lora.federation.records import ClientRecord, Round, RoundRecord, client_records
from rayfed_lora.types import GlobalModel


@dataclass(frozen=True)
class FinishedRound:
    """A finished round, as callbacks see it.

    Attributes:
        record: its row of rounds.parquet; `record.evaluation` has the metrics on the test split.
        clients: a row for each client of the cohort.
        bill: what was sent, in values.
        model: the new global model: factors and head, or every weight, as float32 arrays.
    """

    record: RoundRecord
    clients: Sequence[ClientRecord]
    bill: Bill
    model: GlobalModel


# A true value ends the run after a tested round: it then exports as usual.
Callback = Callable[[FinishedRound], Any]


class Callbacks:
    """Calls the callbacks of a run."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        """Keep the callbacks; none is called yet."""
        self._callbacks = tuple(callbacks)
        # The first that wants the run to end; kept in checkpoints as `Selection.asked_by`.
        self.asked_by: str | None = None

    def __bool__(self) -> bool:
        """Return whether there is anything to call, or an end to wait for."""
        return bool(self._callbacks) or self.asked_by is not None

    def called(self, finished: Round, model: GlobalModel) -> str | None:
        """Call each with a finished round; return which of them ends the run with it, if any.

        Raises:
            RunError: a callback raised; names it and the round.
        """
        record = RoundRecord.of(finished)
        told = FinishedRound(record, client_records(finished), finished.bill, model)
        for callback in self._callbacks:
            name = getattr(callback, "__name__", type(callback).__name__)
            try:
                ends = bool(callback(told))
            except Exception as error:
                raise RunError(
                    f"callback {name!r} failed after round {record.round + 1}:"
                    f"\n{traceback.format_exc()}"
                ) from error
            if ends and self.asked_by is None:
                self.asked_by = name
        return None if record.accuracy is None else self.asked_by

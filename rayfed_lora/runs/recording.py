"""What is kept and told of a run while it goes on. Source: this project."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rayfed_lora.data.prompts import PromptFacts
from rayfed_lora.federation.records import (
    Round,
    RoundRecord,
    answer_records,
    client_records,
    client_tests,
)
from rayfed_lora.printable import client_label
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.runs.tables import Tables
from rayfed_lora.runs.trackers import Tracking
from rayfed_lora.types import ClientReport, RoundPlan


@dataclass
class RunRecorder:
    """Keeps the rows of a run's tables and tells board and trackers; the round loop's recorder.

    `client_names`, (clients,), are what the data call the clients, if anything; `running` is the
    round that is running, to which new notes belong. With `keeps` the last round is kept until
    `taken` returns it. `prompts` are what is known of those that are asked, if any.
    """

    tables: Tables
    board: StatusBoard
    tracking: Tracking
    client_names: Sequence[str] | None
    running: int = 0
    keeps: bool = False
    prompts: PromptFacts | None = None
    _notes_seen: int = 0
    _last: Round | None = None

    def round_started(self, plan: RoundPlan, cohort: tuple[int, ...]) -> None:
        """Note that a round begins."""
        self._keep_notes()
        self.running = plan.round
        self.board.round_started(plan, cohort)

    def clients_done(self, reports: Sequence[ClientReport]) -> None:
        """Note that clients' updates were taken in."""
        for report in reports:
            if report.error is not None:
                name = client_label(report.client, self.client_names)
                self.board.note(f"{name} failed: {report.error}")
            if report.note is not None:
                self.board.note(report.note)
        self.board.clients_done(len(reports))

    def round_done(self, finished: Round) -> None:
        """Note a finished round."""
        self._last = finished if self.keeps else None
        record, clients = RoundRecord.of(finished), client_records(finished)
        self.tables.add_tests(client_tests(finished))
        if self.prompts is not None:
            answers = finished.tested.answers
            self.tables.add_answers(answer_records(record.round, answers, self.prompts))
        self.tables.add(record, clients)
        self._keep_notes()
        self.board.round_done(record)
        self.tracking.round_done(record, clients, finished.aggregated.seconds)

    def taken(self) -> Round:
        """Return the last round, and let it go."""
        finished, self._last = self._last, None
        if finished is None:
            raise RuntimeError("no round is kept: RunRecorder(keeps=True) keeps the last one")
        return finished

    def _keep_notes(self) -> None:
        notes = self.board.status(notes_seen=self._notes_seen).notes
        self.tables.add_notes(self.running, notes)
        self._notes_seen += len(notes)

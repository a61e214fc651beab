"""What is kept and told of a run while it goes on. Source: this project."""

from __future__ import annotations

from collections.abc import Sequence

from rayfed_lora.federation.records import Round, RoundRecord, client_records, client_tests
from rayfed_lora.printable import client_label
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.runs.tables import Tables
from rayfed_lora.runs.tracking import Tracking
from rayfed_lora.types import ClientReport, RoundPlan


class RunRecorder:
    """Keeps the rows of a run's tables and tells board and trackers; the round loop's recorder."""

    def __init__(
        self,
        tables: Tables,
        board: StatusBoard,
        tracking: Tracking,
        client_names: Sequence[str] | None,
    ) -> None:
        """Record nothing yet.

        Args:
            tables: get the rows.
            board: told of every step.
            tracking: told of finished rounds.
            client_names: (clients,) what the data call each client; None where they do not.
        """
        self._tables = tables
        self._board = board
        self._tracking = tracking
        self._client_names = client_names
        # The round that is running, and how many notes stand in the tables.
        self._running, self._notes_seen = 0, 0

    def resumed(self, rounds: int) -> None:
        """Go on after some finished rounds."""
        self._running = rounds

    def round_started(self, plan: RoundPlan, cohort: tuple[int, ...]) -> None:
        """Note that a round begins."""
        self._keep_notes()
        self._running = plan.round
        self._board.round_started(plan, cohort)

    def clients_done(self, reports: Sequence[ClientReport]) -> None:
        """Note that clients' updates were taken in."""
        for report in reports:
            if report.error is not None:
                name = client_label(report.client, self._client_names)
                self._board.note(f"{name} failed: {report.error}")
            if report.note is not None:
                self._board.note(report.note)
        self._board.clients_done(len(reports))

    def round_done(self, finished: Round) -> None:
        """Note a finished round."""
        record, clients = RoundRecord.of(finished), client_records(finished)
        tests = client_tests(finished)
        if tests:
            self._tables.add_tests(tests)
        self._tables.add(record, clients)
        self._keep_notes()
        self._board.round_done(record, clients)
        self._tracking.round_done(record, clients, finished.aggregated.seconds)

    def _keep_notes(self) -> None:
        notes = self._board.status(notes_seen=self._notes_seen).notes
        self._tables.add_notes(self._running, notes)
        self._notes_seen += len(notes)

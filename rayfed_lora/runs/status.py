"""The progress of a run: written by the round loop, read by observers. Source: this project."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

from rayfed_lora.federation.records import RoundRecord
from rayfed_lora.types import RoundPlan, Stage

# Most records in memory; all of them are in rounds.parquet.
_NEWEST = 1000


@dataclass(frozen=True)
class Status:
    """A moment of a run.

    Attributes:
        phase: `starting`, `training`, `exporting` or `done`; of a detached run also `failed` and
            `stopped`, for which the newest note gives the reason.
        step: of the phase `starting`, in a few words; "" where it is not known.
        rounds_done, rounds: finished and all rounds.
        running: number of the running round, from 1.
        stage, rank: of the running round; None as rank of a full-model round.
        clients_done, clients: collected updates, and cohort size, of the running round.
        updates: client updates since the start of this process.
        training_since: `time.time()` of the first round of this process, None before it.
        rounds_before: rounds finished by earlier processes of the run.
        bytes_total: bytes up and down in this process.
        loss, accuracy: newest training loss and test accuracy, None before the first.
        records: newest finished rounds of this process; `StatusBoard.status` returns those not
            seen yet.
        notes: warnings for the user; likewise.
        board: unique to the status board: another board counts records and notes anew.
    """

    phase: str = "starting"
    step: str = ""
    rounds_done: int = 0
    rounds: int = 0
    running: int = 0
    stage: Stage | None = None
    rank: int | None = 0
    clients_done: int = 0
    clients: int = 0
    updates: int = 0
    training_since: float | None = None
    rounds_before: int = 0
    bytes_total: int = 0
    loss: float | None = None
    accuracy: float | None = None
    records: tuple[RoundRecord, ...] = ()
    notes: tuple[str, ...] = ()
    board: str = field(default="", compare=False)

    @property
    def over(self) -> bool:
        """Whether the run has ended, with any outcome."""
        return self.phase in ("done", "failed", "stopped")

    def clients_per_s(self, now: float) -> float:
        """Return client updates per second in this process, 0 before the first."""
        spent = 0.0 if self.training_since is None else now - self.training_since
        return self.updates / spent if spent > 0 else 0.0

    @property
    def rounds_trained(self) -> float:
        """Rounds finished so far, and the trained share of the running round."""
        if self.running == 0:
            return self.rounds_done
        return self.running - 1 + self.clients_done / max(self.clients, 1)

    def eta_s(self, now: float) -> float | None:
        """Return the remaining seconds by the mean round so far; None before the first round."""
        trained = self.rounds_trained - self.rounds_before
        if trained < 1 or self.training_since is None:
            return None
        return (now - self.training_since) / trained * (self.rounds - self.rounds_trained)


class StatusBoard:
    """An observer of the round loop that keeps the status; other threads may read it."""

    def __init__(self, rounds: int, on_change: Callable[[Status], None] | None = None) -> None:
        """Start in the phase `starting`.

        `on_change` is called after each change with the status and the new record or note, if any.
        """
        # Notes are kept apart: each change copies the status.
        self._status = Status(rounds=rounds, board=uuid4().hex)
        self._notes: list[str] = []
        self._lock = threading.Lock()
        self._on_change = on_change

    def status(self, records_seen: int = 0, notes_seen: int = 0) -> Status:
        """Return the status, with records of this process and notes after the first `..._seen`."""
        with self._lock:
            now, notes = self._status, tuple(self._notes[notes_seen:])
        new = max(now.rounds_done - now.rounds_before - records_seen, 0)
        records = now.records[max(len(now.records) - new, 0) :]
        return replace(now, records=records, notes=notes)

    def note(self, text: str) -> None:
        """Add a warning for the user, one line."""
        with self._lock:
            self._notes.append(text)
        self._change(note=text)

    def phase(self, phase: str) -> None:
        """Set the phase."""
        self._change(phase=phase)

    def step(self, step: str) -> None:
        """Set the step of the phase `starting`."""
        self._change(step=step)

    def resumed(self, rounds_done: int) -> None:
        """Set the rounds that earlier processes finished."""
        self._change(rounds_done=rounds_done, rounds_before=rounds_done)

    def round_started(self, plan: RoundPlan, cohort: tuple[int, ...]) -> None:
        """Set the running round."""
        since = self._status.training_since
        self._change(
            phase="training",
            running=plan.round + 1,
            stage=plan.stage,
            rank=None if plan.trainable == "full" else plan.rank,
            clients_done=0,
            clients=len(cohort),
            training_since=time.time() if since is None else since,
        )

    def clients_done(self, count: int) -> None:
        """Count the collected updates of clients."""
        now = self._status
        self._change(clients_done=now.clients_done + count, updates=now.updates + count)

    def round_done(self, record: RoundRecord) -> None:
        """Add a finished round."""
        now = self._status
        self._change(
            record,
            rounds_done=record.round + 1,
            bytes_total=now.bytes_total + record.bytes_up + record.bytes_down,
            loss=record.train_loss,
            accuracy=now.accuracy if record.accuracy is None else record.accuracy,
            records=(*now.records, record)[-_NEWEST:],
        )

    def _change(
        self, record: RoundRecord | None = None, note: str | None = None, **fields: Any
    ) -> None:
        """Set fields of the status, and call `on_change` with what is new."""
        with self._lock:
            self._status = status = replace(self._status, **fields)
        if self._on_change is not None:
            records = () if record is None else (record,)
            self._on_change(replace(status, records=records, notes=() if note is None else (note,)))


def headline(status: Status) -> str:
    """Return a few words on what a run is doing."""
    if status.phase == "starting" and status.step:
        return status.step
    if status.phase != "training":
        return status.phase
    rank = "full model" if status.rank is None else f"rank {status.rank}"
    return f"round {status.running}/{status.rounds} {status.stage} {rank}"

"""Ray jobs that run recipes: what they tell of themselves, and how it is shown.

Source: this project.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayfed_lora.runs.status import Status, headline
from rayfed_lora.types import Stage
from rayfed_lora.units import duration

State = Literal["pending", "running", "stopped", "succeeded", "failed", "unknown"]
ENDED: tuple[State, ...] = ("stopped", "succeeded", "failed")


class JobProgress(BaseModel):
    """Where a run stood when its job told of it last.

    Attributes:
        phase: as in `Status`.
        rounds_done, rounds: finished and all rounds.
        running: number of the round that was running, from 1.
        stage, rank: of the round that was running; no rank in a full-model round.
        loss, accuracy: newest training loss and test accuracy, None before there is one.
        eta_s: seconds that were left, None before the first round.
        told_at: `time.time()`.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    phase: str
    rounds_done: int
    rounds: int
    running: int = 0
    stage: Stage | None = None
    rank: int | None = None
    loss: float | None = None
    accuracy: float | None = None
    eta_s: float | None = None
    told_at: float

    @classmethod
    def of(cls, status: Status, now: float) -> JobProgress:
        """Return what a status says, in short."""
        return cls(
            phase=status.phase,
            rounds_done=status.rounds_done,
            rounds=status.rounds,
            running=status.running,
            stage=status.stage,
            rank=status.rank,
            loss=status.loss,
            accuracy=status.accuracy,
            eta_s=status.eta_s(now),
            told_at=now,
        )

    @classmethod
    def read(cls, text: str | None) -> JobProgress | None:
        """Return what `model_dump_json` gave, None where it is nothing of the kind."""
        try:
            return None if text is None else cls.model_validate_json(text)
        except ValidationError:
            return None

    def line(self, ended: bool = False) -> str:
        """Return one line for people.

        Args:
            ended: the job does nothing any more: tell of the finished rounds only.
        """
        status = Status(
            phase=self.phase,
            rounds_done=self.rounds_done,
            rounds=self.rounds,
            running=self.running,
            stage=self.stage,
            rank=self.rank,
        )
        parts = [f"{self.rounds_done} of {self.rounds} rounds done" if ended else headline(status)]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        if self.accuracy is not None:
            parts.append(f"accuracy {self.accuracy:.3f}")
        if self.phase == "training" and not ended:
            parts.append(f"ETA {duration(self.eta_s)}")
        return ", ".join(parts)


@dataclass(frozen=True)
class JobView:
    """A job of the cluster that runs a recipe.

    Attributes:
        id: Ray's submission id.
        recipe: name of the recipe, "" before the job has told of it.
        state: Ray's own, in small letters.
        location: run folder as the cluster's nodes see it, None where it is not known.
        progress: what the job told of itself last.
        started_at: `time.time()` of its start, None where it is not known.
        exit_status: of its command, None before its end.
        message: why it failed, "" where it has not.
        recipe_yaml: the resolved recipe, None where it is not known.
    """

    id: str
    recipe: str
    state: State
    location: str | None = None
    progress: JobProgress | None = None
    started_at: float | None = None
    exit_status: int | None = None
    message: str = ""
    recipe_yaml: str | None = None

    @property
    def ended(self) -> bool:
        """Whether it does nothing any more."""
        return self.state in ENDED

    @property
    def run_finished(self) -> bool:
        """Whether its run is known to have finished, whatever became of its command."""
        finished = self.progress is not None and self.progress.phase == "done"
        return finished or self.state == "succeeded"

    @property
    def standing(self) -> str:
        """Where its run stands, in one line."""
        if self.progress is None:
            return "-" if self.ended else "starting"
        return self.progress.line(self.ended)


def exit_status(job: JobView) -> int:
    """Return the exit status of a job that has ended, as if its command had been run here."""
    if job.state == "succeeded":
        return 0
    if job.state == "stopped":
        return 130
    return 1 if job.exit_status in (None, 0) else job.exit_status


def show_submitted(console: Console, job: str, location: str, notes: Sequence[str]) -> None:
    """Print a job's id, its run folder, and what the user should know of it."""
    for note in notes:
        said = f"note: {note}"
        console.print(said, style="yellow", highlight=False, markup=False, soft_wrap=True)
    for line in (f"job: {job}", f"run folder: {location}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def show_stopped(console: Console, job: JobView) -> None:
    """Print how a job ended that was told to stop, and how to go on with it."""
    if job.run_finished:
        text = f"job {job.id} had finished; run folder: {job.location}"
    elif job.progress is None:
        text = (
            f"job {job.id} {job.state}; it had not told how far its run was; run folder:"
            f" {job.location or 'not known'}"
        )
    elif job.progress.rounds_done == 0:
        text = f"job {job.id} {job.state} before its first round was done"
    else:
        text = (
            f"job {job.id} {job.state}: {job.standing}; its checkpoint is kept in {job.location};"
            f" rayfed-lora resume {job.id} goes on"
        )
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def show_job(console: Console, job: JobView, now: float) -> None:
    """Print one job: where its run stands, where its folder is, and why it failed."""
    age = "" if job.progress is None or job.ended else f" ({now - job.progress.told_at:.0f} s ago)"
    lines = [
        ("job", job.id),
        ("recipe", job.recipe or "-"),
        ("state", job.state),
        ("progress", job.standing + age),
        ("run folder", job.location or "-"),
    ]
    for name, text in lines:
        console.print(f"{name:<12}{text}", highlight=False, markup=False, soft_wrap=True)
    if job.message:
        console.print(job.message, highlight=False, markup=False, soft_wrap=True)


def show_jobs(console: Console, jobs: Sequence[JobView]) -> None:
    """Print a table of jobs, the newest first."""
    if not jobs:
        console.print("no job of rayfed-lora in this cluster")
        return
    table = Table("job", "recipe", "state", "started", "progress", box=box.SIMPLE)
    for job in sorted(jobs, key=lambda each: -(each.started_at or 0.0)):
        began = (
            "-"
            if job.started_at is None
            else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started_at))
        )
        cells = (job.id, job.recipe or "-", job.state, began, job.standing)
        # As text: whoever may submit jobs to the cluster may write anything.
        table.add_row(*map(Text, cells))
    console.print(table)

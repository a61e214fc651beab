"""Ray jobs that run recipes, as their records describe them. Source: this project."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from rayfed_lora.recipe.loading import recipe_yaml
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.status import Status, headline
from rayfed_lora.types import Stage
from rayfed_lora.units import duration

# Keys of a job's metadata.
RECIPE_NAME = "recipe"
RUN_FOLDER = "run folder"
PROGRESS = "progress"
RECIPE_YAML = "rayfed_lora.recipe"
PROGRESS_JSON = "rayfed_lora.progress"

State = Literal["pending", "running", "stopped", "succeeded", "failed", "unknown"]
ENDED: tuple[State, ...] = ("stopped", "succeeded", "failed")
# Exit status of a shell that does not find its command.
_NO_COMMAND = 127
# Fields of a job's progress that are those of a `Status`.
_FROM_STATUS = (
    *("phase", "step", "rounds_done", "rounds", "running", "stage", "rank", "loss", "accuracy"),
)


def run_metadata(recipe: Recipe, location: str) -> dict[str, str]:
    """Return the metadata of a job that runs a recipe: it marks the job, and `resume` needs it."""
    return {RECIPE_NAME: recipe.name, RUN_FOLDER: location, RECIPE_YAML: recipe_yaml(recipe)}


class JobProgress(BaseModel):
    """The progress of a run at its job's newest report.

    Fields are those of `Status`, the estimated seconds to the end (`eta_s`, None before the first
    round) and `time.time()` of the report (`told_at`).
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    phase: str
    step: str = ""
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
        """Return the progress at the time `now`."""
        values = {name: getattr(status, name) for name in _FROM_STATUS}
        return cls(**values, eta_s=status.eta_s(now), told_at=now)

    @classmethod
    def read(cls, text: str | None) -> JobProgress | None:
        """Return what `model_dump_json` wrote, None for any other text."""
        try:
            return None if text is None else cls.model_validate_json(text)
        except ValidationError:
            return None

    def line(self, ended: bool = False) -> str:
        """Return one line for people; of a job that has ended, only the finished rounds."""
        status = Status(**{name: getattr(self, name) for name in _FROM_STATUS})
        parts = [f"{self.rounds_done} of {self.rounds} rounds done" if ended else headline(status)]
        if self.loss is not None:
            parts.append(f"train loss {self.loss:.3f}")
        if self.accuracy is not None:
            parts.append(f"test accuracy {self.accuracy:.3f}")
        if self.phase == "training" and not ended:
            parts.append(f"ETA {duration(self.eta_s)}")
        return ", ".join(parts)


@dataclass(frozen=True)
class JobView:
    """A job of the cluster that runs a recipe.

    Attributes:
        id: Ray's submission id.
        recipe: name of the recipe, "" before the job's first report.
        state: Ray's own, in lower case.
        location: run folder as the cluster's nodes see it, None if unknown.
        progress: the job's newest report.
        started_at: `time.time()` of its start, None if unknown.
        exit_status: of its command, None before its end.
        message: why the job failed, "" if it did not.
        recipe_yaml: the resolved recipe, None if unknown.
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

    @classmethod
    def of(cls, job: Any) -> JobView:
        """Return the view of a job's record, Ray's `JobDetails`."""
        metadata = job.metadata or {}
        state = str(job.status).lower()
        return cls(
            id=job.submission_id,
            recipe=metadata.get(RECIPE_NAME, ""),
            state=state if state in (*ENDED, "pending", "running") else "unknown",
            location=metadata.get(RUN_FOLDER),
            progress=JobProgress.read(metadata.get(PROGRESS_JSON)),
            started_at=None if job.start_time is None else job.start_time / 1000,
            exit_status=job.driver_exit_code,
            message=_failure(job) if state == "failed" else "",
            recipe_yaml=metadata.get(RECIPE_YAML),
        )

    @property
    def ended(self) -> bool:
        """Whether the job has ended."""
        return self.state in ENDED

    @property
    def run_finished(self) -> bool:
        """Whether the run is known to have finished, even if the command failed later."""
        finished = self.progress is not None and self.progress.phase == "done"
        return finished or self.state == "succeeded"

    @property
    def standing(self) -> str:
        """The progress of the run, in one line."""
        if self.progress is None:
            return "-" if self.ended else "starting"
        return self.progress.line(self.ended)


def runs_recipe(job: Any) -> bool:
    """Return whether a job, Ray's `JobDetails`, runs a recipe."""
    if job.submission_id is None:
        return False
    if RECIPE_YAML in (job.metadata or {}):
        return True
    # A job of plain `ray job submit` has no metadata before its first report.
    return re.match(r"(\S*/)?rayfed-lora\s+run\s", job.entrypoint) is not None


def _failure(job: Any) -> str:
    """Return the error message of the command, or the last lines of Ray's message."""
    if job.driver_exit_code == _NO_COMMAND:
        return (
            "the command rayfed-lora is not on the PATH of the head node's Ray: start Ray there"
            " from the environment that rayfed-lora is installed in"
        )
    text = job.message or ""
    found = text.rfind("\nrayfed-lora: ")
    return text[found + 1 :].strip() if found >= 0 else "\n".join(text.splitlines()[-10:])


def exit_status(job: JobView) -> int:
    """Return the exit status of a job that has ended, as if its command had been run here."""
    return {"succeeded": 0, "stopped": 130}.get(job.state, job.exit_status or 1)

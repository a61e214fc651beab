"""Ray's record of a job, read for people. Source: this project."""

from __future__ import annotations

import re
from typing import Any

from rayfed_lora.jobs import progress as job_progress
from rayfed_lora.jobs.views import ENDED, JobProgress, JobView

_NO_COMMAND = 127


def is_ours(job: Any) -> bool:
    """Return whether a job, Ray's `JobDetails`, runs a recipe."""
    if job.submission_id is None:
        return False
    metadata = job.metadata or {}
    ours = job_progress.RECIPE_YAML in metadata
    # Jobs of plain `ray job submit` that have not told of themselves yet, or never did.
    return ours or re.match(r"(\S*/)?rayfed-lora\s+run\s", job.entrypoint) is not None


def view_of(job: Any) -> JobView:
    """Return what a job's record, Ray's `JobDetails`, says of its run."""
    metadata = job.metadata or {}
    state = str(job.status).lower()
    return JobView(
        id=job.submission_id,
        recipe=metadata.get(job_progress.RECIPE_NAME, ""),
        state=state if state in (*ENDED, "pending", "running") else "unknown",
        location=metadata.get(job_progress.RUN_FOLDER),
        progress=JobProgress.read(metadata.get(job_progress.PROGRESS_JSON)),
        started_at=None if job.start_time is None else job.start_time / 1000,
        exit_status=job.driver_exit_code,
        message=_failure(job) if state == "failed" else "",
        recipe_yaml=metadata.get(job_progress.RECIPE_YAML),
    )


def _failure(job: Any) -> str:
    """Return the message of the command, or the last lines of what Ray says."""
    if job.driver_exit_code == _NO_COMMAND:
        return (
            "the command rayfed-lora is not on the PATH of the head node's Ray: start Ray there"
            " from the environment that rayfed-lora is installed in"
        )
    said = job.message or ""
    found = said.rfind("\nrayfed-lora: ")
    return said[found + 1 :].strip() if found >= 0 else "\n".join(said.splitlines()[-10:])

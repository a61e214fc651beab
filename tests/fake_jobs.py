"""A fake of Ray's client for jobs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass
class Details:
    """Ray's JobDetails, as far as it is read."""

    submission_id: str | None
    entrypoint: str
    metadata: dict[str, str] | None = None
    status: str = "RUNNING"
    message: str | None = None
    start_time: int | None = 1_000
    driver_exit_code: int | None = None


@dataclass
class FakeClient:
    """Ray's JobSubmissionClient: keeps what was submitted, with the files as they were."""

    jobs: dict[str, Details] = field(default_factory=dict)
    sent: list[dict[str, Any]] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)
    on_poll: Callable[[Details], None] = lambda job: None

    def submit_job(self, **request: Any) -> str:
        folder = Path(request["runtime_env"]["working_dir"])
        files = {path.name: path.read_text() for path in folder.iterdir()}
        self.sent.append({**request, "files": files})
        job = request["submission_id"]
        self.jobs[job] = Details(job, request["entrypoint"], request["metadata"], "PENDING")
        return str(job)

    def list_jobs(self) -> list[Details]:
        return list(self.jobs.values())

    def get_job_info(self, job: str) -> Details:
        if job not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {job} does not exist.")
        self.on_poll(self.jobs[job])
        return self.jobs[job]

    def get_job_logs(self, job: str) -> str:
        return "".join(self.tail)

    def stop_job(self, job: str) -> bool:
        self.jobs[job] = replace(self.jobs[job], status="STOPPED")
        return True

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for text in self.tail:
            if text == "broken":
                self.tail = [each for each in self.tail if each != "broken"]
                raise RuntimeError("WebSocket connection closed unexpectedly")
            yield text
        self.jobs[job] = replace(self.jobs[job], status="SUCCEEDED")

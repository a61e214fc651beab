"""Jobs and findings about a cluster in the terminal. Source: this project, on rich."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.doctor.findings import Finding, Level
from rayfed_lora.jobs.views import JobView

_STYLES: dict[Level, str] = {"ok": "green", "warning": "yellow", "fault": "red", "skipped": "dim"}


def show_submitted(console: PlainConsole, job: str, location: str, notes: Sequence[str]) -> None:
    """Print a job's notes, id and run folder."""
    for note in notes:
        console.print_line(f"note: {note}", "yellow")
    console.print_line(f"job: {job}")
    console.print_line(f"run folder: {location}")


def show_stopped(console: PlainConsole, job: JobView) -> None:
    """Print the end of a job after a request to stop, and how to resume it."""
    if job.run_finished:
        text = f"job {job.id} had finished; run folder: {job.location}"
    elif job.progress is None:
        where = f"run folder: {job.location or 'not known'}"
        text = f"job {job.id} {job.state}; it had reported no progress of its run; {where}"
    elif job.progress.rounds_done == 0:
        text = f"job {job.id} {job.state} before its first round was done"
    else:
        kept = f"its checkpoint is kept in {job.location}; to resume: rayfed-lora resume {job.id}"
        text = f"job {job.id} {job.state}: {job.standing}; {kept}"
    console.print_line(text)


def show_job(console: PlainConsole, job: JobView, now: float) -> None:
    """Print one job: the progress of its run, its run folder, and why it failed."""
    age = "" if job.progress is None or job.ended else f" ({now - job.progress.told_at:.0f} s ago)"
    for name, text in (
        ("job", job.id),
        ("recipe", job.recipe or "-"),
        ("state", job.state),
        ("progress", job.standing + age),
        ("run folder", job.location or "-"),
    ):
        console.print_line(f"{name:<12}{text}")
    if job.message:
        console.print_line(job.message)


def show_jobs(console: PlainConsole, jobs: Sequence[JobView]) -> None:
    """Print a table of jobs, the newest first."""
    if not jobs:
        console.print_line("no job of rayfed-lora in this cluster")
        return
    table = Table("job", "recipe", "state", "started", "progress", box=box.SIMPLE)
    for job in sorted(jobs, key=lambda each: -(each.started_at or 0.0)):
        started = "-"
        if job.started_at is not None:
            started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started_at))
        cells = (job.id, job.recipe or "-", job.state, started, job.standing)
        # As Text, never markup: anyone who may submit jobs to the cluster writes these.
        table.add_row(*map(Text, cells))
    console.print(table)


def show_diagnosis(console: PlainConsole, findings: Sequence[Finding]) -> None:
    """Print the findings, each with its fix, and the number of each level."""
    for finding in findings:
        console.print(f"{finding.level:<8}", style=_STYLES[finding.level], end="")
        console.print_line(f"{finding.subject}: {finding.text}")
        if finding.fix:
            console.print_line(f"{'':8}fix: {finding.fix}")
    counts = Counter(finding.level for finding in findings)
    console.print_line(
        f"{counts['fault']} faults, {counts['warning']} warnings, {counts['skipped']} skipped"
    )

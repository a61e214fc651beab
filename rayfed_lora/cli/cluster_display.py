"""Jobs and findings about a cluster in the terminal. Source: this project, on rich."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.cli.next_steps import command
from rayfed_lora.diagnosis.findings import Finding, Level
from rayfed_lora.jobs.jobs import Submitted
from rayfed_lora.jobs.views import JobView
from rayfed_lora.printable import printable

_STYLES: dict[Level, str] = {"ok": "green", "warning": "yellow", "fault": "red", "skipped": "dim"}


def show_submitted(
    console: PlainConsole, job: Submitted, address: str | None, followed: bool
) -> None:
    """Print a job's notes, id and run folder, and the commands that look at it."""
    for note in job.notes:
        console.print_line(f"note: {note}", "yellow")
    facts = {"job": job.id, "run folder": job.location}
    if not followed:
        facts["progress"] = command("status", job.id, address=address)
        facts["output"] = command("logs", job.id, "--follow", address=address)
    console.print_facts(facts)


def show_stopped(console: PlainConsole, job: JobView, address: str | None) -> None:
    """Print the end of a job after a request to stop, and how to resume it."""
    if job.run_finished:
        text = f"job {job.id} had finished; run folder: {job.location}"
    elif job.progress is None:
        where = f"run folder: {job.location or 'not known'}"
        text = f"job {job.id} {job.state}; it had reported no progress of its run; {where}"
    elif job.progress.rounds_done == 0:
        text = f"job {job.id} {job.state} before its first round was done"
    else:
        kept = f"its checkpoint is kept in {job.location}"
        text = f"job {job.id} {job.state}: {job.standing}; {kept}"
    console.print_line(text)
    _show_next(console, job, address)


def _show_next(console: PlainConsole, job: JobView, address: str | None) -> None:
    """Print the command that resumes an unfinished job that has ended, or shows a running one."""
    if not job.ended:
        console.print_facts({"output": command("logs", job.id, "--follow", address=address)})
    elif not job.run_finished and job.recipe_yaml is not None and job.location is not None:
        console.print_facts({"to resume": command("resume", job.id, address=address)})


def show_job(console: PlainConsole, job: JobView, now: float, address: str | None) -> None:
    """Print one job: the progress of its run, its run folder, why it failed, what follows."""
    age = "" if job.progress is None or job.ended else f" ({now - job.progress.told_at:.0f} s ago)"
    facts = {
        "job": job.id,
        "recipe": job.recipe or "-",
        "state": job.state,
        "progress": job.standing + age,
        "run folder": job.location or "-",
    }
    for name, text in facts.items():
        console.print(f"{name:<12}{printable(text, lines=False)}", soft_wrap=True)
    if job.message:
        console.print_line(job.message)
    _show_next(console, job, address)


def show_jobs(console: PlainConsole, jobs: Sequence[JobView], address: str | None) -> None:
    """Print a table of jobs, the newest first."""
    if not jobs:
        console.print_line("no job of rayfed-lora in this cluster")
        return
    rows = []
    for job in sorted(jobs, key=lambda each: -(each.started_at or 0.0)):
        started = "-"
        if job.started_at is not None:
            started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started_at))
        row = {"job": job.id, "recipe": job.recipe or "-", "state": job.state, "started": started}
        rows.append({**row, "progress": job.standing})
    console.print_rows(rows, optional=("recipe", "started"), left=list(rows[0]), prose="progress")
    console.print_facts({"one of them": f"{command('status', address=address)} ID"})


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

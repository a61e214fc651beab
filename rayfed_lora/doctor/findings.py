"""What is wrong with a machine or cluster, and how to fix it. Source: this project."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

Level = Literal["ok", "warning", "fault", "skipped"]
_STYLES: dict[Level, str] = {"ok": "green", "warning": "yellow", "fault": "red", "skipped": "dim"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: ok | warning (runs go on) | fault (runs fail) | skipped.
        subject: what was looked at, e.g. `versions`.
        text: what was found.
        fix: what to do about it, "" where there is nothing to do.
    """

    level: Level
    subject: str
    text: str
    fix: str = ""


def show_diagnosis(console: Console, findings: Sequence[Finding]) -> None:
    """Print the findings, each fault with how to fix it, and how many there are."""
    for finding in findings:
        console.print(f"{finding.level:<8}", style=_STYLES[finding.level], end="", highlight=False)
        said = f"{finding.subject}: {finding.text}"
        console.print(said, highlight=False, markup=False, soft_wrap=True)
        if finding.fix:
            console.print(
                f"{'':8}fix: {finding.fix}", highlight=False, markup=False, soft_wrap=True
            )
    counts = Counter(finding.level for finding in findings)
    console.print(
        f"{counts['fault']} faults, {counts['warning']} warnings, {counts['skipped']} skipped",
        highlight=False,
    )


def diagnosis_status(findings: Sequence[Finding]) -> int:
    """Return the exit status: 1 where there is a fault, else 0."""
    return int(any(finding.level == "fault" for finding in findings))

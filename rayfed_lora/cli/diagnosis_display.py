"""The findings of `doctor` in the terminal. Source: this project, on rich."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.doctor.findings import Finding, Level

_STYLES: dict[Level, str] = {"ok": "green", "warning": "yellow", "fault": "red", "skipped": "dim"}


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

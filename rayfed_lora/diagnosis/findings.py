"""Findings about a machine or a cluster. Source: this project."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "fault", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        level: ok | warning (runs work) | fault (runs fail) | skipped.
        subject: of the check, e.g. `versions`.
        text: the result.
        fix: how to fix it, "" if nothing needs fixing.
    """

    level: Level
    subject: str
    text: str
    fix: str = ""


def diagnosis_status(findings: Sequence[Finding]) -> int:
    """Return the exit status: 1 if there is a fault, else 0."""
    return int(any(finding.level == "fault" for finding in findings))

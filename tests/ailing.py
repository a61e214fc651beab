"""What ailing nodes answer to a doctor; importable, so that Ray's workers find it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rayfed_lora.diagnosis import node_report
from rayfed_lora.diagnosis.node_report import NodeReport

_inspect = node_report.inspect


def inspect_older_torch(node: str, ray_gpus: float) -> NodeReport:
    """Answer as a node with an older torch where Ray hands out GPUs."""
    found = _inspect(node, ray_gpus)
    if ray_gpus == 0:
        return found
    return replace(found, versions={**found.versions, "torch": "1.0.0"})


def sees_nothing(location: str, marks: Sequence[str]) -> int:
    """Answer as a node that shares no folder with the others."""
    return len(marks)


def fails(node: str, ray_gpus: float) -> NodeReport:
    """Answer as a node whose environment lacks something."""
    raise ModuleNotFoundError("No module named 'peft'")


def marks_late(mark: str, seconds: float) -> None:
    """Answer late, and leave a file when it does."""
    time.sleep(seconds)
    Path(mark).touch()

"""A finished run under lm-evaluation-harness. Source: this project."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rayfed_lora.errors import BadInputError
from rayfed_lora.launching.exporting import export_run
from rayfed_lora.runs.reading import task_of
from rayfed_lora.storage import RunFolder

HARNESS_FILE = "harness.json"


def check_installed(option: str) -> None:
    """Raise BadInputError, beginning with an option, where the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise BadInputError(
            f"{option}: needs lm-evaluation-harness, pip install 'rayfed-lora[harness]'"
        )


def evaluate_run(
    location: str,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Test the exported model of a run on tasks of lm-evaluation-harness; write harness.json.

    Results of tasks that the file has already are replaced, others stay.

    Args:
        location: of the run's folder.
        tasks: names of tasks or groups.
        include: a folder with tasks of one's own (YAML).
        limit: most examples of a task; None: all.
        few_shot: examples in the prompt; None: as each task says.
        batch_size: examples in a forward pass.

    Returns:
        Metrics by task.

    Raises:
        BadInputError: the folder holds no finished run of a language model, the harness is not
            installed, or a task is not known or cannot be computed.
    """
    check_installed("--tasks")
    if not tasks:
        raise BadInputError("--tasks: expected one task or more, got none")
    folder = RunFolder(location)
    if folder.exists("recipe.yaml") and (task := task_of(folder)) != "causal-lm":
        raise BadInputError(
            f"{location}: expected a run of a language model (model.task causal-lm), got {task}"
        )
    with TemporaryDirectory() as scratch:
        to = Path(scratch, "model")
        for _ in export_run(location, to, merge=True):
            pass
        # Here: it imports torch and transformers.
        from rayfed_lora.models import harness

        found = harness.scores(
            to, tasks, include=include, limit=limit, few_shot=few_shot, batch_size=batch_size
        )
    before = json.loads(folder.read(HARNESS_FILE)) if folder.exists(HARNESS_FILE) else {}
    kept = before if isinstance(before, dict) else {}
    facts = {"limit": limit, "few_shot": few_shot}
    new = {name: {**values, **facts} for name, values in found.items()}
    folder.write(HARNESS_FILE, json.dumps({**kept, **new}, indent=1).encode())
    return found

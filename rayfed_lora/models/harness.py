"""Scores of an exported language model by EleutherAI's lm-evaluation-harness (extra harness).

Source: https://github.com/EleutherAI/lm-evaluation-harness, version 0.4.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayfed_lora.errors import BadInputError
from rayfed_lora.models.quiet import quiet


def scores(
    folder: Path,
    tasks: Sequence[str],
    *,
    include: Path | None,
    limit: int | None,
    few_shot: int | None,
    batch_size: int,
) -> dict[str, Any]:
    """Return the harness's results by task: metrics by name, and the version of each task.

    Args:
        folder: of a whole model with its tokenizer.
        tasks: names of tasks or groups.
        include: a folder with tasks of one's own (YAML); None: none.
        limit: most examples of a task; None: all.
        few_shot: examples in the prompt; None: as each task says.
        batch_size: examples in a forward pass.

    Raises:
        BadInputError: a task is not known, or the harness fails.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if include is None else str(include))
    known = {*manager.all_tasks}
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise BadInputError(
            f"--tasks: expected tasks of lm-evaluation-harness, or of the folder of --include, got"
            f" {', '.join(unknown)}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with quiet():
        net = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
        model = HFLM(net, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=batch_size)
        try:
            found = lm_eval.simple_evaluate(
                model,
                tasks=list(tasks),
                num_fewshot=few_shot,
                limit=limit,
                task_manager=manager,
                log_samples=False,
            )
        except Exception as error:  # of many types: data that are not here, tasks that are broken
            raise BadInputError(f"--tasks: {type(error).__name__}: {error}") from error
    return {name: _plain(values) for name, values in found["results"].items()}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of a task by name, those without a filter by their name alone."""
    return {
        key.removesuffix(",none"): value
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }

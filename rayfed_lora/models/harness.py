"""Scores of an exported language model by EleutherAI's lm-evaluation-harness (extra harness).

Source: https://github.com/EleutherAI/lm-evaluation-harness, version 0.4.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayfed_lora.errors import BadInputError
from rayfed_lora.models.quiet import quiet
from rayfed_lora.recipe.runtime import Harness


def scores(
    folder: Path,
    manager: Any,
    asked: Harness,
    device: str,
) -> dict[str, Any]:
    """Return the harness's results by task: metrics by name.

    Args:
        folder: of a whole model with its tokenizer.
        manager: the harness's `TaskManager`, which knows the tasks.
        asked: tasks, and how they are asked.
        device: auto: a GPU where there is one, else the CPU; or cpu, or cuda.

    Raises:
        BadInputError: the harness fails, or there is no GPU for cuda.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    has_gpu = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if has_gpu else "cpu"
    if device == "cuda" and not has_gpu:
        raise BadInputError("runtime.device: expected a GPU that torch can use for cuda, got none")
    with quiet():
        net = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
        model = HFLM(
            net, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=asked.batch_size
        )
        try:
            found = lm_eval.simple_evaluate(
                model,
                tasks=[*asked.tasks],
                num_fewshot=asked.few_shot,
                limit=asked.limit,
                apply_chat_template=asked.chat_template,
                task_manager=manager,
                log_samples=False,
            )
        except Exception as error:  # of many types: data that are not here, tasks that are broken
            raise BadInputError(
                f"tasks {', '.join(asked.tasks)}: {type(error).__name__}: {error}"
            ) from error
    return {name: _plain(values) for name, values in found["results"].items()}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of a task by name, those without a filter by their name alone."""
    return {
        key.removesuffix(",none"): value
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }

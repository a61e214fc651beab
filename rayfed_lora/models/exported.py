"""Exported models, loaded again by transformers and peft alone. Source: this project."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from rayfed_lora.recipe.model import AUTO_CLASSES


def load_model(folder: Path, task: str) -> Any:
    """Return a transformers model in evaluation mode from the folder of a whole model."""
    return getattr(transformers, AUTO_CLASSES[task]).from_pretrained(folder).eval()


def load_adapter(folder: Path, task: str, labels: Sequence[str]) -> Any:
    """Return a `peft.PeftModel` in evaluation mode from the folder of an adapter, on its base.

    `labels` name the classes where the base is the source, which does not know them.
    """
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    own: dict[str, Any] = {}
    if labels and not Path(base).is_relative_to(folder):
        names = {i: str(label) for i, label in enumerate(labels)}
        numbers = {name: i for i, name in names.items()}
        own = {"id2label": names, "label2id": numbers, "ignore_mismatched_sizes": True}
    model = getattr(transformers, AUTO_CLASSES[task]).from_pretrained(base, **own)
    with warnings.catch_warnings():
        # Of peft's own use of it.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return PeftModel.from_pretrained(model, str(folder)).eval()
